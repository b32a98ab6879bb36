"""The state of each run in words, the key figures of a page, and the table of its runs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moco_dist.report import curves
from moco_dist.report.probing import NONE, figure, percent
from moco_dist.report.results import CONTROL, TITLES, Results
from moco_dist.runs.record import Record, number
from moco_dist.tracking.progress import RunProgress, duration
from moco_dist.tracking.terminal import loss

if TYPE_CHECKING:
    from moco_dist.report.encoder import Look

KINDS = {"pretrain": "pretraining", "probe": "probe", "": "unknown"}
# States that are no reason to warn.
WELL = ("done", "running", "starting", "empty")


@dataclass(frozen=True)
class Run:
    """A run on a page; the names of its pictures begin with `prefix`."""

    name: str
    record: Record
    prefix: str
    results: Results | None
    # What its encoder makes of images, or else why that can't be shown; both empty if unasked.
    look: Look | None
    why_not: str
    command: str
    environment: dict[str, Any]


def standing(name: str, record: Record) -> str:
    """Return the state of a run as a sentence."""
    total, step = record.total_steps, record.step
    run = f"The {KINDS[record.kind]} {name}" if record.kind else f"The run {name}"
    place = f"step {step:,} of {total:,}" if total else f"step {step:,}"
    share = f" ({100 * step / total:.0f} %)" if total else ""
    reason = record.reason or "no reason was recorded"
    if record.state == "done":
        return f"{run} is done: {place}{_last_moment(record)}."
    if record.state == "running":
        left = _seconds_left(record)
        rest = f", about {duration(left)} left" if left else ""
        return (
            f"{run} is still running: {place}{share}{_last_moment(record)}{rest}. Repeat the "
            "command to bring this page up to date."
        )
    if record.state == "starting":
        return f"{run} is starting; this page shows what it did before."
    if record.state == "gone":
        return f"{run} was killed or lost its machine after {place}: {reason}."
    if record.state in ("stopped", "interrupted"):
        return f"{run} was stopped at {place}{share}: {reason}"
    if record.state == "empty":
        return f"{name}: the folder is empty."
    if record.state == "unknown":
        return f"{run} has no readable status.json; its files end at {place}."
    return f"{run} ended with an error ({record.state}) at {place}: {reason}"


def _last_moment(record: Record) -> str:
    times = [moment for line in record.lines[-1:] if (moment := number(line.get("time")))]
    return f", {date(times[0])}" if times else ""


def date(seconds: float) -> str:
    """Return a local date and time to the minute."""
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):
        return "at an unknown time"


def _seconds_left(record: Record) -> float | None:
    every = number(record.config.get("knn.every_epochs")) or 0
    progress = RunProgress(record.total_steps, knn_every=int(min(every, 1e6)))
    for line in record.lines:
        progress.add(line)
    return progress.seconds_left()


def key_figures(runs: Sequence[Run]) -> Iterator[tuple[str, str, str]]:
    """Yield title, value and explanation of what a reader looks for first."""
    for found in (run.results for run in runs if run.results):
        for name in [name for name in found.names if name.startswith("top")][:2]:
            trained, control = (found.value(e, found.part, name) for e in TITLES)
            if trained is None:
                continue
            told = [f"{found.part} images"]
            if trained.low is not None and trained.high is not None:
                told.append(f"95 % interval {percent(trained.low)} to {percent(trained.high)}")
            told += [f"{found.titles[CONTROL]} {percent(control.mean)} %"] if control else []
            majority = found.majority(found.part) if name == "top1" else None
            told += [f"majority class {percent(majority)} %"] if majority is not None else []
            title = f"Linear probe, {name.replace('top', 'top-')}"
            yield title, f"{percent(trained.mean)} %", ", ".join(told)
    for record in (run.record for run in runs if run.record.kind == "pretrain"):
        if best := record.best_knn:
            x, y = curves.epochs(record, "knn/top1")
            before = f", {percent(y[0])} % before the first step" if x[0] == 0 else ""
            last = f"last {percent(record.last('knn/top1'))} %"
            told = [f"validation images, at step {best[0]:,}; {last}{before}"]
            yield "kNN top-1, best", f"{percent(best[1])} %", told[0]
        if (value := record.last("train/loss")) is not None:
            yield "Loss, last", loss(value), f"after {record.step:,} steps"


def table_of_runs(runs: Sequence[Run]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each run: name, kind, state, step, loss, kNN, probe, random encoder."""
    for run in runs:
        record, found = run.record, run.results
        value, best, total = record.last("train/loss"), record.best_knn, record.total_steps
        yield (
            *(run.name, KINDS[record.kind], record.state),
            f"{record.step:,} of {total:,}" if total else NONE,
            NONE if value is None else loss(value),
            percent(best and best[1]),
            *(figure(found.value(e, found.part, "top1") if found else None) for e in TITLES),
        )
