"""Plant faults in real runs and print what came of each; ends non-zero if a goal is missed.

python -m tests.faults [--all] [--seed N] [--repeat N] [--only WORD ...]
"""

from __future__ import annotations

import argparse
import logging
import sys

from rich.console import Console

from tests.faults import FAULTS
from tests.faults.table import run


def main() -> int:
    """Return 0 if every goal was met each time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="the whole set; the quick one otherwise")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills")
    parser.add_argument("--repeat", type=int, default=1, help="with the seeds after that one too")
    parser.add_argument("--only", nargs="+", default=[""], help="faults with a word in their name")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # what the jobs print is in files of their own
    console = Console(width=None if sys.stdout.isatty() else 150)
    chosen = [fault for fault in FAULTS if any(word in fault.name for word in arguments.only)]
    good = [
        run(chosen, arguments.all, arguments.seed + number, console)
        for number in range(arguments.repeat)
    ]
    print(f"{sum(good)} of {len(good)} rounds met every goal")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
