"""The command `python -m moco_dist.doctor`, and `moco-doctor` after an installation."""

from __future__ import annotations

from moco_dist.doctor.run import main

if __name__ == "__main__":
    main()
