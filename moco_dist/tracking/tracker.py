"""Metrics of a run, from process 0: `log` sends them to metrics.jsonl, console and feeds."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from moco_dist.errors import StoppedError, UserError, output_errors
from moco_dist.runs.record import number, parsed
from moco_dist.tracking.feed import Feed
from moco_dist.tracking.media import Album
from moco_dist.tracking.terminal import Display, Sink

Metrics = Mapping[str, float]

# The first line of metrics.jsonl. Version 1: every other line has "step", "time" and metrics.
HEADER = {"schema": "moco_dist.metrics", "version": 1}


class Tracker:
    """Sends each line of metrics to its sinks; a process without sinks tracks nothing.

    `media` gets the run's pictures; it is None if none are wanted.
    """

    def __init__(
        self,
        sinks: list[Sink],
        progress: Display | None = None,
        feeds: Sequence[Feed] = (),
        media: Album | None = None,
    ) -> None:
        self.sinks, self.progress, self.feeds, self.media = sinks, progress, feeds, media
        # Whether more metrics of the newest line's step will follow.
        self.unfinished = False

    def log(self, step: int, metrics: Metrics) -> None:
        """Record the `metrics` after `step` steps."""
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
    """Return a sink that appends JSON lines to `path`, after those beyond `step` are cut off.

    The kNN accuracy of `step` itself is cut off too unless it was `evaluated`. The first line is
    HEADER; a file of an older version stays without it.
    """
    with output_errors(path), path.open("ab+") as file:
        file.seek(0)
        end = 0
        for line in file:
            found = parsed(line) if line.endswith(b"\n") else {}  # cut short by a crash
            if end or found.get("schema") != HEADER["schema"]:
                at = number(found.get("step"))
                again = not evaluated and at == step and b'"knn/' in line
                if at is None or at > step or again:
                    break
            end += len(line)
        file.truncate(end)  # a single change of the file: a kill here loses no other line
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
