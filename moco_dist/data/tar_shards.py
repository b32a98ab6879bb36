"""Tar files of images in WebDataset's layout: KEY.jpg with KEY.cls or KEY.json.

github.com/webdataset/webdataset describes it. Only headers and labels are read here; images are
read later by their position in the file, in any order.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from moco_dist.data import folder_layout
from moco_dist.data.image_file import EXTENSIONS
from moco_dist.data.parts import part_of
from moco_dist.errors import DataError, MissingError, shown

# Keys of a sample's class in its .json, in order of preference.
JSON_KEYS = ("cls", "label", "class")
# Files that are longer hold no label.
MAX_LABEL_BYTES = 2**20


class Member(NamedTuple):
    """An image in a tar: the number of the tar, its name there, its first byte and its size."""

    tar: int
    name: str
    offset: int
    size: int


class Found(NamedTuple):
    """The images of some tars in order; without labels, `classes` is empty."""

    members: list[Member]
    labels: list[int]
    classes: tuple[str, ...]
    # Classes of images that are none of those that were given.
    unknown: tuple[str, ...] = ()


class Tars(NamedTuple):
    """The tars of a part: their folder and names."""

    folder: Path
    names: list[str]


def parts(given: Path) -> tuple[Tars, list[Tars], tuple[str, ...]]:
    """Return the tars for training, those of each part that may be tested on, and warnings.

    The parts are folders as in `folder_layout.find`, or words in the names of tars as in
    imagenet-val-000000.tar, where all others are for training. Of those to test on, the first is
    to be preferred. Raises MissingError if there is no tar for training.
    """
    if not os.path.isdir(given):
        raise MissingError(
            f"{shown(given)}: no such folder; give the folder of the tar files as data.root=DIR"
        )
    layout = folder_layout.find(given, (".tar",))
    if layout.train != layout.root:
        train = Tars(layout.train, _tars(layout.train))
        tests = [Tars(folder, _tars(folder)) for folder in layout.tests]
    else:
        of: dict[str, list[str]] = {"train": [], "test": [], "validation": []}
        for name in _tars(layout.root):
            of[part_of(name, anywhere=True) or "train"].append(name)
        first, *others = (Tars(layout.root, names) for names in of.values())
        train, tests = first, others
    if not train.names:
        raise MissingError(
            f"{shown(train.folder)}: no tar files for training in this folder; data.name=shards "
            "needs DIR/*.tar, or DIR/train/*.tar"
        )
    return train, [part for part in tests if part.names], layout.warnings


def _tars(folder: Path) -> list[str]:
    return sorted(
        name for name in os.listdir(folder) if name.endswith(".tar") and not name.startswith(".")
    )


def read(root: Path, tars: list[str], labelled: bool, classes: tuple[str, ...] | None) -> Found:
    """Return the images in the tar files `tars` of `root`, in order.

    An image's class is in KEY.cls (a number or a name), or in KEY.json under "cls", "label" or
    "class"; without either it is the first folder of KEY. With `classes`, images of others have no
    class. Raises DataError for a damaged tar and MissingError for tars without images.
    """
    found = [
        image for number, tar in enumerate(tars) for image in _images(root / tar, number, labelled)
    ]
    members, given = [member for member, _ in found], [label for _, label in found]
    if not members:
        raise MissingError(
            f"{shown(root)}: no images in {len(tars)} tar files; data.name=shards needs members "
            f"that end in {', '.join(EXTENSIONS)}"
        )
    known = {label for label in given if label is not None}
    if len(known) < 2 and classes is None:
        return Found(members, [-1] * len(members), ())
    if classes is None:
        numbers = all(re.fullmatch(r"\d{1,6}", label) for label in known)
        # Numbered classes start at 0, and some may have no image.
        classes = tuple(map(str, range(max(map(int, known)) + 1)) if numbers else sorted(known))
    unknown = sorted(known - set(classes))
    place = {name: number for number, name in enumerate(classes)}
    labels = [place.get(label or "", -1) for label in given]
    return Found(members, labels, classes, tuple(unknown))


def _images(path: Path, number: int, labelled: bool) -> Iterator[tuple[Member, str | None]]:
    """Yield the images of a tar with their labels; of images with the same key, the first."""
    images: dict[str, Member] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            end = os.path.getsize(path)
            for member in tar:
                key, extension = _split(member.name)
                if not member.isreg() or os.path.basename(key).startswith("."):
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"it ends within {shown(member.name)}")
                if extension in EXTENSIONS and key not in images:
                    images[key] = Member(number, member.name, member.offset_data, member.size)
                elif labelled and extension in (".cls", ".json") and member.size < MAX_LABEL_BYTES:
                    file = tar.extractfile(member)
                    label = _label(extension, file.read() if file else b"", path, member.name)
                    if label is not None and (extension == ".cls" or key not in labels):
                        labels[key] = label
                tar.members = []  # type: ignore[attr-defined]  # or it would keep all of them
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{shown(path, 4096)}: not a readable tar ({shown(error)}); data.name=shards needs "
            "complete tar files that are not compressed"
        ) from error
    for key, image in images.items():
        folder = key.partition("/")[0] if "/" in key else None
        yield image, labels.get(key, folder) if labelled else None


def _split(name: str) -> tuple[str, str]:
    """Return key and extension, which starts at the first dot as in WebDataset."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    key, dot, extension = file.partition(".")
    return folder + slash + key, (dot + extension).lower()


def _label(extension: str, content: bytes, path: Path, name: str) -> str | None:
    try:
        text = content.decode().strip()
        if extension == ".cls":
            return text or None
        found = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{shown(path, 4096)}: {shown(name)} is no label ({shown(error)}); make the tar again, "
            "or give data.labels=none"
        ) from error
    fields = found if isinstance(found, dict) else {}
    label = next((fields[key] for key in JSON_KEYS if key in fields), None)
    return str(label) if isinstance(label, int | str) else None
