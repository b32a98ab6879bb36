"""Print where the configurations, Accelerate files and job scripts of the package are.

  python -m moco_dist.packaged                        all of them
  python -m moco_dist.packaged launch/two_cpus.yaml   one, as a path for other commands

In a clone they are its folders configs, launch and slurm; `pip install` puts them into the package.
"""

from __future__ import annotations

import sys
from pathlib import Path

from moco_dist.errors import MissingError, UserError, shown

FOLDERS = ("configs", "launch", "slurm")


def root() -> Path:
    """Return the folder that holds `FOLDERS`."""
    package = Path(__file__).resolve().parent
    clone = package.parent
    return clone if (clone / "configs" / "pretrain").is_dir() else package / "packaged_files"


def config(name: str) -> Path | None:
    """Return the project's own configuration that `name` means, None if there is none.

    As pretrain/cifar10 or configs/pretrain/cifar10.yaml, from any folder.
    """
    inside = name.removeprefix("configs/").removesuffix(".yaml")
    kind, slash, stem = inside.partition("/")
    if not slash or kind not in ("pretrain", "probe") or not stem or "/" in stem:
        return None
    path = root() / "configs" / kind / f"{stem}.yaml"
    return path if path.is_file() else None


def files() -> list[str]:
    """Return the names of all of them, below `root`."""
    found = (path for folder in FOLDERS for path in (root() / folder).rglob("*"))
    return sorted(str(path.relative_to(root())) for path in found if path.is_file())


def main(arguments: list[str]) -> int:
    """Print what the arguments name, or everything; return the exit status."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    known = files()
    for name in arguments or known:
        if name not in known:
            raise MissingError(
                f"{shown(name)}: no such file in the package; it has {', '.join(known)}"
            )
        print(root() / name)
    return 0


def run(arguments: list[str]) -> int:
    """Run the command; return its exit status, with a sentence on stderr for what went wrong."""
    try:
        return main(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
