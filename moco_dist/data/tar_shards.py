"""Tar files of images in WebDataset's layout: KEY.jpg with KEY.cls or KEY.json.

github.com/webdataset/webdataset describes it. Only headers and labels are read here; images are
read later by their position in the file, in any order.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from moco_dist.data import image_folder, tar_members
from moco_dist.data.image_file import EXTENSIONS
from moco_dist.data.tar_members import Member
from moco_dist.errors import DataError, MissingError, shown


class Found(NamedTuple):
    """The images of some tars in order; without labels, `classes` is empty."""

    members: list[Member]
    labels: list[int]
    classes: tuple[str, ...]
    # Sentences about what was left out.
    warnings: tuple[str, ...] = ()


def parts(root: Path) -> tuple[Path, list[str], Path, list[str]]:
    """Return the folder and the names of the tars for training, and the same for testing.

    They are in the folders of `image_folder.parts`. Without DIR/train, tars of DIR are for testing
    if a word of the name is test, val or validation, as in imagenet-val-000000.tar. Raises
    MissingError if there is no tar for training.
    """
    if not os.path.isdir(root):
        raise MissingError(
            f"{shown(root)}: no such folder; give the folder of the tar files as data.root=DIR"
        )
    folder, test = image_folder.parts(root)
    if folder != root:
        train, found = _tars(folder), _tars(test) if test else []
    else:
        every = _tars(root)
        found = [n for n in every if {"test", "val", "validation"} & set(re.split(r"\W|_", n))]
        train = [name for name in every if name not in found]
    if not train:
        raise MissingError(
            f"{shown(folder)}: no tar files for training in this folder; data.name=shards needs "
            "DIR/*.tar, or DIR/train/*.tar"
        )
    return folder, train, test or root, found


def _tars(folder: Path) -> list[str]:
    return sorted(
        name for name in os.listdir(folder) if name.endswith(".tar") and not name.startswith(".")
    )


def read(root: Path, tars: list[str], labelled: bool, classes: tuple[str, ...] | None) -> Found:
    """Return the images in the tar files `tars` of `root`, in order.

    An image's class is in KEY.cls (a number or a name), or in KEY.json under "cls", "label" or
    "class"; without either it is the first folder of KEY. `classes`, if given, are the only ones
    allowed. Raises DataError for a damaged tar and MissingError for tars without images.
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
            f"that end in {', '.join(EXTENSIONS)}"
        )
    numbers = all(_number(label) for label in {*labels, *(classes or ())} if label is not None)
    # 007 and 7 are one class.
    given = [str(int(label)) if label is not None and numbers else label for label in labels]
    known = {label for label in given if label is not None}
    if len(known) < 2 and classes is None:
        return Found(members, [-1] * len(members), (), said)
    if classes is None:
        classes = tuple(sorted(known, key=int) if numbers else sorted(known))
    unknown = sorted(known - set(classes))
    if unknown:
        raise DataError(
            f"{shown(root)}: class '{shown(unknown[0])}' is not among the {len(classes)} classes "
            "of the training images; use the same classes in both"
        )
    place = {name: number for number, name in enumerate(classes)}
    return Found(members, [-1 if label is None else place[label] for label in given], classes, said)


def _number(label: str) -> bool:
    return re.fullmatch(r"[0-9]{1,6}", label) is not None
