"""Image folders: their files, classes, and pixels, which are cached once they are decoded."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moco_dist.data import class_names, folder_walk, image_file, image_index
from moco_dist.data.class_names import Numbered
from moco_dist.data.folder_layout import STRAYS
from moco_dist.data.image_file import EXTENSIONS, Recipe
from moco_dist.data.image_index import ImageIndex
from moco_dist.data.parts import part_of
from moco_dist.data.tar_members import Member
from moco_dist.distributed import fingerprint
from moco_dist.errors import ConfigError, DataError, MissingError, counted, machine_error, shown
from moco_dist.runs import memory

logger = logging.getLogger(__name__)

# Version of how pixels are made of files, in the names of cached ones.
VERSION = 2
# Unreadable images after which decoding stops.
MAX_BAD = 100


def scan(root: Path, labelled: bool, classes: tuple[str, ...] | None = None) -> ImageIndex:
    """Return the images below `root`, at any depth, in the order of their names.

    An image's class is its first-level folder. There are no classes if there is only one such
    folder, or if more than one image in STRAYS is in `root` itself; fewer have no class. With
    `classes`, which are those of the training images, images of other folders have no class.
    Raises MissingError if there is no folder or no image, DataError for a folder of files that look
    like images and are not read, and for folders that are parts and no classes.
    """
    if not os.path.isdir(root):
        raise MissingError(
            f"{shown(root)}: no such folder; give the folder of the images as data.root=DIR"
        )
    found = folder_walk.walk(root)
    files, said = found.files, found.sentences()
    if not files:
        unread = f" ({found.counted(found.unread)} are not read)" if found.unread else ""
        raise MissingError(
            f"{shown(root)}: no images in this folder{unread}; data.root needs files that "
            f"end in {', '.join(EXTENSIONS)}"
        )
    inner = [file.relative_to(root).parts for file in files]
    found_now = states(map(str, files))
    members = [Member(0, str(f.relative_to(root)), 0, found_now[str(f)].st_size) for f in files]
    loose = sum(len(parts) == 1 for parts in inner)
    names = sorted({parts[0] for parts in inner if len(parts) > 1})
    empty = {top for top, _ in found.unread if top} - set(names)
    several = len(names) + len(empty) > 1 or classes is not None
    named = Numbered([-1] * len(files), ())
    if labelled and names and several and loose * STRAYS <= len(files):
        fault = "" if classes else _no_images(found, empty) or _not_classes(root, names, inner)
        if fault:
            raise DataError(fault)
        if loose:
            said.append(
                f"{shown(root)}: {counted(loose, 'image')} without a class next to the class "
                f"folders; the first is {shown(files[0], 4096)}"
            )
        labels = [parts[0] if len(parts) > 1 else None for parts in inner]
        named = class_names.among(labels, classes or tuple(names))
    elif labelled and loose and len(names) > 1:
        said.append(
            f"{shown(root)}: no classes, because {loose:,} of {len(files):,} images lie "
            f"next to the {len(names)} folders; the first is {shown(files[0], 4096)}"
        )
    index = image_index.of_members(root, members, named)
    return replace(index, warnings=tuple(said), read=tuple(found.folders) if found.lasts else ())


def _no_images(found: folder_walk.Walk, empty: set[str]) -> str:
    """Return what is wrong with class folders of files that are not read, else nothing."""
    if not empty:
        return ""
    keys = [key for key in found.unread if key[0] == min(empty)]
    return (
        f"{shown(found.root)}: class folder '{shown(min(empty))}' has no image that is read "
        f"({found.counted(keys)}); save its images as PNG or JPEG, move the folder away, or give "
        "data.labels=none"
    )


def _not_classes(root: Path, names: list[str], inner: list[tuple[str, ...]]) -> str:
    """Return what is wrong with the names of classes if some are those of parts, else nothing."""
    of_part = {part: name for name in reversed(names) if (part := part_of(name, anywhere=True))}
    train, *others = (of_part.get(part) for part in ("train", "test", "validation"))
    test = next(filter(None, others), None)
    if (train and test) or all(map(part_of, names)):
        first, second = (train, test) if train and test else names[:2]
        return (
            f"{shown(root)}: the folders '{shown(first)}' and '{shown(second)}' are parts of the "
            "set and no classes, by their names; name them train and test, or give the folder of "
            f"one part as data.root, as {shown(root / str(first))}"
        )
    deep = [parts for parts in reversed(inner) if len(parts) > 2]
    second_level = {part_of(parts[1]): "/".join(parts[:2]) for parts in deep}
    if "train" in second_level and len(second_level.keys() - {None}) > 1:
        of_test = next(v for k, v in second_level.items() if k not in ("train", None))
        return (
            f"{shown(root)}: the parts lie within the classes ({shown(second_level['train'])} and "
            f"{shown(of_test)}); use train/CLASS and test/CLASS, or give data.labels=none to train "
            "on all images"
        )
    return ""


# Row and reason of an image that can't be read.
Unreadable = tuple[int, str]


@dataclass
class Seen:
    """What is found out about images while they are decoded."""

    # Whether images that can't be read are left out.
    skip: bool = False
    unreadable: list[Unreadable] = field(default_factory=list)
    # Number of images of which some is transparent.
    transparent: int = 0


def decode(images: ImageIndex, recipe: Recipe, seen: Seen | None = None) -> Tensor:
    """Return the pixels, uint8 (n, channels, size, size): shorter side resized, centre cropped.

    Raises DataError, naming the first files, if some can't be decoded; with `seen` they are added
    to it and are black.
    """
    places, size, channels = images.all_places(), recipe.size, recipe.channels
    needed = len(places) * channels * size * size
    free = memory.available()
    if needed > free:
        raise ConfigError(
            f"{shown(images.root)}: {len(places)} images of data.size={size} need "
            f"{needed / 1e9:.4g} GB of memory and {free / 1e9:.4g} GB are available; lower "
            "data.memory_gb to stream them from disk, or lower data.size"
        )
    pixels = np.zeros((len(places), size, size, channels), dtype=np.uint8)
    transparent = np.zeros(len(places), dtype=bool)

    def read(number: int) -> str | None:
        try:
            content = image_file.read(places[number])
            pixels[number], transparent[number] = image_file.square(content, recipe)
        except Exception as error:
            # Decoders raise errors of many kinds for bytes that are no image.
            if isinstance(error, OSError) and machine_error(error):
                raise
            return shown(str(error) or type(error).__name__)
        return None

    bad: list[Unreadable] = []
    skip = seen is not None and seen.skip
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, reason in enumerate(pool.map(read, range(len(places)))):
            bad += [] if reason is None else [(row, reason)]
            if len(bad) == MAX_BAD and not skip:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    if bad and (not skip or len(bad) == len(places)):
        row, reason = bad[0]
        found = f"{shown(images.root)}: {listed(images, bad)}; replace or remove these files"
        if len(bad) == 1:
            found = f"{shown(places[row], 4096)}: not a readable image ({reason}); replace or "
            found += "remove this file"
        raise DataError(f"{found}, or give data.skip_unreadable=true")
    if seen is not None:
        seen.unreadable, seen.transparent = bad, int(transparent.sum())
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def listed(images: ImageIndex, unreadable: list[Unreadable]) -> str:
    """Return a text: how many images can't be read, the first ones, and why."""
    places = images.all_places()
    first = ", ".join(f"{shown(places[row], 4096)} ({reason})" for row, reason in unreadable[:5])
    more = ", ..." if len(unreadable) > 5 else ""
    count = f"{len(unreadable)}{' or more' if len(unreadable) == MAX_BAD else ''} of {len(places)}"
    return f"{count} images are not readable: {first}{more}"


def load(images: ImageIndex, recipe: Recipe, cache: Path, seen: Seen) -> Tensor:
    """Return what `decode` returns, from `cache` if it has files of equal path, size and time.

    If the cache is damaged, the images are decoded again, with a warning.
    """
    path = cache / f"{_key(images, recipe)}.safetensors"
    shape = len(images), recipe.channels, recipe.size, recipe.size
    if os.path.isfile(path):
        try:
            with safe_open(path, framework="pt") as file:
                pixels: Tensor = file.get_tensor("pixels")
                metadata = file.metadata() or {}
                fits = (pixels.dtype, pixels.shape) == (torch.uint8, shape)
                whole = fits and fingerprint.of_tensors(pixels) == metadata["fingerprint"]
                noted = json.loads(metadata["unreadable"])
                bad = [(int(row), str(why)) for row, why in noted]
                transparent = int(metadata["transparent"])
            if whole and bad and not seen.skip:
                return decode(images, recipe)  # it raises the error
            if whole:
                seen.unreadable, seen.transparent = bad, transparent
                return pixels
            logger.warning("%s: its content changed on disk; decoding the images again", path)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            logger.warning("%s: can't be read (%s); decoding the images again", path, error)
    pixels = decode(images, recipe, seen)
    notes = {"fingerprint": fingerprint.of_tensors(pixels), "transparent": str(seen.transparent)}
    notes["unreadable"] = json.dumps(seen.unreadable)
    image_index.keep(path, {"pixels": pixels}, notes, "the decoded images")
    return pixels


def states(paths: Iterable[str]) -> dict[str, os.stat_result]:
    """Return the state of each file; DataError if one has disappeared."""
    try:
        return {path: os.stat(path) for path in paths}
    except OSError as error:
        raise DataError(
            f"{shown(error.filename, 4096)}: gone since the folder was read ({error.strerror}); "
            "launch again when the folder no longer changes"
        ) from error


def _key(images: ImageIndex, recipe: Recipe) -> str:
    places, root = images.all_places(), str(images.root)
    found = states({place.path for place in places})
    rows = [
        (os.path.relpath(path, root), found[path].st_size, found[path].st_mtime_ns, *member)
        for path, *member, _ in places
    ]
    heads = sorted({place.head for place in places} - {""})
    content = json.dumps([VERSION, str(images.root.resolve()), recipe, rows, *heads])
    return hashlib.sha256(content.encode()).hexdigest()[:32]
