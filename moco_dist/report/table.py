"""The state of runs as a terminal shows it: a table of several runs, and the details of one."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from moco_dist.errors import shown
from moco_dist.runs.partners import labels
from moco_dist.runs.record import Record, text_of
from moco_dist.tracking.terminal import layout, loss

# The first WORDS columns hold text; the numbers in the others are aligned to the right.
COLUMNS = ("run", "kind", "state", "step", "loss", "kNN %", "best %", "test %", "control %")
WORDS = 3
# States that need no reason.
WELL = ("done", "running", "starting")


def table(records: list[Record], width: int | None) -> Iterator[str]:
    """Yield the lines of a table of runs, followed by why runs ended and by their alarms.

    If a line would be longer than `width`, each run's name gets a line of its own.
    """
    names = labels(records)
    rows = [COLUMNS, *(row(name, record) for name, record in zip(names, records, strict=True))]
    full = layout(rows, WORDS)
    if width and max(map(len, full)) > width:
        narrow = [f"  {line}" for line in layout([cells[1:] for cells in rows], WORDS - 1)]
        yield f"{COLUMNS[0]}"
        yield narrow[0]
        for name, line in zip(names, narrow[1:], strict=True):
            yield from (name, line)
    else:
        yield from full
    notes = [
        f"{name}: {note}"
        for name, record in zip(names, records, strict=True)
        for note in remarks(record)
    ]
    if notes:
        yield ""
    for note in notes:
        yield from textwrap.wrap(note, width, subsequent_indent="  ") if width else [note]


def row(name: str, record: Record) -> tuple[str, ...]:
    """Return the cells of a run."""
    value, knn, best = record.last("train/loss"), record.last("knn/top1"), record.best_knn
    trained, control = (record.result(each, "test", "top1") for each in ("probe", "control"))
    return (
        name,
        record.kind or "-",
        record.state,
        f"{record.step}/{record.total_steps or '?'}" if record.kind or record.lines else "-",
        "-" if value is None else loss(value),
        percent(knn),
        percent(best and best[1]),
        percent(trained),
        percent(control),
    )


def remarks(record: Record) -> Iterator[str]:
    """Yield why a run ended, unless it ended well, and its alarms."""
    if record.state not in WELL:
        status = record.status.get("exit_status")
        code = f" (exit status {status})" if isinstance(status, int) else ""
        nothing = {"empty": "the folder is empty", "unknown": "it has no readable status.json"}
        reason = record.reason or nothing.get(record.state, "no reason was recorded")
        yield f"{record.state}{code}: {reason}"
    for line in record.alarms:
        what = f"{text_of(line['alarm'])}: {text_of(line.get('text'))}"
        yield f"alarm at step {line['step']:,}, {what}"


def details(record: Record) -> Iterator[str]:
    """Yield the details of one run, one line each."""
    config = record.config

    def value(key: str) -> str:
        return text_of(config.get(key, "?"))

    rows = {"directory": shown(record.directory)}
    if record.status:
        status = {key: text_of(record.status.get(key)) for key in ("state", "time", "host", "pid")}
        rows["last status"] = "{state} at {time} on {host}, process {pid}".format_map(status)
    if record.kind == "pretrain":
        rows["data"] = f"{value('data.name')}, {value('data.size')} pixels"
        rows["encoder"] = (
            f"{value('encoder.backbone')}, width {value('encoder.width')}, {value('encoder.stem')} "
            f"stem, {value('encoder.head')} head to {value('encoder.dim')}"
        )
        rows["method"] = (
            f"queue {value('moco.queue_size')}, temperature {value('moco.temperature')}, "
            f"momentum {value('moco.momentum')}, {value('bn_groups')} BatchNorm groups"
        )
    elif record.kind == "probe":
        rows["data"] = f"{value('data.name')}, {value('data.size')} pixels"
        rows["encoder"] = value("encoder")
    if record.kind:
        rows["training"] = (
            f"{value('epochs')} epochs, batch {value('batch_size')}, lr {value('optim.lr')} "
            f"({value('optim.schedule')}), {value('precision')}, seed {value('seed')}"
        )
    rows |= figures(record)
    saved = record.checkpoints
    names = [f"step {step:,}" for step in saved.steps[-4:]] + saved.damaged
    earlier = f"{len(saved.steps) - 4} earlier, " if len(saved.steps) > 4 else ""
    rows["checkpoints"] = earlier + ", ".join(names) if names else "none"
    size = max(map(len, rows))
    yield from (f"{key:{size}}  {text}" for key, text in rows.items())


def figures(record: Record) -> dict[str, str]:
    """Return the results of a run in words, under their titles."""
    rows = {}
    before = [value for step, value in record.figures("knn/top1") if step == 0]
    if best := record.best_knn:
        without = f"; {percent(before[0])} before the first step" if before else ""
        rows["best kNN"] = f"{percent(best[1])} % at step {best[0]:,}{without}"
    for encoder, title in (("probe", "trained"), ("control", "random control")):
        for part in ("validation", "test"):
            found = record.results.get(encoder)
            content = found.get(part) if isinstance(found, dict) else None
            if isinstance(content, dict):
                shares = [
                    f"{text_of(name)} {percent(share)} %"
                    for name in content
                    if "top" in name and (share := record.result(encoder, part, name)) is not None
                ]
                rows[f"{title}, {part}"] = ", ".join(shares)
    return rows


def percent(share: float | None, none: str = "-") -> str:
    """Return a share as a percentage without its sign, or `none`."""
    return none if share is None else f"{100 * share:.2f}"
