"""Which images of a folder, archive, shards or tables are for training, which for testing."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from moco_dist.config.recipe import DataConfig
from moco_dist.data import (
    folder_layout,
    image_archive,
    image_folder,
    image_index,
    parts,
    tables,
    tar_shards,
)
from moco_dist.data.arrays import Arrays
from moco_dist.data.image_index import ImageIndex
from moco_dist.data.label_table import LabelTable
from moco_dist.errors import DataError, MissingError, counted, shown

# Name of the training images of a folder without parts.
ALL = "all images"


class Source(NamedTuple):
    """A part of a data set."""

    # For a text.
    name: str
    # Returns its images, given the classes of the training images, None for these themselves.
    list: Callable[[tuple[str, ...] | None], ImageIndex]


class Sources(NamedTuple):
    """The parts of a data set."""

    train: Source
    # Those that may be tested on.
    tests: list[Source]
    warnings: tuple[str, ...]
    # Returns what there is to warn of once the parts that are read have been listed.
    late: Callable[[], tuple[str, ...]] = tuple


@dataclass(frozen=True)
class FileSet:
    """The lists of the images of a data set's parts; `test` has classes or is None."""

    train: ImageIndex
    test: ImageIndex | None
    # Which folders were taken for which part, and which were left aside, for the banner.
    parts: str
    # Why the labels of the test images can't be used, for what needs them.
    fault: str
    # Sentences about files that were left out.
    warnings: tuple[str, ...]


def cache(config: DataConfig) -> Path:
    """Return the folder of everything that is kept for the next start."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "moco_dist")
    return Path(os.path.expanduser(config.cache or default))


def root(config: DataConfig) -> Path:
    """Return the folder of a data set, after unpacking it if it is an archive; DataError."""
    given = Path(os.path.expanduser(config.root))
    if not os.path.isfile(given) or config.name in ("huggingface", "arrays"):
        return given
    if config.name == "folder" and image_archive.is_archive(given):
        # An archive usually contains the folder itself, but may contain its content only.
        return folder_layout.only(image_archive.unpack(given, cache(config)))
    raise DataError(
        f"data.root={shown(given)}: is a file; give a folder or, with data.name=folder, a tar or "
        "zip file of images"
    )


def find(config: DataConfig, given: Path, kept: Path | None) -> FileSet:
    """Return the images below the folder `given`, whose lists are kept in a cache.

    Of the parts that may be tested on, the first with labels is chosen. Raises UserError if there
    is nothing to train on.
    """
    kinds = {"shards": _shards, "huggingface": _tables, "arrays": _arrays}
    sources = kinds.get(config.name, _folders)
    train, tests, said, late = sources(config, given, kept)
    images = train.list(None)
    chosen, words, fault, aside = None, [f"trains on {train.name}"], "", list[str]()
    for part in tests:
        if not images.classes or chosen or fault:
            reason = "not needed" if images.classes else "the training images have no labels"
            aside.append(f"{part.name} ({reason})")
            continue
        try:
            test = part.list(images.classes)
        except MissingError:
            aside.append(f"{part.name} (no images that are read)")
            continue
        except DataError as error:  # for what tests to refuse
            aside.append(f"{part.name} (it can't be read)")
            fault, said = str(error), (*said, f"the test images are left aside: {error}")
            continue
        known, first = bool((test.labels >= 0).any()), shown(next(iter(test.unknown), ""))
        if known and not test.unknown:
            chosen = test
            words.append(f"tests on {part.name}")
            continue
        reason = f"class '{first}' is not in training" if first else "no labels"
        aside.append(f"{part.name} ({reason})")
        if known:
            fault = (
                f"{shown(test.root)}: class '{first}' is not among the {len(images.classes)} "
                "classes of the training images; use the same classes in both"
            )
    words += [f"leaves aside {', '.join(aside)}"] if aside else []
    of_parts = "; ".join(words) if tests or train.name != ALL else ""
    said = (*said, *images.warnings, *(chosen.warnings if chosen else ()), *late())
    return FileSet(images, chosen, of_parts, fault, said)


def _folders(config: DataConfig, given: Path, kept: Path | None) -> Sources:
    labelled = config.labels == "folders"
    layout = folder_layout.find(given)
    table = LabelTable(config, given) if config.labels not in ("folders", "none") else None

    def of(part: Path) -> Source:
        def listed(classes: tuple[str, ...] | None) -> ImageIndex:
            is_part = part != layout.root
            folder = folder_layout.inside(part, classes=classes or ()) if is_part else part
            images = image_index.kept(kept, image_folder.scan, folder, labelled, classes)
            return table.on(images, classes) if table else images

        place = os.path.relpath(part, given)
        return Source(ALL if place == "." else shown(place), listed)

    rest = table.unused if table else tuple
    return Sources(of(layout.train), [of(part) for part in layout.tests], layout.warnings, rest)


def _shards(config: DataConfig, given: Path, kept: Path | None) -> Sources:
    labelled = config.labels != "none"
    train, tests, warnings = tar_shards.parts(given)

    def of(tars: tar_shards.Tars) -> Source:
        listed = partial(image_index.kept, kept, tar_shards.read, *tars, labelled)
        place = shown(os.path.relpath(tars.folder / tars.names[0], given))
        return Source(f"{counted(len(tars.names), 'tar')} from {place}", listed)

    return Sources(of(train), [of(part) for part in tests], warnings)


def _tables(config: DataConfig, given: Path, kept: Path | None) -> Sources:
    splits, said = tables.splits(config.root)
    train, tests, others = parts.of_splits(list(splits), config.split, config.root)
    if others:
        unused = shown(", ".join(others))
        said += (f"{shown(config.root)}: neither trains nor tests on {unused}",)

    def of(name: str) -> Source:
        listed = partial(tables.images, splits[name], config)
        return Source(ALL if len(splits) == 1 else f"split {shown(name)}", listed)

    return Sources(of(train), [of(name) for name in tests], said)


def _arrays(config: DataConfig, given: Path, kept: Path | None) -> Sources:
    arrays = Arrays(config, cache(config))
    pairs = arrays.parts()

    def of(part: parts.Part) -> Source:
        listed = partial(arrays.images, pairs[part])
        return Source(ALL if len(pairs) == 1 else shown(pairs[part].images), listed)

    tests: list[parts.Part] = ["test", "validation"]
    return Sources(of("train"), [of(part) for part in tests if part in pairs], ())
