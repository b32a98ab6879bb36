"""Which runs a report covers: those asked for, and those that belong to them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from moco_dist.errors import MissingError, shown
from moco_dist.runs.record import Record, read, text_of

# The page's name; a folder with one and without a configuration holds a report and no run.
PAGE = "report.html"
# Neighbouring run directories that are searched for probes, and bytes of their config.yaml.
MOST_RUNS, MOST_BYTES = 2000, 2**16


def is_report(folder: Path) -> bool:
    """Return whether a folder holds a report of several runs."""
    return (folder / PAGE).is_file() and not (folder / "config.yaml").exists()


def with_partners(records: list[Record]) -> list[Record]:
    """Return the runs, each pretraining before its probes.

    A single run is joined by its partners: a pretraining by the probes in the same folder, a probe
    by its pretraining.
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
    """Yield the probes next to a pretraining, or the pretraining of a probe."""
    places = _probes_near(record) if record.kind == "pretrain" else encoder_places(record)
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
    """Return where a probe's pretraining may lie: at the configured path, or next to the probe.

    The path may name a checkpoint, and may be relative to an unknown folder.
    """
    source = Path(text_of(probe.config.get("encoder") or "")).expanduser()
    if source.match("checkpoints/step_*"):
        source = source.parent.parent
    if not source.name:
        return []
    with suppress(OSError, ValueError):
        if (source / "config.yaml").is_file():
            return [source]
    return [probe.directory.resolve().parent / source.name]


def _probes_near(record: Record) -> Iterator[Path]:
    """Yield the folders next to a pretraining whose configuration names an encoder like it."""
    own = record.directory.resolve()
    with suppress(OSError):
        for place in sorted(own.parent.iterdir())[:MOST_RUNS]:
            with suppress(OSError, ValueError):
                with (place / "config.yaml").open("rb") as file:
                    text = file.read(MOST_BYTES).decode()
                # YAML folds a long path with spaces into several lines.
                line = re.search(r"^encoder: (.*(?:\n .*)*)$", text, re.MULTILINE)
                if line and own.name in line[1]:
                    yield place


def labels(records: Iterable[Record]) -> list[str]:
    """Return a name for each run: its directory's, or the whole path if two share a name."""
    records = list(records)
    names = [record.directory.resolve().name for record in records]
    return [
        shown(record.directory if names.count(name) > 1 else name)
        for name, record in zip(names, records, strict=True)
    ]
