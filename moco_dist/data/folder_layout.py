"""Where the parts of a data set are in a folder, as people and their tools lay it out."""

from __future__ import annotations

import os
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from moco_dist.data.folder_walk import holds, ignored
from moco_dist.data.image_file import EXTENSIONS, UNREAD
from moco_dist.data.parts import part_of
from moco_dist.errors import DataError, counted, shown

# One picture of so many may lie next to the folders that count.
STRAYS = 10


class Layout(NamedTuple):
    """The folders of the parts; without parts, `train` is `root` and there are no others."""

    # The folder that was looked into, at or below the one that was given.
    root: Path
    train: Path
    # Parts that may be tested on, those to be preferred first.
    tests: tuple[Path, ...]
    # Sentences about images that lie next to those folders.
    warnings: tuple[str, ...]


def find(given: Path, endings: tuple[str, ...] = EXTENSIONS) -> Layout:
    """Return the layout of a folder of files with one of the endings.

    A folder with nothing but one other folder stands for that one. Raises DataError if several
    folders are for training.
    """
    root = inside(given, endings)
    names = _folders(root)
    folders = [name for name in names if part_of(name) and _holds_any(root / name, endings)]
    trains = [name for name in folders if part_of(name) == "train"]
    train = "train" if "train" in trains else next(iter(trains), "")
    if len(trains) > 1 and train != "train":
        raise DataError(
            f"{shown(root)}: '{shown(trains[0])}' and '{shown(trains[1])}' are both for training, "
            f"by their names; move one of them away, or give data.root={shown(root / trains[0])}"
        )
    tests = [name for name in folders if train and part_of(name) != "train"]
    tests.sort(key=lambda name: (part_of(name) != "test", name not in ("test", "val"), name))
    said = _next_to(given, root if train else root.parent, endings)
    if folders and not train:
        said.append(
            f"{shown(root)}: trains on all folders, also on '{shown(folders[0])}', because none is "
            "called train"
        )
    others = [name for name in names if train and name not in (train, *tests)]
    if others := [shown(name) for name in others if _holds_any(root / name, endings)]:
        listed = f"{', '.join(others[:5])}{', ...' if len(others) > 5 else ''}"
        said.append(
            f"{shown(root)}: trains on '{shown(train)}' alone; left aside "
            f"{counted(len(others), 'other folder')}: {listed}"
        )
    return Layout(root, root / train, tuple(root / name for name in tests), tuple(said))


def _next_to(given: Path, last: Path, endings: tuple[str, ...]) -> list[str]:
    """Return a sentence for each folder from `given` down to `last` that has files itself."""
    levels = [at for at in (last, *last.parents) if at.is_relative_to(given)]
    counts = [(at, _files(at, endings)) for at in levels]
    kind = "image" if endings == EXTENSIONS else endings[0].removeprefix(".")
    return [
        f"{shown(at)}: left aside {counted(count, kind)} next to the folder that is read"
        for at, count in counts
        if count
    ]


def only(folder: Path) -> Path:
    """Return the only subfolder with images if it isn't a part and has no image next to it.

    Otherwise return the folder itself.
    """
    filled = [name for name in _folders(folder) if holds(folder / name)]
    alone = len(filled) == 1 and part_of(filled[0]) != "train" and not _files(folder, EXTENSIONS)
    return folder / filled[0] if alone else folder


def inside(
    given: Path, endings: tuple[str, ...] = EXTENSIONS, classes: Collection[str] | None = None
) -> Path:
    """Return the folder with the parts or classes, at `given` or below.

    As long as a folder holds nothing but one other folder (and files that are no images, or a few
    images), that one is looked into. Where neither parts nor several folders are found there,
    `given` is returned. With `classes`, `given` is a part: names of parts don't count within it,
    and a folder with the name of a class is one.
    """
    at, seen = given, set[Path]()
    while (real := Path(os.path.realpath(at))) not in seen:
        seen.add(real)
        names = _folders(at)
        trains = (name for name in names if classes is None and part_of(name) == "train")
        if any(_holds_any(at / name, endings) for name in trains):
            return at
        if endings != EXTENSIONS and _files(at, endings):
            return at  # tars, which have no folders of classes
        filled = list(islice((name for name in names if holds(at / name, endings)), 2))
        if len(filled) != 1:
            return at if filled and endings == EXTENSIONS else given
        if filled[0] in (classes or ()):
            return at
        if not holds(at / filled[0], endings, _files(at, endings) * (STRAYS - 1)):
            return given
        at = at / filled[0]
    return given


def _holds_any(part: Path, endings: tuple[str, ...]) -> bool:
    """Return whether a part has files with one of the endings, or images that are not read."""
    return holds(part, (*endings, *UNREAD) if endings == EXTENSIONS else endings)


def _folders(folder: Path) -> list[str]:
    """Return the names of the subfolders, in order, without hidden ones and links back up."""
    above = Path(os.path.realpath(folder))
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if not ignored(entry.name)
                and (_leads_down(entry, above) if entry.is_symlink() else entry.is_dir())
            )
    except OSError:
        return []


def _leads_down(link: os.DirEntry[str], above: Path) -> bool:
    """Return whether a link is to a folder other than `above` and those that hold it."""
    return os.path.isdir(link.path) and not above.is_relative_to(os.path.realpath(link.path))


def _files(folder: Path, endings: tuple[str, ...]) -> int:
    """Return how many files with one of the endings are in a folder itself."""
    try:
        names = os.listdir(folder)
    except OSError:
        return 0
    return sum(
        name.lower().endswith(endings) and not ignored(name) and os.path.isfile(folder / name)
        for name in names
    )
