"""The command `python -m moco_dist.report`, and `moco-report` after an installation."""

from __future__ import annotations

import sys

from moco_dist.report.run import run


def main() -> None:
    """Run the command with the arguments of this process."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
