"""Arrays of images of 8 bits, in an .npz file, a folder of .npy files, or one .npy file.

The pixels of an image lie in one piece in a file of the layout (N, H, W) or (N, H, W, 3), so that
each is read as a Netpbm file whose header is put before it. Arrays of other layouts, and those in
an .npz, are written once to the cache as such a file, as archives are unpacked.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moco_dist.config.recipe import DataConfig
from moco_dist.data import class_names, image_index
from moco_dist.data.image_index import ImageIndex
from moco_dist.data.parts import Part, part_of, require_one
from moco_dist.data.tar_members import Member
from moco_dist.errors import ConfigError, DataError, MissingError, OutputError, shown
from moco_dist.runs.status import written_whole

# Words in the names of arrays of images and of labels: x_train, test_labels, y.
IMAGES = {"x", "image", "images", "img", "imgs", "data", "pixels"}
LABELS = {"y", "label", "labels", "target", "targets"}
# What numpy raises for a file that it can't read.
FAULTS = (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error)


class Pair(NamedTuple):
    """The names of a part's arrays; `labels` is empty if there are none."""

    images: str
    labels: str


class Arrays:
    """The arrays of a data set, by name."""

    def __init__(self, config: DataConfig, cache: Path) -> None:
        """Look at data.root; MissingError if it is not there, DataError if it can't be read."""
        self.config, self.cache = config, cache
        self.root = Path(os.path.expanduser(config.root))
        # The file of each array.
        self.names: dict[str, Path] = {}
        self._packed = self.root.is_file() and self.root.suffix != ".npy"
        if self.root.is_dir():
            self.names = {file.stem: file for file in sorted(self.root.glob("*.npy"))}
        elif self._packed:
            try:
                with self.root.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                    self.names = dict.fromkeys(file.files, self.root)
            except FAULTS as error:
                raise self._unreadable("this file", error) from error
        elif self.root.is_file():
            self.names = {"images": self.root}
        if not self.names:
            raise MissingError(
                f"data.root={shown(self.root)}: no arrays there; give an .npz file, a folder of "
                ".npy files, or one .npy file"
            )

    def parts(self) -> dict[Part, Pair]:
        """Return the arrays of each part that has images; ConfigError if they are not clear."""
        found: dict[tuple[Part, str], str] = {}
        for name in self.names:
            words = set(re.findall(r"[^\W\d_]+", name.casefold()))
            kind = "labels" if words & LABELS else "images" if words & IMAGES else ""
            if name in (self.config.image_column, self.config.label_column):
                kind = "images" if name == self.config.image_column else "labels"
            part = part_of(name, anywhere=True) or "train"
            named = {"images": self.config.image_column, "labels": self.config.label_column}
            if not kind or (part == "train" and named[kind] not in ("", name)):
                continue
            if (other := found.setdefault((part, kind), name)) != name:
                raise ConfigError(
                    f"data.root={shown(self.root)}: {shown(other)} and {shown(name)} are both the "
                    f"{kind} for {part}, by their names; choose by "
                    f"data.{kind.removesuffix('s')}_column, or name one otherwise"
                )
        for key, name in (("image", self.config.image_column), ("label", self.config.label_column)):
            require_one(f"{key}_column", name, "array", self.root, self.names)
        if ("train", "images") not in found:
            raise ConfigError(
                f"data.root={shown(self.root)}: which of its arrays "
                f"{', '.join(map(shown, self.names))} are the images for training is not clear; "
                "name them x_train or images, or give data.image_column"
            )
        labels = {} if self.config.labels == "none" else found
        return {
            part: Pair(name, labels.get((part, "labels"), ""))
            for (part, kind), name in found.items()
            if kind == "images"
        }

    def images(self, pair: Pair, classes: tuple[str, ...] | None = None) -> ImageIndex:
        """Return the images of a part in their order, with their classes.

        With `classes`, which are those of the training images, images of others have no class.
        Raises DataError for arrays of another type or shape.
        """
        pixels = self._array(pair.images)
        laid_out = self._pixels(pair.images, pixels)
        count, height, width, *rest = laid_out.shape
        labels = self._labels(pair.labels, count) if pair.labels else [None] * count
        file = self.names[pair.images]
        if not (isinstance(laid_out, np.memmap) and laid_out.flags.c_contiguous):
            file = self._written(pair.images, laid_out)
        mapped = np.load(file, mmap_mode="r", allow_pickle=False)
        size = mapped[0].nbytes
        members = [Member(0, f"row {n}", mapped.offset + n * size, size) for n in range(count)]
        named = class_names.numbered(labels, classes)
        index = image_index.of_members(file.parent, members, named, (file.name,))
        head = f"P{6 if rest else 5} {width} {height} 255\n"
        return replace(index, rows=True, head=head)

    def _array(self, name: str) -> Any:
        try:
            if not self._packed:
                return np.load(self.names[name], mmap_mode="r", allow_pickle=False)
            with self.root.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return file[name]
        except FAULTS as error:
            raise self._unreadable(name, error) from error

    def _pixels(self, name: str, pixels: Any) -> Any:
        """Return images as (N, H, W) or (N, H, W, 3); DataError for any others."""
        shape = tuple(pixels.shape)
        given = f"data.root={shown(self.root)}: {shown(name)} is {pixels.dtype} of shape {shape}"
        if pixels.dtype != np.uint8:
            raise DataError(
                f"{given}; save uint8 from 0 to 255, as by (255 * x).round().astype('uint8') if "
                "x lies between 0 and 1"
            )
        if len(shape) == 4 and shape[-1] not in (1, 3) and shape[1] in (1, 3):
            pixels = pixels.transpose(0, 2, 3, 1)
        if len(shape) == 4 and pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
        if 0 in shape or len(shape) < 3 or (pixels.ndim == 4 and pixels.shape[-1] != 3):
            raise DataError(
                f"{given}; images need the shape (N, height, width), or that with 1 or 3 channels "
                "at the end or after N"
            )
        return pixels

    def _labels(self, name: str, count: int) -> list[str | None]:
        """Return the label of each image as a text."""
        labels = self._array(name)
        shape = tuple(labels.shape)
        if labels.ndim == 2 and shape[1] == 1:
            labels = labels[:, 0]
        if labels.dtype.kind not in "iubU" or labels.shape != (count,):
            raise DataError(
                f"data.root={shown(self.root)}: {shown(name)} is {labels.dtype} of shape {shape}; "
                f"labels need one whole number or name for each of the {count:,} images, or give "
                "data.labels=none"
            )
        return [None if text in ("-1", "") else text for text in map(str, labels.tolist())]

    def _written(self, name: str, pixels: Any) -> Path:
        """Return the file in the cache with an array as it can be read in pieces, once written."""
        stat = self.names[name].stat()
        identity = f"{self.names[name].resolve()} {stat.st_size} {stat.st_mtime_ns} {name}"
        place = f"arrays_{hashlib.sha256(identity.encode()).hexdigest()[:32]}"
        file = self.cache / place / f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)}.npy"
        if not file.is_file():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with written_whole(file) as temporary, open(temporary, "wb") as opened:
                    np.save(opened, np.ascontiguousarray(pixels))
            except OSError as error:
                raise OutputError(
                    f"{shown(self.cache)}: {shown(name)} of {shown(self.root)} can't be written "
                    f"there ({error.strerror}); free it, or choose data.cache=FOLDER"
                ) from error
        return file

    def _unreadable(self, what: str, error: Exception) -> DataError:
        return DataError(
            f"data.root={shown(self.root)}: {shown(what)} can't be read ({shown(error)}); save "
            "arrays of numbers by numpy.savez or numpy.save"
        )
