"""The command `python -m moco_dist.report`, and `moco-report` after an installation."""

from __future__ import annotations

import sys

from moco_dist.report.run import run as main

if __name__ == "__main__":
    sys.exit(main())
