"""The command `python -m moco_dist.bench`, and `moco-bench` after an installation."""

from __future__ import annotations

import sys

from moco_dist.bench import run


def main() -> None:
    """Run the command with the arguments of this process."""
    run.main(sys.argv[1:])


if __name__ == "__main__":
    main()
