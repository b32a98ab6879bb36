"""The lists of images that a streamed run began with, and how it goes on when files have changed.

A run keeps the lists of its first launch in LISTS. When a later launch finds other files, the
images keep the numbers that they had: files that are gone are set aside (`set_aside.py`), files of
another size are read as they are now. That is done if data.skip_unreadable asks for it, or if an
earlier launch named these very files as unreadable. Anything else is another data set, and so is
a table with any change: its rows have no names by which they would be known again.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moco_dist.data import set_aside
from moco_dist.data.image_index import ImageIndex
from moco_dist.data.image_worker import GONE
from moco_dist.data.set_aside import Aside
from moco_dist.data.streamed_images import StreamedImages
from moco_dist.distributed import comms, fingerprint, peers
from moco_dist.errors import ConfigError, DataError, output_errors, shown
from moco_dist.runs.status import replace as replace_file

logger = logging.getLogger(__name__)

# Prefix of the fingerprints of streamed data sets.
STREAMED = "streamed-"
PARTS = ("train", "test")
LISTS = "images.npz"
COLUMNS = ("names", "ends", "sizes", "labels", "tar", "offsets")
# Share of the files of a part that may be gone: where more are, the folder is another one.
MOST_GONE = 0.1

Lists = dict[str, ImageIndex]


class Begun(NamedTuple):
    """A run that images are for."""

    directory: Path
    # The fingerprint of the images in its newest checkpoint, None without one.
    trained_on: object = None

    @property
    def streams(self) -> bool:
        """Whether the run has begun, with images that were streamed."""
        return str(self.trained_on).startswith(STREAMED)


class Changes(NamedTuple):
    """What is different from the list that a run began with, by rows of that list."""

    images: ImageIndex
    gone: list[int]
    changed: list[int]
    # Names of files that were not there.
    added: list[str]
    # Rows of images that are in another class now.
    moved: list[int]


def write(run: Path, lists: Lists) -> None:
    """Write the lists of a run, compressed."""
    arrays: dict[str, Any] = {}
    for part, index in lists.items():
        arrays |= {f"{part}.{name}": getattr(index, name).numpy() for name in COLUMNS}
        heads = [index.head] if index.head else []
        texts = json.dumps([index.classes, index.tars, *heads]).encode()
        arrays[f"{part}.texts"] = np.frombuffer(texts, np.uint8)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    with output_errors(run):
        replace_file(run / LISTS, content.getvalue())


def read(run: Path) -> Lists:
    """Return the lists of a run, without their roots; empty if there are none, DataError if bad."""
    if not (run / LISTS).is_file():
        return {}
    lists: Lists = {}
    try:
        with np.load(run / LISTS, allow_pickle=False) as file:
            for part in sorted({name.partition(".")[0] for name in file.files}):
                columns: dict[str, Any] = {
                    name: torch.from_numpy(file[f"{part}.{name}"]) for name in COLUMNS
                }
                classes, tars, *heads = json.loads(file[f"{part}.texts"].tobytes())
                columns |= {"classes": tuple(classes), "tars": tuple(tars), "head": "".join(heads)}
                lists[part] = ImageIndex(run, **columns)
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise DataError(
            f"{shown(run / LISTS)}: can't be read ({shown(error)}); bring it back, or remove it to "
            "go on with the same files only"
        ) from error
    return lists


def settled(
    run: Begun | None, parts: Sequence[ImageIndex], skips: bool
) -> list[tuple[ImageIndex, Aside]]:
    """Return the lists for training and testing as a run reads them, with what it sets aside.

    These are those that the run began with, at the places where their files are now. Raises
    ConfigError if what has changed is neither asked for nor known from an earlier launch.
    """
    named = dict(zip(PARTS, parts, strict=False))
    if run is None or not run.streams:
        return [(index, Aside(index, skips)) for index in parts]
    before, noted = read(run.directory), set_aside.read(run.directory)
    if before and before.keys() != named.keys():
        raise ConfigError(
            f"{run.directory}: had images for {' and '.join(before)}, and now there are those for "
            f"{' and '.join(named)}; put them back, or give name=... for a new run"
        )
    found, more = [], False
    for part, index in named.items():
        begun = before.get(part, index)
        changes = Changes(index, [], [], [], [])
        if begun.fingerprint() != index.fingerprint():
            changes = _compared(begun, index)
        aside = Aside(changes.images, skips)
        aside.restore(noted.get(part))
        known = set(aside.rows)
        said = _settled(run.directory, changes, aside, begun)
        more = more or known != set(aside.rows)
        if aside.rows:
            said.append(f"{shown(index.root)}: {aside.sentence(aside.rows)}")
        for sentence in said:
            logger.warning(sentence)
        found.append((changes.images, aside))
    if more and comms.is_main():
        set_aside.write(run.directory, dict(zip(named, (aside for _, aside in found), strict=True)))
    return found


def state(*parts: object) -> dict[str, str]:
    """Return a fingerprint of where the files are now and which are set aside, by part.

    Machines may see a change of their shared files at different times.
    """
    found = {}
    for name, part in _streamed(parts).items():
        rows = torch.tensor(sorted(part.aside.rows), dtype=torch.int64)
        now = torch.cat([part.catalogue.sizes, part.catalogue.offsets, rows])
        found[name] = fingerprint.of_tensors(now)
    return found


def keep(run: Begun, *parts: object) -> None:
    """Write the lists of a run that begins, or that began before there were any."""
    streamed = _streamed(parts)
    if streamed and run.trained_on is None:
        set_aside.write(run.directory, {})
    if streamed and (run.trained_on is None or not (run.directory / LISTS).is_file()):
        write(run.directory, {name: part.catalogue for name, part in streamed.items()})


def share(run: Path, *parts: object) -> None:
    """Have all processes know which files one of them could not read, and note them in the run.

    `parts` are the images for training and testing. A collective; does nothing where they are in
    memory.
    """
    asides = {name: part.aside for name, part in _streamed(parts).items()}
    if not asides:
        return
    fresh = comms.gather_objects({name: dict(aside.fresh) for name, aside in asides.items()})
    for name, aside in asides.items():
        found = {row: why for each in fresh for row, why in sorted(each[name].items())}
        aside.fresh.clear()
        aside.take_over(found)
        if found and aside.skips:
            logger.warning("%s: %s", shown(aside.images.root), aside.sentence(found))
    if any(found for each in fresh for found in each.values()):
        peers.from_main(lambda: set_aside.write(run, asides))


def _streamed(parts: Sequence[object]) -> dict[str, StreamedImages]:
    """Return those of the parts that are streamed and not empty, by their names."""
    named = zip(PARTS, parts, strict=True)
    return {n: part for n, part in named if isinstance(part, StreamedImages) and len(part)}


def _compared(begun: ImageIndex, now: ImageIndex) -> Changes:
    """Return the list `begun` with the places that its files have in `now`, and what differs."""
    places = {label: row for row, label in enumerate(now.all_labels())}
    found = [places.pop(label, -1) for label in begun.all_labels()]
    rows = torch.tensor(found, dtype=torch.int64)
    kept = rows >= 0
    where = rows[kept]
    sizes = begun.sizes.clone()
    sizes[kept] = now.sizes[where]
    tar, offsets = begun.tar.clone(), begun.offsets.clone()
    if now.tars:
        tar[kept], offsets[kept] = now.tar[where], now.offsets[where]
    # Tars that are gone stay in the list, which names their members.
    tars = (*now.tars, *(name for name in begun.tars if name not in now.tars))
    number = torch.tensor([tars.index(name) for name in begun.tars] or [0])
    if now.tars:
        tar[~kept] = number[begun.tar[~kept]]
    names = [np.array([*index.classes, ""], dtype=object) for index in (begun, now)]
    classes = names[0][begun.labels[kept].numpy()], names[1][now.labels[where].numpy()]
    index = replace(
        begun,
        root=now.root,
        sizes=sizes,
        tars=tars,
        tar=tar,
        offsets=offsets,
        warnings=now.warnings,
        begun=begun.fingerprint(),
        rows=now.rows,
        head=now.head,
    )
    return Changes(
        index,
        (~kept).nonzero().flatten().tolist(),
        (sizes != begun.sizes).nonzero().flatten().tolist(),
        sorted(places),
        kept.nonzero().flatten()[torch.from_numpy(classes[0] != classes[1])].tolist(),
    )


def _settled(run: Path, changes: Changes, aside: Aside, begun: ImageIndex) -> list[str]:
    """Set aside what is gone; return what there is to say, or raise ConfigError."""
    gone = [row for row in changes.gone if row not in aside.rows]
    known = {*aside.rows, *aside.named}
    allowed = aside.skips or known.issuperset((*changes.gone, *changes.changed))
    few = len(changes.gone) <= max(1, MOST_GONE * len(begun))
    few = few and not (changes.images.rows and changes.images.begun)
    facts = [
        (len(changes.gone), "gone", _first(begun, changes.gone)),
        (len(changes.changed), "of another size", _first(begun, changes.changed)),
        (len(changes.moved), "in another class", _first(begun, changes.moved)),
        (len(changes.added), "new", shown(next(iter(changes.added), ""), 4096)),
    ]
    what = ", ".join(f"{count:,} {kind} (first {first})" for count, kind, first in facts if count)
    if changes.added or changes.moved or not allowed or not few:
        asked = ""
        if few and not (changes.added or changes.moved):
            asked = "give data.skip_unreadable=true to go on without those that are gone, "
        raise ConfigError(
            f"{run}: was trained on other images: of {len(begun):,} files in "
            f"{shown(changes.images.root)} there are {what or 'other shapes'}; put them back as "
            f"they were, {asked}or give name=... for a new run"
        )
    for row in gone:
        aside.rows[row] = GONE
    read_now = [row for row in changes.changed if row not in aside.rows]
    said = [f"{shown(changes.images.root)}: since this run began there are {what}"] if what else []
    if read_now:
        said.append(
            f"{shown(changes.images.root)}: {len(read_now):,} of these files are read as they are "
            f"now (first {_first(begun, read_now)})"
        )
    return said


def _first(index: ImageIndex, rows: Sequence[int]) -> str:
    return shown(index.label(rows[0]), 4096) if rows else ""
