"""The state of runs in a terminal: a table of several, and the details of one."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial

from moco_dist.config.moco import MocoConfig
from moco_dist.errors import counted, shown
from moco_dist.report.results import TITLES, results
from moco_dist.runs.partners import labels
from moco_dist.runs.record import CONTROL, Metric, Record, began, number, text_of
from moco_dist.tracking.progress import RunProgress, duration, moment
from moco_dist.tracking.terminal import layout, loss

KINDS = {"pretrain": "pretraining", "probe": "probe", "": "unknown"}
# The first WORDS columns hold text; the others hold numbers and are aligned to the right.
COLUMNS = (
    *("run", "kind", "state", "step", "loss"),
    *("kNN %", "best %", "online %", "test %", "control %"),
)
WORDS = 3
# A cell without a value.
NONE = "-"
# Keys that say where the files of a run are, not what it does.
PLACES = ("name", "output", "encoder", "data.root", "data.cache")
# Most keys of a run that are printed because they differ from another run's; a page has all.
TOLD = 8
# A local date and time, to the minute.
date = partial(moment, form="%Y-%m-%d %H:%M", unknown="at an unknown time")
# States that need no reason.
WELL = ("done", "running", "starting")


def table(records: list[Record], width: int | None) -> Iterator[str]:
    """Yield the lines of a table of runs, followed by why runs ended and by their alarms.

    If a line would be longer than `width`, the runs' names get separate lines.
    """
    named = list(zip(labels(records), records, strict=True))
    rows = [COLUMNS, *(row(name, record) for name, record in named)]
    if not any(record.figures(Metric.ONLINE_TOP1) for record in records):
        place = COLUMNS.index("online %")
        rows = [cells[:place] + cells[place + 1 :] for cells in rows]
    full = layout(rows, WORDS)
    if width and max(map(len, full)) > width:
        narrow = layout([cells[1:] for cells in rows], WORDS - 1)
        for cells, line in zip(rows, narrow, strict=True):
            yield from (cells[0], f"  {line}")
    else:
        yield from full
    notes = []
    for name, record in named:
        notes += [] if record.state in WELL else [standing(name, record)]
        for alarm in record.alarms:
            what = f"{text_of(alarm['alarm'])}: {text_of(alarm.get('text'))}"
            notes.append(f"{name}: alarm at step {alarm['step']:,}, {what}")
    if notes:
        yield ""
    for note in notes:
        yield from textwrap.wrap(note, width, subsequent_indent="  ") if width else [note]


def choices(records: list[Record], width: int | None) -> Iterator[str]:
    """Yield lines with each run's values of the keys in which the runs of its kind differ."""
    named = list(zip(labels(records), records, strict=True))
    for kind in dict.fromkeys(record.kind for record in records):
        alike = [(name, record) for name, record in named if record.kind == kind]
        if not kind or not (found := list(differences(alike))):
            continue
        yield from ("", f"Keys that differ between the {KINDS[kind]} runs:")
        rows = [
            (name, " ".join(f"{key}={values[place]}" for key, *values in found[:TOLD]))
            for place, (name, _) in enumerate(alike)
        ]
        yield from layout(rows, 2, width or sys.maxsize)
        if len(found) > TOLD:
            yield f"and {len(found) - TOLD} more, which the page lists"


def differences(runs: Sequence[tuple[str, Record]]) -> Iterator[list[str]]:
    """Yield each key whose values differ between the named runs, and its values."""
    for key in dict.fromkeys(key for _, record in runs for key in record.config):
        values = [value_text(record.config.get(key)) for _, record in runs]
        if key not in PLACES and len(set(values)) > 1:
            yield [key, *values]


def value_text(value: object) -> str:
    """Return the value of a key on one line, NONE for one that a run lacks."""
    return text_of(NONE if value is None else value)


def row(name: str, record: Record) -> tuple[str, ...]:
    """Return the cells of a run."""
    value, knn, best = record.last(Metric.LOSS), record.last(Metric.KNN_TOP1), record.best_knn
    trained, control = (record.result(each, "test", "top1") for each in ("probe", "control"))
    return (
        name,
        record.kind or NONE,
        record.state,
        f"{record.step}/{record.total_steps or '?'}" if record.kind or record.lines else NONE,
        NONE if value is None else loss(value),
        percent(knn),
        percent(best and best[1]),
        percent(record.last(Metric.ONLINE_TOP1)),
        percent(trained),
        percent(control),
    )


def standing(name: str, record: Record) -> str:
    """Return the state of a run, in a sentence."""
    total, step = record.total_steps, record.step
    run = f"The {KINDS[record.kind]} {name}" if record.kind else f"The run {name}"
    place = f"step {step:,} of {total:,}" if total else f"step {step:,}"
    share = f" ({100 * step / total:.0f}%)" if total else ""
    reason = record.reason or "no reason was recorded"
    times = [moment for line in record.lines[-1:] if (moment := number(line.get("time")))]
    last = f", {date(times[0])}" if times else ""
    status = record.status.get("exit_status")
    code = f", exit status {status}" if isinstance(status, int) else ""
    if record.state == "running":
        every = number(record.config.get("knn.every_epochs")) or 0
        progress = RunProgress(total, knn_every=int(min(every, 1e6)))
        progress.began = began(record.directory)
        for line in record.lines:
            progress.add(line)
        left = progress.seconds_left()
        last += f", about {duration(left)} left" if left else ""
    ended = f"{run} ended with an error ({record.state}{code}) at {place}: {reason}"
    stopped = f"{run} was stopped at {place}{share}: {reason}"
    return {
        "done": f"{run} is done: {place}{last}.",
        "running": f"{run} is still running: {place}{share}{last}. Repeat the command to update "
        "this page.",
        "starting": f"{run} is starting; this page shows what it did before.",
        "gone": f"{run} was killed or lost its machine after {place}: {reason}.",
        "stopped": stopped,
        "interrupted": stopped,
        "empty": f"{name}: the folder is empty.",
        "unknown": f"{run} has no readable status.json; its files end at {place}.",
    }.get(record.state, ended)


def details(record: Record) -> Iterator[str]:
    """Yield the details of one run, one line each."""
    config = record.config

    def value(key: str) -> str:
        return text_of(config.get(key, "?"))

    def count(key: str, one: str) -> str:
        found = config.get(key)
        return counted(found, one) if isinstance(found, int) else f"? {one}s"

    rows = {"directory": shown(record.directory)}
    if record.status:
        status = {key: text_of(record.status.get(key)) for key in ("state", "time", "host", "pid")}
        rows["last status"] = "{state} at {time} on {host}, process {pid}".format_map(status)
    if record.kind:
        rows["data"] = f"{value('data.name')}, {value('data.size')} pixels"
    if record.kind == "pretrain":
        given, halves = config.get("encoder.options"), config.get("encoder.halves", "none")
        options = f" with {', '.join(map(text_of, given))}" if isinstance(given, list) else ""
        two = f" in two halves ({text_of(halves)})" if halves != "none" else ""
        rows["encoder"] = (
            f"{value('encoder.backbone')}{two}{options * bool(given)}, "
            f"width {value('encoder.width')}, "
            f"{value('encoder.stem')} stem, {value('encoder.head')} head to {value('encoder.dim')}"
        )
        settings = moco.settings if (moco := MocoConfig.stored(config)) else {}
        words = (f"{name.replace('_', ' ')} {text_of(found)}" for name, found in settings.items())
        rows["method"] = ", ".join([*words, count("bn_groups", "BatchNorm group")])
    if record.kind == "probe":
        rows["encoder"] = value("encoder")
    if record.kind:
        rows["training"] = (
            f"{count('epochs', 'epoch')}, batch {value('batch_size')}, lr {value('optim.lr')} "
            f"({value('optim.schedule')}), {value('precision')}, seed {value('seed')}"
        )
    rows |= {title: f"{value}, {about}" for title, value, about in key_figures(record)}
    names = [f"step {step:,}" for step in record.saved[-4:]] + record.damaged
    earlier = f"{len(record.saved) - 4} earlier, " if len(record.saved) > 4 else ""
    rows["checkpoints"] = earlier + ", ".join(names) if names else "none"
    size = max(map(len, rows))
    yield from (f"{key:{size}}  {text}" for key, text in rows.items())


def key_figures(record: Record) -> Iterator[tuple[str, str, str]]:
    """Yield title, value and explanation of a run's most important figures."""
    if found := results(record):
        for name in [name for name in found.names if name.startswith("top")][:2]:
            trained, control = (found.value(encoder, found.part, name) for encoder in TITLES)
            if trained is None:
                continue
            told = [f"{found.part} images"]
            if trained.low is not None and trained.high is not None:
                told.append(f"95% interval {percent(trained.low)} to {percent(trained.high)}")
            told += [f"{found.titles[CONTROL]} {percent(control.mean)}%"] if control else []
            majority = found.majority(found.part) if name == "top1" else None
            told += [f"majority class {percent(majority)}%"] if majority is not None else []
            title = f"Linear probe, {name.replace('top', 'top-')}"
            yield title, f"{percent(trained.mean)}%", ", ".join(told)
    if record.kind == "pretrain" and (best := record.best_knn):
        last, (first_step, first) = record.last(Metric.KNN_TOP1), record.figures(Metric.KNN_TOP1)[0]
        about = f"validation images, at step {best[0]:,}; last {percent(last)}%"
        before = f", {percent(first)}% before the first step" if first_step == 0 else ""
        yield "kNN top-1, best", f"{percent(best[1])}%", about + before
    if record.kind == "pretrain" and (online := record.last(Metric.ONLINE_TOP1)) is not None:
        about = "validation images, by a linear classifier of the training images"
        yield "Online top-1, last", f"{percent(online)}%", about
    if record.kind == "pretrain" and (value := record.last(Metric.LOSS)) is not None:
        yield "Loss, last", loss(value), f"after {record.step:,} steps"


def percent(share: float | None) -> str:
    """Return a share as a percentage without the sign, NONE for None."""
    return NONE if share is None else f"{100 * share:.2f}"
