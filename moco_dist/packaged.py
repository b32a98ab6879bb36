"""Print the paths of the package's configurations, Accelerate files and job scripts.

  python -m moco_dist.packaged                        all of them
  python -m moco_dist.packaged launch/two_cpus.yaml   one, as a path for other commands

In a clone they are in configs, launch and slurm; `pip install` copies them into the package.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moco_dist.errors import MissingError, escape_output, shown

FOLDERS = ("configs", "launch", "slurm")


def root() -> Path:
    """Return the folder that holds `FOLDERS`."""
    package = Path(__file__).resolve().parent
    installed = package / "packaged_files"  # next to the package may be configs of another one
    return installed if installed.is_dir() else package.parent


def config(name: str) -> Path | None:
    """Return the package's configuration `name`, None if there is none.

    The name is pretrain/cifar10 or configs/pretrain/cifar10.yaml, in any working directory.
    """
    inside = f"configs/{name.removeprefix('configs/').removesuffix('.yaml')}.yaml"
    return root() / inside if inside in files() else None


def files() -> list[str]:
    """Return the names of all files, relative to `root`."""
    found = (path for folder in FOLDERS for path in (root() / folder).rglob("*"))
    return sorted(str(path.relative_to(root())) for path in found if path.is_file())


def run(arguments: list[str]) -> int:
    """Print the paths of the named files, or of all; return the exit status."""
    escape_output()
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    known = files()
    for name in arguments or known:
        if name not in known:
            error = MissingError(f"{shown(name)}: no such file; use one of {', '.join(known)}")
            print(f"error: {error}", file=sys.stderr)
            return error.exit_status
        print(root() / name)
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
