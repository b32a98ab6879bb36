"""The command `python -m moco_dist.bench`, and `moco-bench` after an installation."""

from __future__ import annotations

from moco_dist.bench.run import main

if __name__ == "__main__":
    main()
