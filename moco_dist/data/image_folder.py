"""Image folders: their files, classes, and pixels, which are cached once they are decoded."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moco_dist.data import image_file
from moco_dist.data.image_file import EXTENSIONS, Place
from moco_dist.distributed import fingerprint
from moco_dist.errors import ConfigError, DataError, MissingError, machine_error, shown
from moco_dist.runs import memory
from moco_dist.runs.status import written_whole

logger = logging.getLogger(__name__)
AnyPath = TypeVar("AnyPath", str, Path)

# Unreadable images after which decoding stops.
MAX_BAD = 100


@dataclass(frozen=True)
class Listing:
    """The images below a folder in a fixed order; without labels, `classes` is empty."""

    root: Path
    files: list[Path]
    labels: list[int]
    classes: tuple[str, ...]
    # All folders that were read.
    folders: tuple[str, ...] = ()

    def all_places(self) -> list[Place]:
        """Return the locations of the images."""
        return [Place(str(file)) for file in self.files]


class Located(Protocol):
    """A `Listing` or an `ImageIndex`."""

    @property
    def root(self) -> Path: ...

    def all_places(self) -> list[Place]: ...


def parts(root: Path) -> tuple[Path, Path | None]:
    """Return the folders of the training images and, if there is one, of the test images.

    They are DIR/train and DIR/test (or DIR/val); without DIR/train all of DIR is for training.
    """
    if not os.path.isdir(root / "train"):
        return root, None
    tests = (root / name for name in ("test", "val"))
    return root / "train", next(filter(os.path.isdir, tests), None)


def scan(root: Path, labelled: bool, classes: tuple[str, ...] | None = None) -> Listing:
    """Return the images below `root`, at any depth, in the order of their names.

    An image's class is its first-level folder. There are no classes if an image is in `root`
    itself, or if there is only one such folder. `classes`, if given, are the only ones allowed.
    Raises MissingError if there is no folder or no image, DataError for another class.
    """
    if not os.path.isdir(root):
        raise MissingError(
            f"{shown(root)}: no such folder; give the folder of the images as data.root=DIR"
        )
    files, folders = _walk(root)
    if not files:
        raise MissingError(
            f"{shown(root)}: no images in this folder; data.root needs files that "
            f"end in {', '.join(EXTENSIONS)}"
        )
    tops = [file.relative_to(root).parts[0] for file in files]
    names = sorted(set(tops))
    flat = any(len(file.relative_to(root).parts) == 1 for file in files)
    if not labelled or flat or (len(names) < 2 and classes is None):
        return Listing(root, files, [-1] * len(files), (), folders)
    unknown = sorted(set(names) - set(classes or names))
    if unknown:
        raise DataError(
            f"{shown(root)}: class folder '{shown(unknown[0])}' is not among the "
            f"{len(classes or ())} classes of the training images; "
            "use the same class folders in both"
        )
    number = {name: i for i, name in enumerate(classes or names)}
    labels = [number[top] for top in tops]
    return Listing(root, files, labels, classes or tuple(names), folders)


def _walk(root: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Return the images below `root`, each folder's before its subfolders', and the folders read.

    Links are followed after all real folders, and only to folders not yet read, so that loops end
    and no image counts twice. A warning for each reason says what is left out.
    """
    files: list[Path] = []
    read: list[str] = []
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
            read.append(folder)
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            left_out.setdefault(f"folders that can't be read ({error.strerror})", []).append(folder)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            is_image = entry.name.lower().endswith(EXTENSIONS)
            # An entry raises for a link in a loop, so links use os.path; others need no stat.
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
        facts = shown(root), len(paths), reason, shown(min(paths), 4096)
        logger.warning("%s: left out %d %s; the first is %s", *facts)
    files.sort(key=lambda f: [(True, part) for part in f.parts[:-1]] + [(False, f.name)])
    return files, tuple(read)


# Row and reason of an image that can't be read.
Unreadable = tuple[int, str]


def decode(
    images: Located,
    size: int,
    unreadable: list[Unreadable] | None = None,
    channels: int = 3,
) -> Tensor:
    """Return the pixels, uint8 (n, channels, size, size): shorter side resized, centre cropped.

    Raises DataError, naming the first files, if some can't be decoded; with a list `unreadable`
    they are added to it and are black.
    """
    places = images.all_places()
    needed = len(places) * channels * size * size
    free = memory.available()
    if needed > free:
        raise ConfigError(
            f"{shown(images.root)}: {len(places)} images of data.size={size} need "
            f"{needed / 1e9:.3g} GB of memory and {free / 1e9:.3g} GB are available; lower "
            "data.memory_gb to stream them from disk, or lower data.size"
        )
    pixels = np.zeros((len(places), size, size, channels), dtype=np.uint8)

    def read(number: int) -> str | None:
        try:
            pixels[number] = image_file.square(image_file.read(places[number]), size, channels)
        except Exception as error:
            # Decoders raise errors of many kinds for bytes that are no image.
            if isinstance(error, OSError) and machine_error(error):
                raise
            return shown(str(error) or type(error).__name__)
        return None

    bad: list[Unreadable] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, reason in enumerate(pool.map(read, range(len(places)))):
            bad += [] if reason is None else [(row, reason)]
            if len(bad) == MAX_BAD and unreadable is None:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    if unreadable is not None and len(bad) < len(places):
        unreadable += bad
    elif bad:
        row, reason = bad[0]
        found = f"{shown(images.root)}: {counted(images, bad)}; replace or remove these files"
        if len(bad) == 1:
            found = f"{shown(places[row], 4096)}: not a readable image ({reason}); replace or "
            found += "remove this file"
        raise DataError(f"{found}, or give data.skip_unreadable=true")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def counted(images: Located, unreadable: list[Unreadable]) -> str:
    """Return a text: how many images can't be read, the first ones, and why."""
    places = images.all_places()
    first = ", ".join(f"{shown(places[row], 4096)} ({reason})" for row, reason in unreadable[:5])
    more = ", ..." if len(unreadable) > 5 else ""
    count = f"{len(unreadable)}{' or more' if len(unreadable) == MAX_BAD else ''} of {len(places)}"
    return f"{count} images are not readable: {first}{more}"


def load(
    images: Located,
    size: int,
    cache: Path,
    unreadable: list[Unreadable] | None = None,
    channels: int = 3,
) -> Tensor:
    """Return what `decode` returns, from `cache` if it has files of equal path, size and time.

    If the cache is damaged, the images are decoded again, with a warning.
    """
    path = cache / f"{_key(images, size, channels)}.safetensors"
    count = len(images.all_places())
    if os.path.isfile(path):
        try:
            with safe_open(path, framework="pt") as file:
                pixels: Tensor = file.get_tensor("pixels")
                metadata = file.metadata() or {}
                fits = (pixels.dtype, pixels.shape) == (torch.uint8, (count, channels, size, size))
                whole = fits and fingerprint.of_tensors(pixels) == metadata["fingerprint"]
                noted = json.loads(metadata.get("unreadable", "[]"))
                bad = [(int(row), str(why)) for row, why in noted]
            if whole and unreadable is None and bad:
                return decode(images, size, channels=channels)  # it raises the error
            if whole:
                if unreadable is not None:
                    unreadable += bad
                return pixels
            logger.warning("%s: its content changed on disk; decoding the images again", path)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            logger.warning("%s: can't be read (%s); decoding the images again", path, error)
    pixels = decode(images, size, unreadable, channels)
    notes = {"fingerprint": fingerprint.of_tensors(pixels)}
    notes["unreadable"] = json.dumps(unreadable or [])
    keep(path, {"pixels": pixels}, notes, "the decoded images")
    return pixels


def keep(path: Path, tensors: dict[str, Tensor], notes: dict[str, str], what: str) -> None:
    """Write tensors to the cache, with a warning if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as temporary:
            save_file(tensors, temporary, notes)
    except (OSError, SafetensorError) as error:
        reason, text = getattr(error, "strerror", None) or error, "%s: can't keep %s (%s)"
        logger.warning(f"{text}; choose data.cache=FOLDER", shown(path.parent), what, reason)


def states(paths: Iterable[AnyPath]) -> dict[AnyPath, os.stat_result]:
    """Return the state of each file; DataError if one has disappeared."""
    try:
        return {path: os.stat(path) for path in paths}
    except OSError as error:
        raise DataError(
            f"{shown(error.filename, 4096)}: gone since the folder was read ({error.strerror}); "
            "launch again when the folder no longer changes"
        ) from error


def _key(images: Located, size: int, channels: int) -> str:
    places, root = images.all_places(), str(images.root)
    found = states({place.path for place in places})
    rows = [
        (os.path.relpath(path, root), found[path].st_size, found[path].st_mtime_ns, *member)
        for path, *member in places
    ]
    # Colour images keep the key that they had before there were others.
    kind = [] if channels == 3 else [channels]
    content = json.dumps([str(images.root.resolve()), size, rows, *kind])
    return hashlib.sha256(content.encode()).hexdigest()[:32]
