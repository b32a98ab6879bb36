"""Show the state of runs from the files of their run directories, and write a page about them.

  python -m moco_dist.report runs/cifar10               one run; writes runs/cifar10/report
  python -m moco_dist.report runs/cifar10 runs/other    compare several runs; writes runs/report
  python -m moco_dist.report runs/cifar10 --output DIR  write the page and its pictures to DIR
  python -m moco_dist.report runs/cifar10 --quick       skip the encoder's features: takes seconds
  python -m moco_dist.report runs/cifar10 --text        only print; write no files
  python -m moco_dist.report runs/cifar10 --follow      show its progress until it ends

The columns are the last loss, the last and the best kNN accuracy on the validation images, and a
probe's top-1 accuracy on the test images, for the trained encoder and a random one (control).
For several runs, the keys in which they differ follow.
The page of a run includes its probes, and the page of a probe its pretraining. The runs may still
be running, on this machine or on another one that shares the disk; their files are not changed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console

from moco_dist.errors import ConfigError, MissingError, OutputError, UserError, escape_output, shown
from moco_dist.report.table import choices, details, table
from moco_dist.runs.partners import PAGE, is_report, with_partners
from moco_dist.runs.record import Record, read
from moco_dist.runs.status import replace
from moco_dist.tracking.follow import follow

if TYPE_CHECKING:
    from moco_dist.report.encoder import Look

# Most pretrainings whose encoders are loaded, which costs about half a minute each.
LOOKED_AT = 4


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{shown(message)}; see --help")


def main(arguments: list[str]) -> int:
    """Print and write what the arguments ask for; return the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--output")
    for option in ("--follow", "--text", "--quick"):
        parser.add_argument(option, action="store_true")
    asked = parser.parse_args(arguments)
    runs = [Path(run).expanduser() for run in asked.runs]
    if len(runs) > 1:
        runs = [run for run in runs if not is_report(run)]  # runs/* includes runs/report
    if not runs:
        raise ConfigError("no run directory was given; give one or several, such as runs/NAME")
    if asked.follow:
        # A shell makes background jobs ignore SIGINT, and nothing else ends --follow.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if len(runs) > 1:
            raise ConfigError(f"--follow shows one run, but {len(runs)} were given; give one")
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
        print("\n".join([*table(records, width), *choices(records, width)]))
        if len(runs) == 1:
            print("\n".join(["", *details(records[0])]))
        if not asked.text:
            write(records, asked.output, asked.quick)
    if missing:
        raise MissingError("\nerror: ".join(map(str, missing)))
    return 0


def write(records: Sequence[Record], output: str | None, quick: bool) -> None:
    """Write the page and each of its pictures as a PNG, and print the path of the page.

    `quick` loads no encoder and no data. Empty folders get no page. Raises OutputError, or
    ConfigError for an output that is a run.
    """
    found = [record for record in records if record.state != "empty"]
    if not found:
        return
    first = found[0].directory
    home = first if len(found) == 1 else first.resolve().parent
    place = home / "report" if output is None else Path(output).expanduser()
    if (place / "config.yaml").exists() or (place / "metrics.jsonl").exists():
        raise ConfigError(f"{shown(place)}: is a run directory; give --output with another folder")
    print(flush=True)
    from moco_dist.report.page import build  # imports matplotlib, which is slow

    runs = with_partners(found)
    text, pictures = build(runs, {} if quick else look_at(runs))
    content = text.encode(errors="backslashreplace")
    try:
        place.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            replace(place / f"{picture.name}.png", picture.light)
        replace(place / PAGE, content)
    except OSError as error:
        raise OutputError(
            f"{shown(place)}: the report can't be written there ({error.strerror or error}); give "
            "--output with a folder that you may write to, or --text to print the table only"
        ) from error
    size = f"{len(content) / 1e6:.1f} MB, {len(pictures)} pictures, also saved as PNG files"
    print(f"report: {shown(place / PAGE)} ({size})")


def look_at(runs: Sequence[Record]) -> dict[Path, Look | str]:
    """Return what is drawn of each pretraining's encoder, or why that is missing."""
    looks: dict[Path, Look | str] = {}
    for record in runs:
        if record.kind != "pretrain":
            continue
        if len(looks) >= LOOKED_AT:
            reason = (
                f"a page has them for at most {LOOKED_AT} runs; make a report of this run alone"
            )
            looks[record.directory] = reason
        elif not record.saved:
            looks[record.directory] = "the run has no checkpoint yet"
        else:
            print(f"features of {shown(record.directory)} ... (--quick skips them)", flush=True)
            from moco_dist.report.encoder import look  # imports torch, which is slow

            try:
                looks[record.directory] = look(record.directory)
            except UserError as error:
                looks[record.directory] = str(error)
            except (OSError, RuntimeError, MemoryError, ValueError) as error:  # strangers' files
                looks[record.directory] = shown(f"{type(error).__name__}: {error}")
    return looks


def run(arguments: list[str] | None = None) -> int:
    """Run the command, print a sentence if it fails, and return the exit status."""
    escape_output()
    try:
        status = main(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        reason = error.strerror or error
        print(f"error: the output can't be printed ({reason}); free the disk", file=sys.stderr)
        return OutputError.exit_status
