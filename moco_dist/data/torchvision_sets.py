"""CIFAR-10, CIFAR-100 and STL-10: downloaded, checked and read by torchvision."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2 import functional as F

from moco_dist.config.recipe import DataConfig
from moco_dist.errors import DataError, MissingError, shown

# Seconds that a download may stay silent: the system's own limit is minutes, or none.
SILENCE = 20.0


@contextmanager
def _impatient() -> Iterator[None]:
    """Let connections fail that stay silent."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def read(config: DataConfig, root: Path) -> list[tuple[Tensor, Any, tuple[str, ...]]]:
    """Return pixels, labels and classes of the training images, and of the test images.

    uint8 (n, 3, size, size) each. Raises MissingError or DataError.
    """
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
    return [
        (_resized(pixels.contiguous(), config.size), labels, tuple(classes))
        for pixels, labels in arrays
    ]


def _resized(pixels: Tensor, size: int) -> Tensor:
    if pixels.shape[-1] == size:
        return pixels
    parts = pixels.split(1000)  # in floating point, which all of STL-10 at once would not fit into
    return torch.cat([F.resize(part, [size, size], antialias=True) for part in parts])
