"""Files of a streamed set that can't be read, and what stands in for them.

An unreadable file keeps its number, so that the order of the images and all random numbers stay
what they are. Its place in a batch, with the crop that was drawn for it, gets another image of its
class and part, drawn by seed, epoch, file and attempt until one can be read. That depends on which
files are bad and on nothing else: whichever process comes upon one, when, and whether anyone has
noted it before, all of them take the same image, also after a resume on other processes.

What was set aside stays so for the life of a run, even if the file is mended: SET_ASIDE in the run
directory lists it. Without data.skip_unreadable an unreadable file ends the run, with the state
after the last whole step saved, and the list names it: once it is mended or removed, the run goes
on (`run_lists.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from moco_dist.data.image_index import ImageIndex
from moco_dist.data.image_worker import GONE
from moco_dist.distributed import faults
from moco_dist.errors import DataError, output_errors, shown
from moco_dist.runs import record
from moco_dist.runs.status import replace

SET_ASIDE = "set_aside.json"
# Files that a warning names.
SHOWN = 5


@dataclass(frozen=True)
class Aside:
    """The files of a list, by row, that a run does without, and those that end it."""

    images: ImageIndex
    # Whether a file that can't be read is set aside, or ends the run.
    skips: bool
    # Why each row is set aside.
    rows: dict[int, str] = field(default_factory=dict)
    # Why each row ended a launch.
    named: dict[int, str] = field(default_factory=dict)
    # What came to the two since it was last taken over by all processes.
    fresh: dict[int, str] = field(default_factory=dict)

    def note(self, row: int, reason: str) -> bool:
        """Set a row aside and return whether that is allowed; otherwise DataError, in its time."""
        self.fresh[row] = reason
        if self.skips:
            self.rows[row] = reason
            return True
        self.named[row] = reason
        (place,) = self.images.places([row])
        what, fix = f"not a readable image ({reason})", "replace or remove this file"
        if reason == GONE:
            what, fix = "the file is gone", "put it back, leave it away and give the command again"
        sentence = f"{shown(place, 4096)}: {what}; {fix}, or give data.skip_unreadable=true"
        faults.refuse(DataError(sentence))
        return False

    def take_over(self, fresh: dict[int, str]) -> None:
        """Know what another process has found."""
        (self.rows if self.skips else self.named).update(fresh)

    def listed(self) -> list[dict[str, object]]:
        """Return what the run directory keeps."""
        both = ((self.named, False), (self.rows, True))
        return [
            {"row": row, "file": self.images.label(row), "reason": reason, "set_aside": aside}
            for rows, aside in both
            for row, reason in sorted(rows.items())
        ]

    def restore(self, entries: object) -> None:
        """Take over what `listed` returned, as far as it fits the list of images."""
        for entry in entries if isinstance(entries, list) else []:
            found = entry if isinstance(entry, dict) else {}
            row = found.get("row")
            if not isinstance(row, int) or not 0 <= row < len(self.images):
                continue
            if self.images.label(row) == found.get("file"):
                rows = self.rows if found.get("set_aside") else self.named
                rows[row] = str(found.get("reason"))

    def sentence(self, rows: Iterable[int]) -> str:
        """Return a sentence about some rows that are set aside."""
        rows = sorted(rows)
        places = zip(self.images.places(rows[:SHOWN]), rows, strict=False)
        first = ", ".join(f"{shown(place, 4096)} ({self.rows[row]})" for place, row in places)
        more = ", ..." if len(rows) > SHOWN else ""
        one = len(rows) == 1
        return (
            f"{len(rows)} unreadable file{'' if one else 's'} set aside: {first}{more}; other "
            f"images of {'its class take its place' if one else 'their classes take their places'}"
        )


def read(run: Path) -> dict[str, object]:
    """Return the entries in a run directory, by part; empty if there are none."""
    return record.read_object(run / SET_ASIDE)


def write(run: Path, parts: dict[str, Aside]) -> None:
    """Write the entries of a run."""
    with output_errors(run):
        content = {name: aside.listed() for name, aside in parts.items()}
        replace(run / SET_ASIDE, json.dumps(content, indent=1) + "\n")
