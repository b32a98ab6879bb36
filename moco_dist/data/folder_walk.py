"""The images below a folder, and what is left out of them and why."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from moco_dist.data import image_file
from moco_dist.data.image_file import EXTENSIONS, UNREAD
from moco_dist.errors import shown

# Folders that systems add to those of people: thumbnails, resource forks, deleted files.
JUNK = (
    *("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information"),
    *("lost+found", "__pycache__"),
)
# Why a folder is left out whose images are there all the same.
AGAIN = "links to folders that are read already"
# Files without a suffix of images whose first bytes are looked at.
LOOKED_INTO = 200


def ignored(name: str) -> bool:
    """Return whether a file or folder is no part of any data set: hidden, or made by a system."""
    return name.startswith(".") or name in JUNK


@dataclass
class _Others:
    """Files with the same suffix that are not read."""

    count: int
    first: str


@dataclass(frozen=True)
class Walk:
    """What was found below `root`."""

    root: Path
    # Images, those of a folder before those of its subfolders.
    files: list[Path] = field(default_factory=list)
    # All folders that were read.
    folders: list[str] = field(default_factory=list)
    # Paths left out for each reason.
    left_out: dict[str, list[str]] = field(default_factory=dict)
    # Files that look like images and are not read: by first-level folder ("" for none) and suffix.
    unread: dict[tuple[str, str], _Others] = field(default_factory=dict)

    @property
    def lasts(self) -> bool:
        """Whether the same would be found until a folder changes: nothing was out of reach."""
        return not self.left_out.keys() - {AGAIN}

    def sentences(self) -> list[str]:
        """Return a sentence for each reason why something was left out."""
        said = [
            f"{shown(self.root)}: left out {len(paths)} {reason}; the first is "
            f"{shown(min(paths), 4096)}"
            for reason, paths in self.left_out.items()
        ]
        if self.unread:
            first = shown(min(others.first for others in self.unread.values()), 4096)
            said.append(
                f"{shown(self.root)}: files that look like images are not read "
                f"({self.counted(self.unread)}; the first is {first}); save them as PNG or JPEG, "
                "with that suffix"
            )
        return said

    def counted(self, keys: Iterable[tuple[str, str]]) -> str:
        """Return how many files of which suffixes are not read."""
        counts: dict[str, int] = {}
        for key in keys:
            counts[key[1]] = counts.get(key[1], 0) + self.unread[key].count
        named = {suffix: shown(suffix) or "without a suffix" for suffix in counts}
        return ", ".join(f"{counts[suffix]:,} {named[suffix]}" for suffix in sorted(counts))


def walk(root: Path) -> Walk:
    """Return what is below `root`.

    Links are followed after all real folders, and only to folders not yet read and not above
    `root`, so that loops end and no image counts twice.
    """
    found = Walk(root)
    others: dict[tuple[str, str], _Others] = {}
    seen = _above(root)
    folders, links = [str(root)], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            stat = os.stat(folder)
            if (stat.st_dev, stat.st_ino) in seen:
                found.left_out.setdefault(AGAIN, []).append(folder)
                continue
            seen.add((stat.st_dev, stat.st_ino))
            found.folders.append(folder)
            with os.scandir(folder) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            closed = f"folders that can't be read ({error.strerror})"
            found.left_out.setdefault(closed, []).append(folder)
            continue
        for entry in entries:
            if ignored(entry.name):
                continue
            is_image = entry.name.lower().endswith(EXTENSIONS)
            # An entry raises for a link in a loop, so links use os.path; others need no stat.
            is_link = entry.is_symlink()
            if os.path.isdir(entry.path) if is_link else entry.is_dir():
                (links if is_link else folders).append(entry.path)
            elif is_link and not os.path.exists(entry.path):
                found.left_out.setdefault("links to nothing", []).append(entry.path)
            elif os.path.isfile(entry.path) if is_link else entry.is_file():
                if is_image:
                    found.files.append(Path(entry.path))
                else:
                    suffix = os.path.splitext(entry.name)[1].lower()
                    others.setdefault((folder, suffix), _Others(0, entry.path)).count += 1
            elif is_image:
                special = "special files, as pipes or devices"
                found.left_out.setdefault(special, []).append(entry.path)
    _sort_out(found, others)
    found.files.sort(key=lambda f: [(True, part) for part in f.parts[:-1]] + [(False, f.name)])
    return found


def _sort_out(found: Walk, others: dict[tuple[str, str], _Others]) -> None:
    """Add to `found` those of `others` that look like images, by suffix or by their first bytes."""
    looks = LOOKED_INTO
    for (folder, suffix), each in others.items():
        is_image = suffix in UNREAD
        if not is_image and looks:
            looks -= 1
            with suppress(OSError), open(each.first, "rb") as file:
                is_image = bool(image_file.kind(file.read(16)))
        if is_image:
            top = os.path.relpath(folder, found.root).split(os.sep)[0].removeprefix(".")
            known = found.unread.setdefault((top, suffix), _Others(0, each.first))
            known.count += each.count


def _above(folder: str | Path) -> set[tuple[int, int]]:
    """Return device and number of each folder above a folder."""
    found = set()
    for above in Path(os.path.realpath(folder)).parents:
        with suppress(OSError):
            stat = os.stat(above)
            found.add((stat.st_dev, stat.st_ino))
    return found


def holds(folder: str | Path, endings: tuple[str, ...] = EXTENSIONS, at_least: int = 1) -> bool:
    """Return whether at least so many files with one of the endings are below `folder`."""
    seen = _above(folder)
    folders, count = [str(folder)], 0
    while folders:
        at = folders.pop()
        try:
            stat = os.stat(at)
            if (stat.st_dev, stat.st_ino) in seen:
                continue
            seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(at) as entries:
                for entry in entries:
                    if ignored(entry.name):
                        continue
                    if entry.name.lower().endswith(endings) and os.path.isfile(entry.path):
                        count += 1
                        if count >= at_least:
                            return True
                    elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                        folders.append(entry.path)
        except OSError:
            continue
    return False
