"""The files of a report: one HTML page, and each of its pictures as a PNG beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moco_dist.errors import ConfigError, OutputError, UserError, shown
from moco_dist.runs.partners import PAGE, with_partners
from moco_dist.runs.record import Record
from moco_dist.runs.status import replace

if TYPE_CHECKING:
    from moco_dist.report.encoder import Look

# Pretrainings whose encoders are looked at; a map of each more would take half a minute.
LOOKED_AT = 4


def folder(records: Sequence[Record], asked: str | None) -> Path:
    """Return where the report goes: as asked, into the one run, or beside the first of several.

    Raises ConfigError if a run is there.
    """
    first = records[0].directory
    default = first / "report" if len(records) == 1 else first.resolve().parent / "report"
    found = default if asked is None else Path(asked).expanduser()
    if (found / "config.yaml").exists() or (found / "metrics.jsonl").exists():
        raise ConfigError(f"{shown(found)}: is a run directory; give --output with another folder")
    return found


def write(
    records: Sequence[Record], place: Path, quick: bool, say: Callable[[str], None]
) -> tuple[Path, int, int]:
    """Write the report; return its page, the number of pictures and the page's bytes.

    `quick` leaves out what needs an encoder's checkpoint and the data. `say` is told what may take
    a while. Raises OutputError.
    """
    from moco_dist.report import page as report_page

    runs = with_partners(list(records))
    page, pictures = report_page.build(runs, {} if quick else look_at(runs, say))
    try:
        place.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            replace(place / f"{picture.name}.png", picture.light)
        content = page.encode(errors="backslashreplace")
        replace(place / PAGE, content)
    except OSError as error:
        raise OutputError(
            f"{shown(place)}: the report can't be written there ({error.strerror or error}); give "
            "--output with a folder of yours, or --text for the table alone"
        ) from error
    return place / PAGE, len(pictures), len(content)


def look_at(runs: Sequence[Record], say: Callable[[str], None]) -> dict[Path, Look | str]:
    """Return what each pretraining's encoder makes of images, or in words why it can't be shown."""
    looks: dict[Path, Look | str] = {}
    for record in runs:
        if record.kind != "pretrain":
            continue
        if len(looks) >= LOOKED_AT:
            looks[record.directory] = (
                f"the page has those of {LOOKED_AT} runs; give this run alone for its own"
            )
            continue
        if not record.checkpoints.steps:
            looks[record.directory] = "the run has no checkpoint yet"
            continue
        say(f"features of {shown(record.directory)} ... (--quick leaves them out)")
        looks[record.directory] = _look(record.directory)
    return looks


def _look(run: Path) -> Look | str:
    from moco_dist.report import encoder  # torch

    try:
        return encoder.look(run)
    except UserError as error:
        return str(error)
    except (OSError, RuntimeError, MemoryError, ValueError) as error:  # of files that are not ours
        return shown(f"{type(error).__name__}: {error}")
