"""Metrics of a run, from process 0: `log` writes metrics.jsonl, the console and the feeds."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from moco_dist.errors import StoppedError, UserError, output_errors
from moco_dist.tracking.feed import Feed
from moco_dist.tracking.media import Album

Metrics = Mapping[str, float]
Sink = Callable[[int, Metrics], None]

# The first line of metrics.jsonl. Version 1: every other line has "step", "time" and metrics.
HEADER = {"schema": "moco_dist.metrics", "version": 1}


class Display(Protocol):
    """What shows a run in progress."""

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Tracker:
    """Hands each line of metrics to its sinks; a process without sinks tracks nothing.


    `media` takes the run's pictures; it is None where none are wanted.
    """

    def __init__(
        self,
        sinks: list[Sink],
        progress: Display | None = None,
        feeds: list[Feed] | None = None,
        media: Album | None = None,
    ) -> None:
        self.sinks = sinks
        self.progress = progress
        self.feeds = feeds or []
        self.media = media
        # Whether more is to come for the step of the newest line.
        self.unfinished = False

    def log(self, step: int, metrics: Metrics) -> None:
        """Record `metrics`, by their names, as what holds after `step` steps."""
        for sink in self.sinks:
            sink(step, metrics)
        for feed in self.feeds:
            feed.log(step, metrics)

    def conclude(self, results: Mapping[str, float], encoder: Path | None = None) -> None:
        """Record the final figures of a run, and the folder of an encoder to upload."""
        for feed in self.feeds:
            feed.conclude(results, encoder)

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
        status = error.exit_status if isinstance(error, UserError) else int(error is not None)
        for feed in self.feeds:
            feed.close(status, not self.unfinished, hurry=isinstance(error, StoppedError))


def json_lines(path: Path, step: int, evaluated: bool = True) -> Sink:
    """Return a sink that appends JSON lines to `path`; those after `step` are cut off first.

    So is the kNN accuracy of `step` itself, unless the checkpoint knows that it was `evaluated`.
    The first line is HEADER; a file of an older version stays without it.
    """
    with output_errors(path), path.open("ab+") as file:
        file.seek(0)
        end = 0
        for line in file:
            if end == 0 and _parsed(line).get("schema") == HEADER["schema"]:
                end = len(line)
                continue
            again = not evaluated and _step_of(line) == step and b'"knn/' in line
            if not line.endswith(b"\n") or _step_of(line) > step or again:
                break
            end += len(line)
        file.truncate(end)  # one change of the file: a kill here loses no line that stays
        if end == 0:
            file.write(json.dumps(HEADER).encode() + b"\n")

    def write(step: int, metrics: Metrics) -> None:
        with output_errors(path), path.open("a") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")

    return write


def cut_media(folder: Path, step: int) -> None:
    """Remove the pictures of steps after `step`, which will be made again."""
    for each in folder.glob("step_*"):
        with suppress(ValueError):
            if int(each.name.removeprefix("step_")) > step:
                shutil.rmtree(each, ignore_errors=True)


def _parsed(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line; one that a crash cut short has nothing in it."""
    with suppress(ValueError):
        content = json.loads(line) if line.endswith(b"\n") else {}
        return content if isinstance(content, dict) else {}
    return {}


def _step_of(line: bytes) -> float:
    """Return the step of a line of metrics; one that a crash cut short comes after everything."""
    try:
        return float(_parsed(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
