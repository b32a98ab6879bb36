"""Show how runs stand, from the files of their run directories, and write a page about them.

  python -m moco_dist.report runs/cifar10               one run; its page in runs/cifar10/report
  python -m moco_dist.report runs/cifar10 runs/other    several, side by side; in runs/report
  python -m moco_dist.report runs/cifar10 --output DIR  the page and its pictures in DIR
  python -m moco_dist.report runs/cifar10 --quick       without the encoder's features: seconds
  python -m moco_dist.report runs/cifar10 --text        what is printed alone, no files
  python -m moco_dist.report runs/cifar10 --follow      its course, until it is done

The columns: the last loss, the last and the best kNN accuracy on the validation images, and a
probe's top-1 on the test images, of the trained encoder and of the random one (control).
A run's probes, or a probe's pretraining, are on its page too. The runs may be going on, on this
machine or on another one that shares the disk; nothing of them is changed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from moco_dist.errors import ConfigError, MissingError, OutputError, UserError, shown
from moco_dist.report import files
from moco_dist.runs.partners import is_report, labels
from moco_dist.runs.record import Record, read, text_of
from moco_dist.tracking.follow import follow
from moco_dist.tracking.terminal import layout, loss

# Columns with numbers stand to the right.
COLUMNS = ("run", "kind", "state", "step", "loss", "kNN %", "best %", "test %", "control %")
WORDS = 3
# States that need no reason.
WELL = ("done", "running", "starting")


class Arguments(argparse.ArgumentParser):
    """A parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{shown(message)}; see --help")


def parsed(arguments: list[str]) -> argparse.Namespace:
    """Return the command line's runs and options."""
    parser = Arguments("moco_dist.report", add_help=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--output")
    for option in ("--follow", "--text", "--quick"):
        parser.add_argument(option, action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Print and write what the arguments ask for; return the exit state."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    asked = parsed(arguments)
    runs = [Path(run).expanduser() for run in asked.runs]
    if len(runs) > 1:
        runs = [run for run in runs if not is_report(run)]  # as runs/* brings it along
    if not runs:
        raise ConfigError("no run directory was given; give runs/NAME, one or several")
    if asked.follow:
        # A shell's background job ignores it, and nothing else ends the following of a run.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if len(runs) > 1:
            raise ConfigError(f"--follow shows one run and {len(runs)} were given; give one")
        follow(runs[0], Console())
        return 0
    records, missing = [], []
    for run in runs:
        try:
            records.append(read(run))
        except MissingError as error:
            missing.append(error)
    if records:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(table(records, width)))
        if len(runs) == 1:
            print("\n".join(["", *details(records[0])]))
        if not asked.text:
            write(records, asked.output, asked.quick)
    if missing:
        raise MissingError("\nerror: ".join(map(str, missing)))
    return 0


def write(records: list[Record], output: str | None, quick: bool) -> None:
    """Write the page and its pictures, and print where; there is none of folders without a run."""
    found = [record for record in records if record.state != "empty"]
    if not found:
        return
    print(flush=True)
    place = files.folder(found, output)
    page, pictures, size = files.write(found, place, quick, lambda text: print(text, flush=True))
    print(f"report: {shown(page)} ({size / 1e6:.1f} MB, {pictures} pictures, also as PNG)")


def table(records: list[Record], width: int | None) -> Iterator[str]:
    """Yield the lines of a table of runs, and below it why runs ended and their alarms.

    Where `width` is too small the name of a run stands on a line of its own.
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
    """Yield why a run ended, if that was otherwise than well, and its alarms."""
    if record.state not in WELL:
        status = record.status.get("exit_status")
        code = f" (exit state {status})" if isinstance(status, int) else ""
        nothing = {"empty": "nothing is there yet", "unknown": "no status.json tells how it stands"}
        reason = record.reason or nothing.get(record.state, "no reason was noted")
        yield f"{record.state}{code}: {reason}"
    for line in record.alarms:
        what = f"{text_of(line['alarm'])}: {text_of(line.get('text'))}"
        yield f"alarm at step {line['step']:,}, {what}"


def details(record: Record) -> Iterator[str]:
    """Yield what else is known of one run, a line each."""
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
    """Return the results of a run in words."""
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


def percent(share: float | None) -> str:
    """Return a share as a percentage, '-' for none."""
    return "-" if share is None else f"{100 * share:.2f}"


def run(arguments: list[str]) -> int:
    """Return the exit state of the command, with a sentence for what went wrong."""
    try:
        status = main(arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        print(f"error: can't be shown ({error.strerror or error}); free the disk", file=sys.stderr)
        return OutputError.exit_status
