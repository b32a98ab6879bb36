"""The pictures of a pretraining: pairs of views, similarities, maps and neighbours."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from moco_dist.report import figures, pictures
from moco_dist.report.figures import Picture
from moco_dist.runs.record import Record, number, read_object

if TYPE_CHECKING:
    from moco_dist.report.encoder import Look

# Pictures of a run with more bytes or a longer side are left out.
MAX_BYTES, MAX_SIDE = 2**24, 8192
MAX_BINS = 10_000


@dataclass(frozen=True)
class Sight:
    """A picture, its step (None if it was drawn for this report), and its numbers in words."""

    picture: Picture
    step: int | None = None
    told: str = ""


def sights(record: Record, looked: Look | None, prefix: str) -> dict[str, Sight | None]:
    """Return the pictures, None where files are missing; `prefix` begins their names."""
    found = {
        "pairs": _pairs(record, looked, f"{prefix}pairs"),
        "similarity": _similarity(record, f"{prefix}similarity"),
        "pca": None,
        "tsne": None,
        "neighbours": _neighbours(record, looked, f"{prefix}neighbours"),
    }
    if looked:
        first, second = (100 * share for share in looked.variance)
        axes = f"component 1, {first:.1f}%", f"component 2, {second:.1f}%"
        content = looked.components, looked.labels, looked.classes, axes
        picture = pictures.scatter(f"{prefix}map_pca", "Features by PCA", *content)
        found["pca"] = Sight(picture, looked.step, f"{first + second:.1f}%")
    if looked and looked.embedding is not None:
        count = len(looked.embedding)
        content = looked.embedding, looked.labels[:count], looked.classes, ("", "")
        picture = pictures.scatter(f"{prefix}map_tsne", "Features by t-SNE", *content)
        found["tsne"] = Sight(picture, looked.step, f"{count:,}")
    return found


def _saved(record: Record, file: str, name: str, alt: str) -> Sight | None:
    """Return the newest readable picture `file` that the run has saved."""
    for path in sorted(record.directory.glob(f"media/step_*/{file}"), reverse=True):
        try:
            if path.stat().st_size > MAX_BYTES:
                continue
            content = path.read_bytes()
            with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
                if max(image.size) <= MAX_SIDE:
                    image.load()
                    step = int(path.parent.name.removeprefix("step_"))
                    return Sight(Picture(name, alt, *image.size, content), step)
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
            continue  # truncated, or still being written
    return None


def _pairs(record: Record, looked: Look | None, name: str) -> Sight | None:
    alt = "Two rows of images: each column holds two random views of the same image."
    if found := _saved(record, "views.png", name, alt):
        return found
    pairs = looked.pairs if looked else None
    return Sight(pictures.tiles(name, pairs, alt, inches=0.7)) if pairs else None


def _similarity(record: Record, name: str) -> Sight | None:
    title = "Similarity of queries and keys"
    for folder in sorted(record.directory.glob("media/step_*"), reverse=True):
        kinds = ("positive", "negative")
        bins = {f"{kind} pairs": _bins(folder / f"similarity_{kind}.json") for kind in kinds}
        if shown := {kind: found for kind, found in bins.items() if found}:
            told = ", ".join(f"{kind} {_mean(*found):.2f}" for kind, found in shown.items())
            picture = figures.histogram(name, title, shown, f"{title}, histogram; means: {told}.")
            step = folder.name.removeprefix("step_")
            return Sight(picture, int(step) if step.isdecimal() else 0, told)
    return None


def _bins(path: Path) -> tuple[list[float], list[float]] | None:
    """Return the counts and edges of a histogram's file, None if they are unusable."""
    content = read_object(path)
    counts, edges = (
        [n for each in found[: MAX_BINS + 1] if (n := number(each)) is not None and abs(n) < 2**53]
        if isinstance(found := content.get(key), list)
        else []
        for key in ("counts", "edges")
    )
    rising = all(a < b for a, b in pairwise(edges))
    usable = len(edges) == len(counts) + 1 > 1 and rising and min(counts) >= 0 < sum(counts)
    return (counts, edges) if usable else None


def _mean(counts: list[float], edges: list[float]) -> float:
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    return sum(c * m for c, m in zip(counts, middles, strict=True)) / sum(counts)


def _neighbours(record: Record, looked: Look | None, name: str) -> Sight | None:
    if looked is None:
        alt = "Rows of a validation image followed by its nearest training images."
        return _saved(record, "neighbours.png", name, alt)
    if not looked.neighbours:
        return None
    signs = [tile.good for row in looked.neighbours for tile in row if tile.good is not None]
    told = f"{sum(signs)} of {len(signs)} neighbours are of the query's class" if signs else ""
    alt = f"Rows of an image followed by its nearest other images. {told}".strip()
    return Sight(pictures.tiles(name, looked.neighbours, alt), None, told)
