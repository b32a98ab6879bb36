"""Lists of the images of a folder, of tar shards or of tables, with a few bytes per image.

A cached list is valid until the modification time of a folder, or the size or time of a tar,
changes. A file that is overwritten in place goes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moco_dist.data.class_names import Numbered
from moco_dist.data.image_file import Place
from moco_dist.data.tar_members import Member
from moco_dist.distributed import fingerprint
from moco_dist.errors import shown
from moco_dist.runs.status import written_whole

logger = logging.getLogger(__name__)

# Version of a cached list, which changes with its layout and with the rules of what it holds.
VERSION = 3
# A folder that changed so recently may change again without another modification time.
SETTLED_SECONDS = 10.0


@dataclass(frozen=True)
class ImageIndex:
    """Images in a fixed order: the location and class of each."""

    root: Path
    # All names concatenated, uint8, and the end of each, int64 (n,).
    names: Tensor
    ends: Tensor
    # Bytes of each image, and its class, -1 if unknown: int64 (n,).
    sizes: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    # Files below the root that hold many images (tars, tables, arrays), empty for a folder; and the
    # file and first byte of each image, int64 (n,), also empty for a folder.
    tars: tuple[str, ...]
    tar: Tensor
    offsets: Tensor
    # Sentences about what was left out, or has no class.
    warnings: tuple[str, ...] = ()
    # Some classes of the images that are none of those that were given.
    unknown: tuple[str, ...] = ()
    # The fingerprint of the list that a run began with, where files have changed since.
    begun: str = ""
    # Whether the images are rows of a table, which have numbers and no files of their own.
    rows: bool = False
    # What stands before the pixels of each image (`Place.head`).
    head: str = ""
    # Folders or tars that were read for the list, and with which it changes; none if it may change
    # without them.
    read: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, row: int) -> str:
        """Return the name of an image relative to the root, or in its tar."""
        start = int(self.ends[row - 1]) if row else 0
        return os.fsdecode(self.names[start : int(self.ends[row])].numpy().tobytes())

    def label(self, row: int) -> str:
        """Return the name of an image in the whole list, with that of its tar."""
        return f"{self.tars[int(self.tar[row])]}: {self.name(row)}" if self.tars else self.name(row)

    def all_labels(self) -> list[str]:
        """Return what `label` does for all rows."""
        blob, ends = self.names.numpy().tobytes(), self.ends.tolist()
        names = (os.fsdecode(blob[a:b]) for a, b in zip([0, *ends], ends, strict=False))
        if not self.tars:
            return list(names)
        return [f"{self.tars[n]}: {name}" for n, name in zip(self.tar.tolist(), names, strict=True)]

    def places(self, rows: Sequence[int]) -> list[Place]:
        """Return the locations of the images `rows`."""
        root = str(self.root)
        if not self.tars:
            return [Place(os.path.join(root, self.name(row))) for row in rows]
        tars = [os.path.join(root, tar) for tar in self.tars]
        spans = [(int(self.offsets[row]), int(self.sizes[row])) for row in rows]
        found = zip(rows, spans, strict=True)
        return [
            Place(tars[int(self.tar[row])], self.name(row), *span, self.head) for row, span in found
        ]

    def some(self, rows: Sequence[int]) -> ImageIndex:
        """Return the list of the images `rows` alone."""
        where = (self.tar, self.offsets) if self.tars else (torch.zeros_like(self.sizes),) * 2
        columns = [column[list(rows)].tolist() for column in (*where, self.sizes, self.labels)]
        spans = zip(*columns[:3], rows, strict=True)
        members = [Member(tar, self.name(row), first, size) for tar, first, size, row in spans]
        index = of_members(self.root, members, Numbered(columns[3], self.classes), self.tars)
        return replace(index, rows=self.rows, head=self.head)

    def all_places(self) -> list[Place]:
        """Return the locations of all images."""
        return self.places(range(len(self)))

    def fingerprint(self) -> str:
        """Return 16 hex digits of names, sizes and classes in order, without content and root."""
        if self.begun:
            return self.begun
        texts = (*self.classes, self.head) if self.head else self.classes
        classes = np.frombuffer(json.dumps(texts).encode(), np.uint8)
        content = self.names, self.ends, self.sizes, self.labels, torch.from_numpy(classes.copy())
        return fingerprint.of_tensors(*content)


def of_members(
    root: Path,
    members: Sequence[Member],
    named: Numbered,
    tars: tuple[str, ...] = (),
) -> ImageIndex:
    """Return the list of some images with their classes; without `tars` they are files."""
    names = [os.fsencode(member.name) for member in members]
    blob = torch.from_numpy(np.frombuffer(b"".join(names), np.uint8).copy())
    ends = torch.from_numpy(np.cumsum([len(name) for name in names], dtype=np.int64))
    in_tars = members if tars else []
    where = [m.tar for m in in_tars], [m.offset for m in in_tars]
    columns = [m.size for m in members], named.labels, *where
    sizes, labels, tar, offsets = (torch.tensor(each, dtype=torch.int64) for each in columns)
    index = ImageIndex(root, blob, ends, sizes, labels, named.classes, tars, tar, offsets)
    return replace(index, unknown=named.unknown)


def kept(cache: Path | None, read: Callable[..., ImageIndex], root: Path, *rest: Any) -> ImageIndex:
    """Return `read(root, *rest)`, from the cache if what was read for it hasn't changed."""
    if cache is None:
        return read(root, *rest)
    key = json.dumps([str(root.resolve()), rest, VERSION])
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
                        said, other = (tuple(json.loads(notes[k])) for k in ("warnings", "unknown"))
                        return replace(index, warnings=said, unknown=other)
                    logger.warning("%s: its content changed on disk; listing it again", path)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s: can't be read (%s); listing the images again", path, shown(error))
    began = time.time()
    index = read(root, *rest)
    states = _states(index.read)
    settled = all(changed + SETTLED_SECONDS < began for _, changed in states.values())
    if states and settled and len(states) == len(index.read):
        noted = {"seen": states, "classes": index.classes, "tars": index.tars}
        noted |= {"warnings": index.warnings, "unknown": index.unknown}
        texts = {name: json.dumps(note) for name, note in noted.items()}
        tensors = {name: part for name, part in vars(index).items() if isinstance(part, Tensor)}
        texts["fingerprint"] = index.fingerprint()
        keep(path, tensors, texts, "the list of the images")
    return index


def keep(path: Path, tensors: dict[str, Tensor], notes: dict[str, str], what: str) -> None:
    """Write tensors to the cache, with a warning if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            save_file(tensors, temporary, notes)
    except (OSError, SafetensorError) as error:
        reason, text = getattr(error, "strerror", None) or error, "%s: can't keep %s (%s)"
        logger.warning(f"{text}; choose data.cache=FOLDER", shown(path.parent), what, reason)


def _states(paths: Iterable[str]) -> dict[str, list[float]]:
    """Return size and modification time of the folders and files that exist."""
    states = {}
    for path in paths:
        with suppress(OSError):
            stat = os.stat(path)
            size = 0 if os.path.isdir(path) else stat.st_size
            states[path] = [size, stat.st_mtime_ns / 1e9]
    return states
