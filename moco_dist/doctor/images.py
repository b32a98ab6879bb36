"""What the doctor says about a data set: its parts, its files and their colours."""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from moco_dist.config.recipe import DataConfig
from moco_dist.data import file_sets, image_archive, image_file, tables, torchvision_sets
from moco_dist.data.file_sets import FileSet
from moco_dist.data.image_file import Place, Recipe
from moco_dist.doctor.finding import Finding
from moco_dist.errors import UserError, counted, shown
from moco_dist.randomness import Purpose, permutation

# Files, drawn at random from the whole set, that are decoded as a sample.
SAMPLED = 200
# Seconds in which other files are decoded, and the flag that lifts the limit.
SECONDS, ALL = 10.0, "--all-files"


def data(config: DataConfig, channels: int, seconds: float = SECONDS) -> tuple[list[Finding], int]:
    """Return what a sample of its files says about the data set, and its number of training images.

    Files are decoded for so many seconds. Nothing is downloaded, and no archive is unpacked; the
    number is 0 where that would be needed. Parquet files are made into the Arrow files that a run
    needs.
    """
    if config.name == "shapes":
        kept = _kept(config, config.shapes_train)
        return [Finding("data", f"shapes: draws {config.shapes_train:,} images")], kept
    if config.name in torchvision_sets.FOLDERS:
        place = torchvision_sets.place(config.name, Path(os.path.expanduser(config.root)))
        state = "is there" if place.is_dir() else "will be downloaded"
        return [Finding("data", f"{config.name}: {shown(place)} {state}")], 0
    try:
        if config.name == "huggingface" and tables.local(config.root) is None:
            later = "is read from the hub, or from the library's cache, at the start"
            return [Finding("data", f"huggingface: {shown(config.root)} {later}")], 0
        found, whole = _found(config)
    except UserError as error:
        return [Finding("data", shown(config.root), str(error))], 0
    if found is None:
        return [Finding("data", f"{shown(config.root)}: an archive, unpacked at the start")], 0
    places, others = found.train.all_places() if whole else [], list[Place]()
    if whole and found.test:
        others = found.test.all_places()
    recipe = Recipe(
        config.size, channels=channels, background=config.background, resize=config.resize
    )
    findings = _looked_at(config, recipe, places, others, seconds)
    classes = counted(len(found.train.classes), "class", "classes")
    tests = f", {len(found.test):,} for testing" if found.test else ""
    text = f"{counted(len(found.train), 'image')}{tests}, {classes}{findings[0].found}"
    findings[0] = replace(findings[0], found=text)
    if found.parts:
        findings.append(Finding("parts", found.parts))
    said = "see the warning below"
    findings += [Finding("files", said, warning=sentence) for sentence in found.warnings]
    if found.fault:
        findings.append(Finding("probe", said, warning=f"a probe will be refused: {found.fault}"))
    return findings, _kept(config, len(found.train))


def _kept(config: DataConfig, count: int) -> int:
    """Return how many of `count` images are for training and not for validation."""
    kept = count - round(config.validation * count)
    return min(kept, config.limit or kept)


def _found(config: DataConfig) -> tuple[FileSet | None, bool]:
    """Return the lists of the images, None where they are not known, and whether they are there."""
    root = Path(os.path.expanduser(config.root))
    if not root.is_file() or not image_archive.is_archive(root) or config.name != "folder":
        return file_sets.find(config, file_sets.root(config), file_sets.cache(config)), True
    if image_archive.place(root, file_sets.cache(config)).is_dir():
        return file_sets.find(config, file_sets.root(config), None), True
    if config.labels not in ("folders", "none"):
        return None, False  # the table may be in the archive
    with tempfile.TemporaryDirectory() as folder:
        if not image_archive.outline(root, Path(folder)):
            return None, False
        return file_sets.find(config, Path(folder), None), False


def _looked_at(
    config: DataConfig, recipe: Recipe, places: list[Place], others: list[Place], seconds: float
) -> list[Finding]:
    """Return what decoding the files says: the data set's line, and that of the colours.

    Sizes and colours are those of a sample of `places`. The rest, and then `others`, are decoded to
    find unreadable files, for so many seconds.
    """
    if not places:
        return [Finding("data", "")]
    order = permutation(len(places), 0, Purpose.SPLIT).tolist()
    sizes, squares, bad, flat, clear = [], [], [], [], 0
    for place in (places[number] for number in order[:SAMPLED]):
        try:
            content = image_file.read(place)
            pixels, transparent = image_file.square(content, recipe)
            sizes.append(image_file.opened(content).size)
        except Exception as error:  # decoders raise any kind for a bad file
            bad.append(_unreadable(place, error))
            continue
        squares.append(pixels)
        clear += transparent
        if (pixels == pixels[0, 0]).all():
            flat.append(shown(place, 4096))
    sampled, count = len(sizes) + len(bad), len(places) + len(others)
    rest, end = [places[number] for number in order[SAMPLED:]], time.monotonic() + seconds
    more, decoded = _decoded(rest, recipe, end)
    bad_tests, of_tests = _decoded(others, recipe, end)
    bad, decoded = bad + more, decoded + sampled
    fault = warning = ""
    if bad and not config.skip_unreadable:
        fault = (
            f"{len(bad)} of {decoded:,} {'decoded' if rest else 'sampled'} images can't be "
            f"read: {_first(bad)}; replace or remove them, or give data.skip_unreadable=true"
        )
    if flat:
        warning = (
            f"{len(flat)} of {sampled} sampled images have one colour: {_first(flat)}; remove "
            "them, or give another data.background if they are transparent"
        )
    (width, height) = [(min(side), max(side)) for side in zip(*sizes, strict=True)] or [(0, 0)] * 2
    share, decoded = "", decoded + of_tests
    out = len(bad) + len(bad_tests) if config.skip_unreadable else 0
    if rest or others:
        few = f"{decoded:,} of {count:,} decoded in {seconds:g} s ({ALL} decodes all)"
        share = f", all {count:,} decoded" if decoded == count else f", {few}"
    found = (
        f", {width[0]}-{width[1]} x {height[0]}-{height[1]} pixels in {sampled} sampled files"
        f"{f', {clear} of them transparent' if clear else ''}{share}"
        f"{f', {out} of them unreadable and left out' if out else ''}"
    )
    findings = [Finding("data", found, fault, warning), *([colors(squares)] if squares else [])]
    if bad_tests and not config.skip_unreadable:
        sentence = (
            f"{len(bad_tests)} of {of_tests:,} decoded test images can't be read: "
            f"{_first(bad_tests)}; a probe will be refused until they are replaced or removed"
        )
        findings.append(Finding("test images", f"{len(bad_tests)} unreadable", warning=sentence))
    return findings


def _decoded(places: list[Place], recipe: Recipe, end: float) -> tuple[list[str], int]:
    """Return the unreadable files among those that were decoded in time, and how many these are."""

    def wrong(place: Place) -> str:
        try:
            image_file.square(image_file.read(place), recipe)
        except Exception as error:
            return _unreadable(place, error)
        return ""

    bad, decoded = list[str](), 0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        while decoded < len(places) and time.monotonic() < end:
            part = places[decoded : decoded + SAMPLED]
            bad += filter(None, threads.map(wrong, part))
            decoded += len(part)
    return bad, decoded


def _unreadable(place: Place, error: Exception) -> str:
    return f"{shown(place, 4096)} ({shown(str(error) or type(error).__name__)})"


def _first(places: list[str]) -> str:
    return f"{', '.join(places[:3])}{', ...' if len(places) > 3 else ''}"


def colors(squares: list[image_file.Pixels]) -> Finding:
    """Return mean and standard deviation of each channel of images (size, size, c), in [0, 1]."""
    # Image by image: all of them at once in floating point would be gigabytes.
    mean = np.mean([each.mean((0, 1)) for each in squares], axis=0) / 255
    squared = np.mean([np.square(each, dtype=np.float64).mean((0, 1)) for each in squares], axis=0)
    std = np.sqrt(np.maximum(squared / 255**2 - mean**2, 0))
    means, stds = (",".join(f"{value:.4f}" for value in each) for each in (mean, std))
    found = f"views.mean=[{means}] views.std=[{stds}] are those of the sampled images"
    return Finding("colors", found)
