"""Data sets by name, in memory or streamed, split into three parts."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moco_dist.config.recipe import DataConfig
from moco_dist.data import file_sets, image_folder, run_lists, set_aside, shapes, torchvision_sets
from moco_dist.data.image_file import WHITE, Recipe
from moco_dist.data.image_index import ImageIndex
from moco_dist.data.set_aside import Aside
from moco_dist.data.streamed_images import StreamedImages
from moco_dist.data.worker_pool import WorkerPool
from moco_dist.distributed import comms, fingerprint, peers
from moco_dist.errors import ConfigError, DataError, counted, shown
from moco_dist.randomness import Purpose, permutation

logger = logging.getLogger(__name__)

# Data sets that may be streamed.
ON_DISK = ("folder", "shards", "huggingface", "arrays")


@dataclass(frozen=True)
class Images:
    """Images and classes: `pixels` uint8 (n, c, size, size), `labels` int64 (n,), -1 if unknown."""

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    # The list that these images are from, and their rows in it, int64 (n,); None for images that
    # are no files.
    catalogue: ImageIndex | None = None
    rows: Tensor | None = None
    # Rows of unreadable files of that list, with the reasons.
    left_out: tuple[image_folder.Unreadable, ...] = ()
    # Images of that list of which some is transparent.
    transparent: int = 0

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Tensor) -> Images:
        kept = None if self.rows is None else self.rows[rows.cpu()]
        return replace(self, pixels=self.pixels[rows], labels=self.labels[rows], rows=kept)

    def file(self, number: int) -> str:
        """Return the path of an image, empty if it is from no file."""
        if self.catalogue is None or self.rows is None:
            return ""
        return str(self.catalogue.places([int(self.rows[number])])[0])

    def squares(self, rows: Tensor) -> Tensor:
        """Return the pixels of some images, uint8 (*rows.shape, c, size, size)."""
        return self.pixels[rows]

    def batches(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the pixels of each part."""
        return (self.pixels[part] for part in parts)

    def to(self, device: torch.device) -> Images:
        """Return the same images on `device`."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def labelled(self) -> Images:
        """Return the images whose class is known."""
        known = self.labels >= 0
        return self if bool(known.all()) else self[known]


AnyImages = Images | StreamedImages


class Loaded(NamedTuple):
    """Training and test images, and what `file_sets.FileSet` says of them."""

    train: AnyImages
    test: AnyImages
    parts: str = ""
    fault: str = ""


@dataclass(frozen=True)
class Splits:
    """The three parts of a data set; `test` may be empty."""

    train: AnyImages
    validation: AnyImages
    test: AnyImages
    # Of the whole content before the split; of names and sizes if images are streamed.
    fingerprint: str
    # Where the images are held, and why, for the banner.
    held: str
    # Which folders or tars are which part, for the banner; empty for other data sets.
    parts: str = ""
    # Why the labels of the test images can't be used, in which case there are none.
    fault: str = ""

    def to(self, device: torch.device) -> Splits:
        """Return the same splits on `device`."""
        train, validation, test = (p.to(device) for p in (self.train, self.validation, self.test))
        return replace(self, train=train, validation=validation, test=test)


def load(config: DataConfig, channels: int = 3, run: run_lists.Begun | None = None) -> Splits:
    """Return the data set that `config` names, split, in RGB or gray; call it on all processes.

    A `run` whose images are streamed goes on with the list of its first launch, as far as
    `run_lists.resumed` allows that, and keeps one if it has none yet.

    One process of each machine downloads, unpacks or decodes while the others wait; rank 0
    downloads before other machines, which may share its folder. Raises MissingError or DataError on
    all processes.
    """
    read = cache(partial(_read, config, channels, run))
    downloads = config.name not in ("shapes", "folder", "shards", "arrays")
    for my_turn in (comms.is_main() and downloads, comms.local_rank() == 0):
        peers.together(read if my_turn else lambda: None)
    loaded = peers.together(read)
    content = _fingerprint(loaded.train, loaded.test)
    peers.same_everywhere("the data set's fingerprint", content)
    files = run_lists.state(loaded.train, loaded.test)
    peers.same_everywhere("what has changed of the images' files", files, "launch again")
    if run and run.trained_on in (None, content):
        peers.from_main(partial(run_lists.keep, run, loaded.train, loaded.test))
    train, validation = _split(loaded.train, config)
    held = _held(config, channels, loaded)
    return Splits(train, validation, loaded.test, content, held, loaded.parts, loaded.fault)


def _fingerprint(train: AnyImages, test: AnyImages) -> str:
    if isinstance(train, Images) and isinstance(test, Images):
        return fingerprint.of_tensors(train.pixels, train.labels, test.pixels, test.labels)
    parts = [part for part in (train, test) if isinstance(part, StreamedImages)]
    lists = " ".join(part.catalogue.fingerprint() for part in parts)
    # The prefix keeps a run from resuming with the other kind of images, whose views differ.
    return run_lists.STREAMED + hashlib.sha256(lists.encode()).hexdigest()[:16]


def _held(config: DataConfig, channels: int, loaded: Loaded) -> str:
    """Return where the images are held, and why."""
    train, test = loaded.train, loaded.test
    size, need = config.size, _gigabytes(len(train) + len(test), config.size, channels)
    kind = "gray squares" if channels == 1 else "squares"
    squares, limit = f"{kind} of {size} x {size} need {need:.3g} GB", f"{config.memory_gb:g}"
    if isinstance(train, StreamedImages):
        workers = train.pool.size
        held = [part for part in (train, test) if isinstance(part, StreamedImages) and len(part)]
        count = sum(len(part.aside.rows) for part in held)
        return (
            f"streamed by {counted(workers, 'worker')} per process: {squares}, more than "
            f"data.memory_gb={limit}; what is transparent on {_colour(config)}"
            f"{f'; {count} unreadable set aside' if count else ''}"
        )
    on_disk = config.name in ON_DISK
    rule = f"data.memory_gb={limit} allows it" if on_disk else f"{config.name} always is"
    parts = [part for part in (train, test) if isinstance(part, Images) and len(part)]
    count = sum(len(part.left_out) for part in parts)
    clear = sum(part.transparent for part in parts)
    return (
        f"in memory: {squares}, {rule}{f'; {count} unreadable left out' if count else ''}"
        f"{f'; {clear:,} transparent, on {_colour(config)}' if clear else ''}"
    )


def _colour(config: DataConfig) -> str:
    """Return the colour behind what is transparent, for a text."""
    return "white" if config.background == list(WHITE) else f"data.background={config.background}"


def _gigabytes(count: int, size: int, channels: int) -> float:
    return count * channels * size * size / 1e9


def _read(config: DataConfig, channels: int, run: run_lists.Begun | None) -> Loaded:
    if config.name in ON_DISK:
        return _read_files(config, channels, run)
    if config.name == "shapes":
        drawn = shapes.draw(config.shapes_train, config.size, seed=0)
        test_drawn = shapes.draw(config.shapes_test, config.size, seed=0, first=config.shapes_train)
        train, test = Images(*drawn, shapes.CLASSES), Images(*test_drawn, shapes.CLASSES)
    else:
        train_part, test_part = torchvision_sets.read(config, file_sets.root(config))
        train, test = Images(*train_part), Images(*test_part)
    return Loaded(_gray(train), _gray(test)) if channels == 1 else Loaded(train, test)


def _gray(images: Images) -> Images:
    """Return colour images in gray, with the same bits as PIL's conversion."""
    red, green, blue = images.pixels.int().chunk(3, dim=1)
    luma = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
    return replace(images, pixels=luma.to(torch.uint8))


def _read_files(config: DataConfig, channels: int, run: run_lists.Begun | None) -> Loaded:
    """Read a folder or shards; stream them if their squares need more than data.memory_gb."""
    kept = file_sets.cache(config)
    found = file_sets.find(config, file_sets.root(config), kept)
    for sentence in found.warnings:
        logger.warning(sentence)
    parts = [part for part in (found.train, found.test) if part]
    recipe = Recipe(
        config.size, channels=channels, background=config.background, resize=config.resize
    )
    if _gigabytes(sum(map(len, parts)), config.size, channels) > config.memory_gb:
        pool = WorkerPool(config.workers)
        held: list[AnyImages] = [
            StreamedImages(part, aside, pool, torch.arange(len(part)), part.labels, recipe)
            for part, aside in run_lists.settled(run, parts, config.skip_unreadable)
        ]
        train, *tests = held
    else:
        train = _in_memory(found.train, config, recipe, kept)
        if empty := set(found.train.labels.tolist()) - set(train.labels.tolist()):
            raise DataError(
                f"{shown(found.train.root)}: class '{shown(train.classes[min(empty)])}' has no "
                "readable image; replace its files, or move its folder away"
            )
        try:
            tests = [_in_memory(found.test, config, recipe, kept)] if found.test else []
        except DataError as error:  # what doesn't test goes on
            logger.warning("the test images are left aside: %s", error)
            return Loaded(train, train[torch.arange(0)], found.parts, str(error))
    test = tests[0].labelled() if tests else train[torch.arange(0)]
    return Loaded(train, test, found.parts, found.fault)


def _in_memory(part: ImageIndex, config: DataConfig, recipe: Recipe, kept: Path) -> Images:
    """Return the images of a list, without unreadable ones if `config` allows that."""
    seen = image_folder.Seen(config.skip_unreadable)
    pixels = image_folder.load(part, recipe, kept, seen)
    rows = torch.arange(len(part))
    bad = tuple(seen.unreadable)
    images = Images(pixels, part.labels, part.classes, part, rows, bad, seen.transparent)
    if not bad:
        return images
    logger.warning(
        "%s: %s; they are left out", shown(part.root), image_folder.listed(part, seen.unreadable)
    )
    good = torch.ones(len(images), dtype=torch.bool)
    good[[row for row, _ in bad]] = False
    return images[good]


def _split(images: AnyImages, config: DataConfig) -> tuple[AnyImages, AnyImages]:
    """Hold out a share of the labelled images (of all, if none has a label) for validation."""
    order = permutation(len(images), config.split_seed, Purpose.SPLIT)
    known = order[images.labels[order] >= 0] if images.classes else order
    held_out = known[: round(config.validation * len(known))]
    kept = torch.ones(len(images), dtype=torch.bool)
    kept[held_out] = False
    train = order[kept[order]]
    if config.limit > len(train):
        logger.warning("data.limit=%s is above the %s training images", config.limit, len(train))
    train = train[: config.limit or None].sort().values
    if len(train) == 0:
        raise DataError(
            f"data.validation={config.validation} leaves none of {len(images)} images for "
            "training; lower it"
        )
    return images[train], images[held_out.sort().values]


def note_left_out(directory: Path, splits: Splits) -> None:
    """Write SET_ASIDE in a run directory: the files that images in memory were left without."""
    parts = zip(run_lists.PARTS, (splits.train, splits.test), strict=True)
    asides = {
        name: Aside(part.catalogue, True, dict(part.left_out))
        for name, part in parts
        if isinstance(part, Images) and part.catalogue and len(part)
    }
    there = (directory / set_aside.SET_ASIDE).exists()
    if asides and (there or any(aside.rows for aside in asides.values())):
        set_aside.write(directory, asides)


def require_labels(splits: Splits, config: DataConfig) -> None:
    """Raise DataError if the data set has no classes to learn."""
    if not splits.train.classes:
        none = config.labels == "none"
        fix = "give data.labels=folders" if none else "sort the images into one folder per class"
        if not none and config.name in ("huggingface", "arrays"):
            fix = "name them by data.label_column"
        raise DataError(
            f"data.name={config.name} at data.root={config.root} has no labels"
            f"{', with data.labels=none' if none else ''}, and a probe needs them; {fix}"
        )


def require_same(trained_on: object, splits: Splits, checkpoint: Path) -> None:
    """Raise ConfigError unless the checkpoint was `trained_on` the fingerprint of `splits`."""
    ours = splits.fingerprint
    if trained_on == ours:
        return
    if str(trained_on).startswith(run_lists.STREAMED) != ours.startswith(run_lists.STREAMED):
        now, then = ("streamed", "in memory")[:: 1 if ours.startswith(run_lists.STREAMED) else -1]
        raise ConfigError(
            f"{checkpoint}: was trained on images that were {then}, and now they are {now}, which "
            "changes the views; restore data.memory_gb, or give name=... for a new run"
        )
    raise ConfigError(
        f"{checkpoint}: was trained on other images (fingerprint {trained_on}, now {ours}); use "
        "the same data, or give name=... for a new run"
    )
