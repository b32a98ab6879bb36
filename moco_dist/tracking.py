"""Metrics of a run, from process 0: `log` writes metrics.jsonl and the console."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from moco_dist.errors import output_errors

Metrics = Mapping[str, float]
Sink = Callable[[int, Metrics], None]


class Display(Protocol):
    """What shows a run while it goes on."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Tracker:
    """Hands each line of metrics to its sinks; a process without sinks tracks nothing."""

    def __init__(self, sinks: list[Sink], progress: Display | None = None) -> None:
        self.sinks = sinks
        self.progress = progress

    def log(self, step: int, metrics: Metrics) -> None:
        """Record `metrics`, by their names, as what holds after `step` steps."""
        for sink in self.sinks:
            sink(step, metrics)

    def __enter__(self) -> Self:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.progress:
            self.progress.stop()


def json_lines(path: Path, step: int, evaluated: bool = True) -> Sink:
    """Return a sink that appends JSON lines to `path`; those after `step` are cut off first.

    So is the kNN accuracy of `step` itself, unless the checkpoint knows that it was `evaluated`.
    """
    with output_errors(path), path.open("ab+") as file:
        file.seek(0)
        end = 0
        for line in file:
            again = not evaluated and _step_of(line) == step and b'"knn/' in line
            if not line.endswith(b"\n") or _step_of(line) > step or again:
                break
            end += len(line)
        file.truncate(end)  # one change of the file: a kill here loses no line that stays

    def write(step: int, metrics: Metrics) -> None:
        with output_errors(path), path.open("a") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")

    return write


def _step_of(line: bytes) -> float:
    """Return the step of a line of metrics; one that a crash cut short comes after everything."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
