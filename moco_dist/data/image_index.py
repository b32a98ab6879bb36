"""Lists of the images of a folder or of tar shards: made once, kept in the cache, a few bytes each.

A list is kept until the modification time of one of its folders changes, or the size or time of one
of its tars. A file that is overwritten in place goes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moco_dist.data import image_folder, tar_shards
from moco_dist.data.image_file import Place
from moco_dist.distributed import fingerprint
from moco_dist.errors import DataError, shown
from moco_dist.runs.status import written_whole

logger = logging.getLogger(__name__)

# Of the layout of a kept list.
VERSION = 1
# A folder that was changed so shortly before it was read may change again at the same time.
SETTLED_SECONDS = 10.0


@dataclass(frozen=True)
class ImageIndex:
    """Images in a fixed order: where the bytes of each lie, and its class."""

    root: Path
    # All names one after the other, uint8, and where each ends, int64 (n,).
    names: Tensor
    ends: Tensor
    # Bytes of each image, and its class, -1 if unknown: int64 (n,).
    sizes: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    # Tar files below the root, none where each image is a file of its own; which of them holds
    # each image, and from which byte on: int64 (n,).
    tars: tuple[str, ...]
    tar: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, row: int) -> str:
        """Return the name of an image, below the root or in its tar."""
        start = int(self.ends[row - 1]) if row else 0
        return os.fsdecode(self.names[start : int(self.ends[row])].numpy().tobytes())

    def places(self, rows: Sequence[int]) -> list[Place]:
        """Return where the bytes of the images `rows` lie."""
        root = str(self.root)
        if not self.tars:
            return [Place(os.path.join(root, self.name(row))) for row in rows]
        return [
            Place(
                os.path.join(root, self.tars[int(self.tar[row])]),
                self.name(row),
                int(self.offsets[row]),
                int(self.sizes[row]),
            )
            for row in rows
        ]

    def all_places(self) -> list[Place]:
        """Return where the bytes of all images lie."""
        return self.places(range(len(self)))

    def fingerprint(self) -> str:
        """Return 16 hex digits of names, sizes and classes, in order; not of the images' content.

        They don't depend on where the root is, nor on the names of the tars.
        """
        classes = np.frombuffer(json.dumps(self.classes).encode(), np.uint8)
        content = self.names, self.ends, self.sizes, self.labels, torch.from_numpy(classes.copy())
        return fingerprint.of_tensors(*content)


def of_folder(
    root: Path, labelled: bool, cache: Path, classes: tuple[str, ...] | None = None
) -> ImageIndex:
    """Return the images below `root`, as `image_folder.scan` finds them."""

    def make() -> tuple[ImageIndex, list[str]]:
        listing = image_folder.scan(root, labelled, classes)
        try:
            sizes = [os.stat(file).st_size for file in listing.files]
        except OSError as error:
            raise DataError(
                f"{shown(error.filename, 4096)}: gone since the folder was read "
                f"({error.strerror}); start again when nothing changes the folder"
            ) from error
        names = [str(file.relative_to(root)) for file in listing.files]
        index = _index(root, names, sizes, listing.labels, listing.classes)
        return index, list(listing.folders)

    return _kept(root, ["folder", labelled, classes], cache, make)


def of_shards(
    root: Path,
    tars: list[str],
    labelled: bool,
    cache: Path,
    classes: tuple[str, ...] | None = None,
) -> ImageIndex:
    """Return the images in the tar files `tars` of `root`, as `tar_shards.read` finds them."""

    def make() -> tuple[ImageIndex, list[str]]:
        found = tar_shards.read(root, tars, labelled, classes)
        members = found.members
        names, sizes = [m.name for m in members], [m.size for m in members]
        index = _index(
            root,
            names,
            sizes,
            found.labels,
            found.classes,
            tuple(tars),
            [m.tar for m in members],
            [m.offset for m in members],
        )
        return index, [str(root / tar) for tar in tars]

    return _kept(root, ["shards", tars, labelled, classes], cache, make)


def _index(
    root: Path,
    names: Iterable[str],
    sizes: list[int],
    labels: list[int],
    classes: tuple[str, ...],
    tars: tuple[str, ...] = (),
    tar: Sequence[int] = (),
    offsets: Sequence[int] = (),
) -> ImageIndex:
    encoded = [os.fsencode(name) for name in names]
    blob = np.frombuffer(b"".join(encoded), np.uint8).copy()
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    size, label, which, offset = (
        torch.tensor(each, dtype=torch.int64) for each in (sizes, labels, tar, offsets)
    )
    return ImageIndex(
        root,
        torch.from_numpy(blob),
        torch.from_numpy(ends),
        size,
        label,
        classes,
        tars,
        which,
        offset,
    )


def _kept(
    root: Path, kind: object, cache: Path, make: Callable[[], tuple[ImageIndex, list[str]]]
) -> ImageIndex:
    """Return what `make` gives, from the cache if what it has read is as it was."""
    key = json.dumps([str(root.resolve()), kind, VERSION])
    path = cache / f"list_{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    if os.path.isfile(path):
        try:
            with safe_open(path, framework="pt") as file:
                notes = file.metadata()
                if _states(list(json.loads(notes["seen"]))) == json.loads(notes["seen"]):
                    classes, tars = json.loads(notes["classes"]), json.loads(notes["tars"])
                    parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                    index = ImageIndex(root, classes=tuple(classes), tars=tuple(tars), **parts)
                    if index.fingerprint() == notes["fingerprint"]:
                        return index
                    logger.warning("%s: its content changed on disk; listing it again", path)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s: can't be read (%s); listing the images again", path, shown(error))
    began = time.time()
    index, seen = make()
    states = _states(seen)
    if len(states) == len(seen) and all(t + SETTLED_SECONDS < began for _, t in states.values()):
        _keep(index, states, path)
    return index


def _states(paths: Iterable[str]) -> dict[str, list[float]]:
    """Return size and time of change of folders and files; those that are gone are left out."""
    states = {}
    for path in paths:
        with suppress(OSError):
            stat = os.stat(path)
            size = 0 if os.path.isdir(path) else stat.st_size
            states[path] = [size, stat.st_mtime_ns / 1e9]
    return states


def _keep(index: ImageIndex, states: dict[str, list[float]], path: Path) -> None:
    notes = {
        "seen": json.dumps(states),
        "classes": json.dumps(index.classes),
        "tars": json.dumps(index.tars),
        "fingerprint": index.fingerprint(),
    }
    names = ("names", "ends", "sizes", "labels", "tar", "offsets")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            save_file({name: getattr(index, name) for name in names}, temporary, notes)
    except (OSError, SafetensorError) as error:
        logger.warning(
            "%s: can't keep the list of the images (%s); the next start lists them again",
            shown(path.parent),
            getattr(error, "strerror", None) or error,
        )
