"""What a fault is, and the table of what came of each."""

from __future__ import annotations

import random
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Outcome:
    """What came of planting a fault `tried` times; a missed goal is an AssertionError instead."""

    tried: int
    outcome: str
    # The most steps that were lost at once; None where there is nothing to lose.
    steps_lost: int | None = None


@dataclass(frozen=True)
class Fault:
    """A fault to plant: `plant(folder, times, random)` does it and checks what comes of it."""

    name: str
    # How often in the quick set, and in the whole one; 0 leaves it out.
    quick: int
    all: int
    plant: Callable[[Path, int, random.Random], Outcome]


def run(faults: list[Fault], everything: bool, seed: int, console: Console) -> bool:
    """Plant the faults, print the table, and return whether every goal was met."""
    table = Table(title=f"{'all faults' if everything else 'the quick set'}, seed {seed}")
    for column in ("fault", "tried", "outcome", "steps lost", "seconds"):
        table.add_column(column, justify="left" if column in ("fault", "outcome") else "right")
    good = True
    for fault in faults:
        times = fault.all if everything else fault.quick
        if not times:
            continue
        began = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                found = fault.plant(Path(folder), times, random.Random(f"{seed} {fault.name}"))
            lost = "-" if found.steps_lost is None else str(found.steps_lost)
            row = [str(found.tried), found.outcome, lost]
        except Exception:
            good = False
            console.print(f"[red]{fault.name}[/red]", highlight=False)
            console.print(traceback.format_exc(), markup=False, highlight=False)
            row = [str(times), "[red]MISSED[/red], see above", "?"]
        seconds = f"{time.monotonic() - began:.0f}"
        table.add_row(fault.name, *row, seconds)
        console.print(f"{fault.name}: {row[1]} ({seconds} s)", highlight=False, soft_wrap=True)
    console.print(table)
    return good
