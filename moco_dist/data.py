"""Data sets by name, in memory as uint8, and their split into training, validation and test."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2 import functional as F

from moco_dist import comms, fingerprint, image_archive, image_folder, peers, shapes
from moco_dist.config import DataConfig
from moco_dist.errors import DataError, MissingError, shown
from moco_dist.randomness import Purpose, permutation

# Seconds that a download may stay silent: the system's own limit is minutes, or none.
SILENCE = 20.0


@dataclass(frozen=True)
class Images:
    """Images and classes: `pixels` uint8 (n, 3, size, size), `labels` int64 (n,), -1 if unknown."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Tensor) -> Images:
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows])

    def to(self, device: torch.device) -> Images:
        """Return the same images on `device`."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def labelled(self) -> Images:
        """Return the images whose class is known."""
        known = self.labels >= 0
        return self if bool(known.all()) else self[known]


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set; `test` is empty where it has none."""

    train: Images
    validation: Images
    test: Images
    # Of the whole content, before it was split.
    fingerprint: str

    def to(self, device: torch.device) -> Splits:
        """Return the same splits on `device`."""
        return replace(
            self,
            train=self.train.to(device),
            validation=self.validation.to(device),
            test=self.test.to(device),
        )


def load(config: DataConfig) -> Splits:
    """Return the data set that `config` names, split; call it on all processes.

    One process of each machine downloads, unpacks or decodes while the others wait for it; the
    first one downloads before those of other machines, which may share its folder.
    Raises MissingError or DataError, on all processes alike.
    """
    loaded: tuple[Images, Images] | None = None
    downloads = config.name not in ("shapes", "folder")
    for my_turn in (comms.is_main() and downloads, comms.local_rank() == 0, True):
        loaded = peers.together(partial(_once, loaded, config, my_turn))
    assert loaded, "the last turn is everyone's"
    train, test = loaded
    content = fingerprint.of_tensors(train.pixels, train.labels, test.pixels, test.labels)
    peers.same_everywhere("the data set's fingerprint", content)
    train, validation = _split(train, config)
    return Splits(train, validation, test, content)


def _once(
    loaded: tuple[Images, Images] | None, config: DataConfig, my_turn: bool
) -> tuple[Images, Images] | None:
    return loaded or (_read(config) if my_turn else None)


def _read(config: DataConfig) -> tuple[Images, Images]:
    if config.name == "shapes":
        train = shapes.draw(config.shapes_train, config.size, seed=0)
        test = shapes.draw(config.shapes_test, config.size, seed=0, first=config.shapes_train)
        return Images(*train, shapes.CLASSES), Images(*test, shapes.CLASSES)
    if config.name == "folder":
        return _read_folder(config)
    return _read_torchvision(config)


def _root(config: DataConfig) -> Path:
    root = Path(os.path.expanduser(config.root))
    if not os.path.isfile(root):
        return root
    if config.name == "folder" and image_archive.is_archive(root):
        unpacked = image_archive.unpack(root, _cache(config))
        inside = list(unpacked.iterdir())
        # Packed with the folder around it, as is usual, or without.
        named = len(inside) == 1 and inside[0].is_dir() and inside[0].name != "train"
        return inside[0] if named else unpacked
    raise DataError(
        f"data.root={shown(root)}: a file, and data.root needs a folder, or with data.name=folder "
        "a tar or zip file of images"
    )


@contextmanager
def _impatient() -> Iterator[None]:
    """Let connections fail that stay silent."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _read_folder(config: DataConfig) -> tuple[Images, Images]:
    """Read DIR/train and DIR/test (or DIR/val); without a DIR/train, DIR alone and no test set."""
    root, size = _root(config), config.size
    cache = _cache(config)
    parted = os.path.isdir(root / "train")
    listing = image_folder.scan(root / "train" if parted else root, config.labels == "folders")
    train = _images(image_folder.load(listing, size, cache), listing.labels, listing.classes)
    tests = [root / name for name in ("test", "val") if parted and (root / name).is_dir()]
    if not tests or not listing.classes:
        return train, train[torch.arange(0)]
    listing = image_folder.scan(tests[0], True, listing.classes)
    return train, _images(image_folder.load(listing, size, cache), listing.labels, listing.classes)


def _images(pixels: Tensor, labels: Any, classes: Any) -> Images:
    return Images(pixels, torch.as_tensor(labels, dtype=torch.int64), tuple(classes))


def _cache(config: DataConfig) -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "moco_dist")
    return Path(os.path.expanduser(config.cache or default))


def _read_torchvision(config: DataConfig) -> tuple[Images, Images]:
    root = _root(config)
    parts: list[Any]
    try:
        # torchvision compares MD5 sums before it unpacks an archive, and before it unpickles.
        with _impatient():
            if config.name == "stl10":
                parts = [
                    datasets.STL10(root, p, download=True) for p in ("train+unlabeled", "test")
                ]
                arrays = [(torch.from_numpy(part.data), part.labels) for part in parts]
            else:
                kind = datasets.CIFAR10 if config.name == "cifar10" else datasets.CIFAR100
                parts = [kind(root, train, download=True) for train in (True, False)]
                arrays = [(torch.from_numpy(p.data).permute(0, 3, 1, 2), p.targets) for p in parts]
    except PermissionError as error:
        raise MissingError(
            f"data.root={shown(root)}: can't be written ({error.strerror}); choose another folder"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingError(
            f"data.name={config.name}: not in data.root={shown(root)} and can't be downloaded "
            f"({shown(getattr(error, 'strerror', None) or error)}); "
            "put the unpacked archive there, or use data.name=folder with a folder of images"
        ) from error
    # STL-10 has a file of its classes' names, without an MD5 sum.
    classes = getattr(parts[0], "classes", None) or ()
    if len(classes) <= max(int(max(labels)) for _, labels in arrays):
        raise DataError(
            f"data.root={shown(root)}: {len(classes)} names for the classes of {config.name} are "
            "too few; unpack its archive again"
        )
    train, test = (
        _images(_resized(pixels.contiguous(), config.size), labels, classes)
        for pixels, labels in arrays
    )
    return train, test


def _resized(pixels: Tensor, size: int) -> Tensor:
    if pixels.shape[-1] == size:
        return pixels
    parts = pixels.split(1000)  # in floating point, which all of STL-10 at once would not fit into
    return torch.cat([F.resize(part, [size, size], antialias=True) for part in parts])


def _split(images: Images, config: DataConfig) -> tuple[Images, Images]:
    """Hold out a share of the labelled images (of all, if none has a label) for validation."""
    order = permutation(len(images), config.split_seed, Purpose.SPLIT)
    known = order[images.labels[order] >= 0] if images.classes else order
    held_out = known[: round(config.validation * len(known))]
    kept = torch.ones(len(images), dtype=torch.bool)
    kept[held_out] = False
    train = order[kept[order]]
    train = train[: config.limit or None].sort().values
    if len(train) == 0:
        raise DataError(
            f"data.validation={config.validation} leaves none of {len(images)} images for "
            "training; lower it"
        )
    return images[train], images[held_out.sort().values]


def require_labels(splits: Splits, config: DataConfig) -> None:
    """Raise DataError if the data set has no classes to learn."""
    if not splits.train.classes:
        raise DataError(
            f"data.name={config.name} at data.root={config.root} has no labels, and a probe needs "
            "them; sort the images into one folder for each class"
        )
