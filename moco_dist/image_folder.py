"""Image folders: their files, the class of each, and the pixels, decoded once, cached on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moco_dist import fingerprint
from moco_dist.errors import ConfigError, DataError, MissingError, shown

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# What may lie behind those names, told by content: PIL would also call Ghostscript for an EPS.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")

# Above the 151 million of the largest cameras; an image takes 3 or 4 bytes a pixel, twice.
MAX_PIXELS = 160_000_000
# PIL warns above its limit without the path, and from half of ours on if it is left as it is.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

# Images from this size on are decoded one at a time, since each thread would hold one.
LARGE_PIXELS = 2**26
_one_large = threading.Lock()

# Unreadable images after which the rest is not tried.
MAX_BAD = 100


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
    if not os.path.isdir(root):
        raise MissingError(
            f"{shown(root)}: no such folder; give the folder of the images as data.root=DIR"
        )
    files = _walk(root)
    if not files:
        raise MissingError(
            f"{shown(root)}: no images in this folder; data.root needs files that "
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
            f"{shown(root)}: class folder '{shown(unknown[0])}' is not among the "
            f"{len(classes or ())} classes of the training images; "
            "use the same class folders in both"
        )
    number = {name: i for i, name in enumerate(classes or names)}
    return Listing(root, files, [number[top] for top in tops], classes or tuple(names))


def _walk(root: Path) -> list[Path]:
    """Return the images below `root`: in each folder first its own by name, then its subfolders'.

    Links are followed once the real folders are known, and only to folders not yet read: loops end,
    and no image counts twice. What is left out is warned of, one line for each reason.
    """
    files: list[Path] = []
    left_out: dict[str, list[str]] = {}
    seen: set[tuple[int, int]] = set()
    folders, links = [str(root)], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            stat = os.stat(folder)
            if (stat.st_dev, stat.st_ino) in seen:
                left_out.setdefault("links to folders that are read already", []).append(folder)
                continue
            seen.add((stat.st_dev, stat.st_ino))
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            left_out.setdefault(f"folders that can't be read ({error.strerror})", []).append(folder)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            is_image = entry.name.lower().endswith(EXTENSIONS)
            # os.path for links, as an entry raises for one in a loop; no stat for all the others.
            is_link = entry.is_symlink()
            if os.path.isdir(entry.path) if is_link else entry.is_dir():
                (links if is_link else folders).append(entry.path)
            elif is_link and not os.path.exists(entry.path):
                left_out.setdefault("links to nothing", []).append(entry.path)
            elif is_image and (os.path.isfile(entry.path) if is_link else entry.is_file()):
                files.append(Path(entry.path))
            elif is_image:
                left_out.setdefault("special files, as pipes or devices", []).append(entry.path)
    for reason, paths in left_out.items():
        logger.warning(
            "%s: left out %d %s; the first is %s",
            shown(root),
            len(paths),
            reason,
            shown(min(paths), 4096),
        )
    return sorted(
        files, key=lambda file: [(True, part) for part in file.parts[:-1]] + [(False, file.name)]
    )


def decode(listing: Listing, size: int) -> Tensor:
    """Return the pixels, uint8 (n, 3, size, size): shorter side resized to `size`, centre cut out.

    Raises DataError, naming the first files, if some can't be decoded.
    """
    needed = len(listing.files) * 3 * size * size
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise ConfigError(
            f"{shown(listing.root)}: {len(listing.files)} images of data.size={size} need "
            f"{needed / 1e9:.0f} GB of memory and {free / 1e9:.0f} GB are free; lower data.size or "
            "use fewer images (streaming is not built yet)"
        )
    pixels = np.empty((len(listing.files), size, size, 3), dtype=np.uint8)

    def read(number: int) -> str | None:
        try:
            pixels[number] = _read(listing.files[number], size)
        except Exception as error:
            # Any kind: decoders raise many for bytes that are no image, all of them the file's.
            return shown(str(error) or type(error).__name__)
        return None

    bad = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, reason in zip(
            listing.files, pool.map(read, range(len(listing.files))), strict=True
        ):
            bad += [] if reason is None else [(shown(file, 4096), reason)]
            if len(bad) == MAX_BAD:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    if len(bad) == 1:
        raise DataError(
            f"{bad[0][0]}: not a readable image ({bad[0][1]}); replace or remove this file"
        )
    if bad:
        count = f"{len(bad)}{' or more' if len(bad) == MAX_BAD else ''} of {len(listing.files)}"
        first = ", ".join(f"{file} ({reason})" for file, reason in bad[:5])
        more = ", ..." if len(bad) > 5 else ""
        raise DataError(
            f"{shown(listing.root)}: {count} images are not readable: {first}{more}; replace or "
            "remove these files"
        )
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _read(path: Path, size: int) -> np.ndarray:
    try:
        with Image.open(path, formats=FORMATS) as image:
            many = image.width * image.height
            if many > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            with _one_large if many >= LARGE_PIXELS else nullcontext():
                rgb = image.convert("RGB")
                if rgb.size != (size, size):
                    rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
                return np.asarray(rgb)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"too large, {MAX_PIXELS:,} pixels are allowed; scale it down: {error}"
        ) from error


def load(listing: Listing, size: int, cache: Path) -> Tensor:
    """Return what `decode` returns, from `cache` if these very files were decoded before.

    Files are told apart by path, size and time of change. A damaged cache is decoded anew, with a
    warning.
    """
    path = cache / f"{_key(listing, size)}.safetensors"
    shape = (len(listing.files), 3, size, size)
    if os.path.isfile(path):
        try:
            with safe_open(path, framework="pt") as file:
                pixels: Tensor = file.get_tensor("pixels")
                expected = (file.metadata() or {})["fingerprint"]
                fits = (pixels.dtype, pixels.shape) == (torch.uint8, shape)
                if fits and fingerprint.of_tensors(pixels) == expected:
                    return pixels
            logger.warning("%s: its content changed on disk; decoding the images again", path)
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning("%s: can't be read (%s); decoding the images again", path, error)
    pixels = decode(listing, size)
    temporary = path.with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")  # shared by machines
    try:
        cache.mkdir(parents=True, exist_ok=True)
        save_file({"pixels": pixels}, temporary, {"fingerprint": fingerprint.of_tensors(pixels)})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        logger.warning(
            "%s: can't keep the decoded images (%s); the next start decodes again",
            shown(cache),
            getattr(error, "strerror", None) or error,
        )
    return pixels


def _key(listing: Listing, size: int) -> str:
    try:
        stats = [(str(file.relative_to(listing.root)), file.stat()) for file in listing.files]
    except OSError as error:
        raise DataError(
            f"{shown(error.filename, 4096)}: gone since the folder was read ({error.strerror}); "
            "start again when nothing changes the folder"
        ) from error
    rows = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(
        json.dumps([str(listing.root.resolve()), size, rows]).encode()
    ).hexdigest()[:32]
