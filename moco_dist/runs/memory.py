"""How much memory this process can still have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

# The files of a control group, in versions 2 and 1: its limit, its use, and what of the use the
# kernel gives back before it refuses memory (the cache of files), in memory.stat.
_FILES = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        *("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("total_inactive_file", "total_active_file"),
    ),
)


def available(
    groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """Return the bytes that can be had without swapping: of the machine, and of its containers.

    The cache of files counts as available, as in MemAvailable of /proc/meminfo: on a machine that
    reads data it fills nearly all memory, and makes room at once. `groups` is where the control
    groups of containers and Slurm jobs are, and `membership` names those of this process.
    """
    return min([int(psutil.virtual_memory().available), *_left(groups, membership)])


def _left(groups: Path, membership: Path) -> Iterator[int]:
    """Yield what each limit of a control group around this process leaves."""
    lines: list[str] = []
    with suppress(OSError):
        lines = membership.read_text().splitlines()
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = groups / controllers
        # A container sees its own group as the top, whatever its name is outside.
        inner = top / name.strip("/")
        for folder in {top, inner, *(each for each in inner.parents if each.is_relative_to(top))}:
            for limit, used, cached in _FILES:
                with suppress(OSError, ValueError):  # no such file, or no limit: "max"
                    most = int((folder / limit).read_text())
                    rows = (row.split() for row in (folder / "memory.stat").read_text().split("\n"))
                    stat = {row[0]: int(row[1]) for row in rows if len(row) == 2}
                    given_back = sum(stat.get(key, 0) for key in cached)
                    yield max(0, most - int((folder / used).read_text()) + given_back)
