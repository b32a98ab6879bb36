"""Tar files of images in WebDataset's layout: KEY.jpg with KEY.cls or KEY.json.

github.com/webdataset/webdataset describes it. Only headers and labels are read here; images are
read later by their position in the file, in any order.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from moco_dist.data import class_names, folder_layout, image_index, tar_members
from moco_dist.data.folder_walk import ignored
from moco_dist.data.image_file import EXTENSIONS
from moco_dist.data.image_index import ImageIndex
from moco_dist.data.parts import part_of
from moco_dist.data.tar_members import Member
from moco_dist.errors import MissingError, counted, shown

# Endings of tars that are compressed.
COMPRESSED = (".tgz", ".tbz2", ".txz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


class Tars(NamedTuple):
    """The tars of a part: their folder and names."""

    folder: Path
    names: list[str]


def parts(given: Path, ending: str = ".tar") -> tuple[Tars, list[Tars], tuple[str, ...]]:
    """Return the tars for training, those of each part that may be tested on, and warnings.

    The parts are folders as in `folder_layout.find`, or words in the names of tars as in
    imagenet-val-000000.tar, where all others are for training. Of those to test on, the first is
    to be preferred. Files with another `ending` are shared out in the same way. Raises MissingError
    if there is no file for training.
    """
    if not os.path.isdir(given):
        raise MissingError(
            f"{shown(given)}: no such folder; give the folder of the {ending[1:]} files as "
            "data.root=DIR"
        )
    layout = folder_layout.find(given, (ending,))
    if layout.train != layout.root:
        train = Tars(layout.train, _tars(layout.train, (ending,)))
        tests = [Tars(folder, _tars(folder, (ending,))) for folder in layout.tests]
    else:
        of: dict[str, list[str]] = {"train": [], "test": [], "validation": []}
        for name in _tars(layout.root, (ending,)):
            of[part_of(name, anywhere=True) or "train"].append(name)
        first, *others = (Tars(layout.root, names) for names in of.values())
        train, tests = first, others
    said = []
    if ending == ".tar" and (compressed := _tars(train.folder, COMPRESSED)):
        said.append(
            f"{shown(train.folder)}: left out {counted(len(compressed), 'compressed tar')}, which "
            f"can't be read at any place; the first is {shown(compressed[0])}; decompress them"
        )
    if not train.names:
        raise MissingError(
            f"{shown(train.folder)}: no {ending[1:]} files for training in this folder; data.root "
            f"needs DIR/*{ending}, or DIR/train/*{ending}{'; ' if said else ''}{'; '.join(said)}"
        )
    return train, [part for part in tests if part.names], (*layout.warnings, *said)


def _tars(folder: Path, endings: tuple[str, ...]) -> list[str]:
    names = (name for name in os.listdir(folder) if not ignored(name))
    return sorted(name for name in names if name.lower().endswith(endings))


def _first_folder(member: Member) -> str | None:
    folder, slash, _ = tar_members.split(member.name).key.partition("/")
    return folder if slash else None


def read(
    root: Path, tars: list[str], labelled: bool, classes: tuple[str, ...] | None
) -> ImageIndex:
    """Return the images in the tar files `tars` of `root`, in order.

    An image's class is in KEY.cls (a number or a name), or in KEY.json under "cls", "label" or
    "class"; without either it is the first folder of KEY, if no image has a label or some have that
    one. With `classes`, images of others have no class. Raises DataError for a damaged tar and
    MissingError for tars without images.
    """
    notes = tar_members.Notes()
    found = [
        image
        for number, tar in enumerate(tars)
        for image in tar_members.read(root / tar, number, labelled, notes)
    ]
    said = notes.sentences(root)
    members, labels = [member for member, _ in found], [label for _, label in found]
    if not members:
        raise MissingError(
            f"{shown(root)}: no images in {len(tars)} tar files; data.name=shards needs members "
            f"that end in {', '.join(EXTENSIONS)}{'; ' if said else ''}{'; '.join(said)}"
        )
    if labelled:
        folders = [_first_folder(member) for member in members]
        bare = [number for number, label in enumerate(labels) if label is None]
        if len(bare) == len(labels) or {folders[number] for number in bare} <= {*labels}:
            pairs = zip(labels, folders, strict=True)
            labels = [folder if label is None else label for label, folder in pairs]
        elif any(folders[number] for number in bare):
            said += (
                f"{shown(root)}: {len(bare):,} of {len(labels):,} images have no label in their "
                f"tar, as others have, and no class; the first is {shown(members[bare[0]].name)}",
            )
    named = class_names.numbered(labels, classes)
    index = image_index.of_members(root, members, named, tuple(tars))
    return replace(index, warnings=said, read=tuple(str(root / tar) for tar in tars))
