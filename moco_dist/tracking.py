"""Metrics of a run, from process 0: `log` writes metrics.jsonl and the console."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from moco_dist.errors import output_errors

Metrics = Mapping[str, float]
Sink = Callable[[int, Metrics], None]


class Tracker:
    """Hands each line of metrics to its sinks; a process without sinks tracks nothing."""

    def __init__(self, sinks: list[Sink], progress: Progress | None = None) -> None:
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


def console_lines(
    console: Console, total_steps: int, start_step: int
) -> tuple[Sink, Progress | None]:
    """Return a sink for a person to read: a live bar in a terminal, one plain line each without."""
    began: list[float] = []  # time and step of the first line about training
    columns = (
        BarColumn(bar_width=None),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True),
    )
    bar = Progress(*columns, console=console) if console.is_terminal else None
    task = bar.add_task("", total=total_steps, completed=start_step) if bar else None

    def show(step: int, metrics: Metrics) -> None:
        rate = metrics.get("train/images_per_second")
        loss = metrics.get("train/loss")
        if bar and task is not None and loss is not None:
            speed = f" {rate:,.0f} img/s" if rate else ""
            bar.update(task, completed=step, description=f"loss {loss:.3f}{speed}")
        results = {
            k: v
            for k, v in metrics.items()
            if k.startswith(("knn/", "probe/", "control/", "test/"))
        }
        if bar is None or results:
            shown = results if bar else metrics
            parts = [f"{_short(name)} {_text(name, value)}" for name, value in shown.items()]
            if loss is not None and not began:
                began.extend((time.monotonic(), step))
            left = _remaining(began, step, total_steps) if began else ""
            parts += [f"{left} left"] if left and not bar else []
            console.print(
                f"step {step:,}/{total_steps:,}  " + "  ".join(parts),
                soft_wrap=True,
                highlight=False,
            )

    return show, bar


def _short(name: str) -> str:
    return (
        name.removeprefix("train/").replace("images_per_second", "img/s").replace("accuracy_", "")
    )


def _text(name: str, value: float) -> str:
    if "top" in name or name == "queue/fill":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if name.endswith("per_second") else f"{value:.4g}"


def _remaining(began: list[float], step: int, total_steps: int) -> str:
    done, left = step - began[1], total_steps - step
    if done <= 0 or left <= 0:
        return ""
    minutes, seconds = divmod(round((time.monotonic() - began[0]) / done * left), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
