"""Which runs a report is about: those asked for, and those that belong to them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from moco_dist.errors import MissingError, shown
from moco_dist.runs.record import Record, read, text_of

# The page's name; a folder with one and without a configuration holds a report and no run.
PAGE = "report.html"
# Run directories beside a pretraining that are looked through for its probes.
MOST_BESIDE = 2000
# Bytes of a config.yaml that are searched for its encoder.
MAX_BYTES = 2**16


def is_report(folder: Path) -> bool:
    """Return whether a folder holds a report of several runs."""
    return (folder / PAGE).is_file() and not (folder / "config.yaml").exists()


def with_partners(records: list[Record]) -> list[Record]:
    """Return the runs, each pretraining before its probes, and what belongs to one run alone.

    To a pretraining belong the probes in the same folder, to a probe its pretraining; where several
    runs are asked for, they are meant and no others.
    """
    found = list({record.directory.resolve(): record for record in records}.values())
    if len(found) == 1:
        found += partners(found[0])
    ordered = []
    for record in found:
        if not any(encoder_run(record, other) for other in found):
            ordered += [record, *(other for other in found if encoder_run(other, record))]
    return ordered


def partners(record: Record) -> Iterator[Record]:
    """Yield the probes beside a pretraining, or the pretraining of a probe."""
    places = _probes_beside(record) if record.kind == "pretrain" else encoder_places(record)
    for place in places:
        with suppress(MissingError):
            other = read(place)
            if encoder_run(record, other) or encoder_run(other, record):
                yield other
                if record.kind == "probe":
                    return


def encoder_run(probe: Record, record: Record) -> bool:
    """Return whether `record` is the pretraining that `probe` measures."""
    if (probe.kind, record.kind) != ("probe", "pretrain"):
        return False
    own = record.directory.resolve()
    return any(place.resolve() == own for place in encoder_places(probe))


def encoder_places(probe: Record) -> list[Path]:
    """Return where a probe's pretraining may lie: at the path it was given, and beside the probe.

    The path may be that of a checkpoint, and relative to a folder that nobody noted.
    """
    source = Path(text_of(probe.config.get("encoder") or "")).expanduser()
    if source.name.startswith("step_"):
        source = source.parent.parent
    if not source.name:
        return []
    beside = probe.directory.resolve().parent / source.name
    with suppress(OSError, ValueError):
        if (source / "config.yaml").is_file():
            return [source]
    return [beside]


def _probes_beside(record: Record) -> Iterator[Path]:
    """Yield the folders beside a pretraining whose configuration names an encoder like it."""
    own = record.directory.resolve()
    with suppress(OSError):
        for place in sorted(own.parent.iterdir())[:MOST_BESIDE]:
            with suppress(OSError, ValueError):
                with (place / "config.yaml").open("rb") as file:
                    text = file.read(MAX_BYTES).decode()
                line = re.search(r"^encoder: (.*)$", text, re.MULTILINE)
                if line and own.name in line[1]:
                    yield place


def labels(records: Iterable[Record]) -> list[str]:
    """Return a name for each run: its directory's, or the whole path where two have the same."""
    records = list(records)
    names = [record.directory.resolve().name for record in records]
    return [
        shown(record.directory if names.count(name) > 1 else name)
        for name, record in zip(names, records, strict=True)
    ]
