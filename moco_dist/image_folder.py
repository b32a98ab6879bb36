"""Image folders: their files, the class of each, and the pixels, decoded once, cached on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moco_dist import fingerprint
from moco_dist.errors import ConfigError, DataError, MissingError

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Listing:
    """The images below a folder in a fixed order, and their classes; no labels, no `classes`."""

    root: Path
    files: list[Path]
    labels: list[int]
    classes: tuple[str, ...]


def scan(root: Path, labelled: bool, classes: tuple[str, ...] | None = None) -> Listing:
    """Return the images below `root`, at any depth, in the order of their names.

    Hidden folders are left out. The class is the name of the first-level folder. With an image
    directly in `root`, or only one such folder, there are no classes. `classes`, if given, are the
    only ones allowed.
    Raises MissingError for a folder that is absent or holds no image.
    """
    if not root.is_dir():
        raise MissingError(
            f"{root}: no such folder; give the folder of the images as data.root=DIR"
        )
    files = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        images = (n for n in sorted(names) if n.lower().endswith(EXTENSIONS) and n[0] != ".")
        files += [Path(folder, name) for name in images]
    if not files:
        raise MissingError(
            f"{root}: no images in this folder; data.root needs files that "
            f"end in {', '.join(EXTENSIONS)}"
        )
    tops = [file.relative_to(root).parts[0] for file in files]
    names = sorted(set(tops))
    flat = any(len(file.relative_to(root).parts) == 1 for file in files)
    if not labelled or flat or (len(names) < 2 and classes is None):
        return Listing(root, files, [-1] * len(files), ())
    unknown = sorted(set(names) - set(classes or names))
    if unknown:
        raise DataError(
            f"{root}: class folder '{unknown[0]}' is not among the {len(classes or ())} classes of "
            "the training images; use the same class folders in both"
        )
    number = {name: i for i, name in enumerate(classes or names)}
    return Listing(root, files, [number[top] for top in tops], classes or tuple(names))


def decode(listing: Listing, size: int) -> Tensor:
    """Return the pixels, uint8 (n, 3, size, size): shorter side resized to `size`, centre cut out.

    Raises DataError, naming the file, for one that can't be decoded.
    """
    needed = len(listing.files) * 3 * size * size
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise ConfigError(
            f"{listing.root}: {len(listing.files)} images of data.size={size} need "
            f"{needed / 1e9:.0f} GB of memory and {free / 1e9:.0f} GB are free; lower data.size or "
            "use fewer images (streaming is not built yet)"
        )
    pixels = np.empty((len(listing.files), size, size, 3), dtype=np.uint8)

    def read(number: int) -> None:
        pixels[number] = _read(listing.files[number], size)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(read, range(len(listing.files))):
            pass
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _read(path: Path, size: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        if rgb.size != (size, size):
            rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
        return np.asarray(rgb)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: not a readable image ({error}); replace or remove this file"
        ) from error


def load(listing: Listing, size: int, cache: Path) -> Tensor:
    """Return what `decode` returns, from `cache` if these very files were decoded before.

    Files are told apart by path, size and time of change. A damaged cache is decoded anew, with a
    warning.
    """
    path = cache / f"{_key(listing, size)}.safetensors"
    if path.exists():
        try:
            with safe_open(path, framework="pt") as file:
                pixels: Tensor = file.get_tensor("pixels")
                if fingerprint.of_tensors(pixels) == file.metadata()["fingerprint"]:
                    return pixels
            logger.warning("%s: its content changed on disk; decoding the images again", path)
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning("%s: can't be read (%s); decoding the images again", path, error)
    pixels = decode(listing, size)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        save_file({"pixels": pixels}, temporary, {"fingerprint": fingerprint.of_tensors(pixels)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        logger.warning(
            "%s: can't keep the decoded images (%s); the next start decodes again", cache, error
        )
    return pixels


def _key(listing: Listing, size: int) -> str:
    stats = [(str(file.relative_to(listing.root)), file.stat()) for file in listing.files]
    rows = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(
        json.dumps([str(listing.root.resolve()), size, rows]).encode()
    ).hexdigest()[:32]
