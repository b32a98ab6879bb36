"""CIFAR-10, CIFAR-100 and STL-10, downloaded, checked and read by torchvision."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.v2 import functional as F

from moco_dist.config.recipe import DataConfig
from moco_dist.errors import DataError, MissingError, shown

logger = logging.getLogger(__name__)

# Seconds without data after which a download fails; the system's own limit is minutes, or none.
SILENCE = 20.0

# The folder in data.root that each data set is unpacked to.
FOLDERS = {
    "cifar10": datasets.CIFAR10.base_folder,
    "cifar100": datasets.CIFAR100.base_folder,
    "stl10": datasets.STL10.base_folder,
}


def place(name: str, given: Path) -> Path:
    """Return the folder of a data set in data.root, or data.root itself if it is that folder."""
    inner = given / FOLDERS[name]
    return given if given.name == inner.name and given.is_dir() and not inner.is_dir() else inner


def read(config: DataConfig, given: Path) -> list[tuple[Tensor, Tensor, tuple[str, ...]]]:
    """Return pixels, uint8 (n, 3, size, size), labels, int64 (n,), and classes of both parts.

    The first is for training, the other one for testing. Raises MissingError or DataError.
    """
    parts: list[Any]
    folder = place(config.name, given).parent
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        # torchvision compares MD5 sums before it unpacks or unpickles.
        if config.name == "stl10":
            parts = [datasets.STL10(folder, p, download=True) for p in ("train+unlabeled", "test")]
            arrays = [(torch.from_numpy(part.data), part.labels) for part in parts]
        else:
            kind = datasets.CIFAR10 if config.name == "cifar10" else datasets.CIFAR100
            parts = [kind(folder, train, download=True) for train in (True, False)]
            arrays = [(torch.from_numpy(p.data).permute(0, 3, 1, 2), p.targets) for p in parts]
    except PermissionError as error:
        raise MissingError(
            f"data.root={shown(folder)}: can't be written ({error.strerror}); choose another folder"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise MissingError(
            f"data.name={config.name}: not in data.root={shown(folder)} and can't be downloaded "
            f"({shown(getattr(error, 'strerror', None) or error)}); "
            "put the unpacked archive there, or use data.name=folder with a folder of images"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    if arrays[0][0].shape[-1] != config.size and config.resize != "bilinear":
        logger.warning(
            "data.name=%s: its images are resized to data.size=%s bilinearly, and data.resize=%s "
            "has no effect",
            *(config.name, config.size, config.resize),
        )
    # STL-10's file of class names has no MD5 sum.
    classes = getattr(parts[0], "classes", None) or ()
    if len(classes) <= max(int(max(labels)) for _, labels in arrays):
        raise DataError(
            f"data.root={shown(folder)}: {len(classes)} class names are too few for {config.name}; "
            "unpack its archive again"
        )
    return [
        (_resized(pixels.contiguous(), config.size), torch.as_tensor(labels).long(), tuple(classes))
        for pixels, labels in arrays
    ]


def _resized(pixels: Tensor, size: int) -> Tensor:
    if pixels.shape[-1] == size:
        return pixels
    parts = pixels.split(1000)  # because all of STL-10 in floating point needs too much memory
    return torch.cat([F.resize(part, [size, size], antialias=True) for part in parts])
