"""The command `python -m moco_dist.doctor`, and `moco-doctor` after an installation."""

from __future__ import annotations

import sys

from moco_dist.doctor import run


def main() -> None:
    """Run the command with the arguments of this process."""
    run.main(sys.argv[1:])


if __name__ == "__main__":
    main()
