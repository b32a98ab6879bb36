"""What a report shows of a pretraining beside its curves: pairs, similarities, map, neighbours."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from moco_dist.report import figures, pictures
from moco_dist.report.markup import Gallery, Html, Picture, element
from moco_dist.runs.record import Record, number, read_object

if TYPE_CHECKING:
    from moco_dist.report.encoder import Look

# Bytes and pixels of a side above which a picture of the run is left out.
MAX_BYTES, MAX_SIDE = 2**24, 8192
MAX_BINS = 10_000


def parts(
    record: Record, looked: Look | str | None, gallery: Gallery, prefix: str
) -> Iterator[Html]:
    """Yield what is shown of a pretraining; the names of its pictures begin with `prefix`.

    `looked` is what its encoder makes of some images, or why that can't be shown, in words.
    """
    yield from _pairs(record, looked, gallery, prefix)
    yield from _similarities(record, gallery, prefix)
    if isinstance(looked, str):
        yield note(f"No map of the features, and no neighbours by this report: {looked}.")
    if looked is None or isinstance(looked, str):
        if found := newest(record, "neighbours.png"):
            step, picture = found
            alt = "Rows of a validation image followed by its nearest training images."
            yield gallery.show(
                stored(f"{prefix}neighbours", alt, picture),
                f"Validation images, each before its nearest training images at step {step:,}; a "
                "green frame is an image of the same class, a red one of another.",
            )
        return
    yield from _map(looked, gallery, prefix)
    yield from _neighbours(looked, gallery, prefix)


def note(text: str) -> Html:
    """Return a remark."""
    return element("p", text, class_="note")


def newest(record: Record, name: str) -> tuple[int, bytes] | None:
    """Return step and content of the newest picture of the run with that name, None without."""
    for path in sorted(record.directory.glob(f"media/step_*/{name}"), reverse=True):
        try:
            if path.stat().st_size > MAX_BYTES:
                continue
            content = path.read_bytes()
            with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
                if max(image.size) <= MAX_SIDE:
                    image.load()
                    return int(path.parent.name.removeprefix("step_")), content
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
            continue  # of a run that is writing it, or cut short
    return None


def stored(name: str, alt: str, content: bytes) -> Picture:
    """Return a picture that the run has saved, for light and dark pages alike."""
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        width, height = image.size
    return Picture(name, alt, width, height, content)


def _pairs(
    record: Record, looked: Look | str | None, gallery: Gallery, prefix: str
) -> Iterator[Html]:
    alt = "Two rows of images: above and below each other are two random views of the same image."
    what = (
        "Positive pairs as the encoder sees them: above the view of the query, below that of its "
        "key. What they have in common is all that the encoder can learn."
    )
    if found := newest(record, "views.png"):
        step, picture = found
        yield gallery.show(
            stored(f"{prefix}pairs", alt, picture), f"{what} Of the batch of step {step:,}."
        )
    elif looked and not isinstance(looked, str) and looked.pairs:
        tiles = pictures.tiles(f"{prefix}pairs", looked.pairs, alt, inches=0.7)
        yield gallery.show(
            tiles, f"{what} Drawn for this report, by the recipe of the run; it saved none itself."
        )
    else:
        yield note(
            "No positive pairs: the run has saved no pictures yet "
            "(tracking.media_every_epochs says when), and its images can't be read here."
        )


def _similarities(record: Record, gallery: Gallery, prefix: str) -> Iterator[Html]:
    for folder in sorted(record.directory.glob("media/step_*"), reverse=True):
        found = {
            f"{kind} pairs": _bins(folder / f"similarity_{kind}.json")
            for kind in ("positive", "negative")
        }
        shown = {name: bins for name, bins in found.items() if bins}
        if not shown:
            continue
        means = {name: _mean(*bins) for name, bins in shown.items()}
        told = ", ".join(f"{name} {mean:.2f} on average" for name, mean in means.items())
        title = "Similarity of queries and keys"
        picture = figures.histogram(
            f"{prefix}similarity", title, shown, f"{title}, histogram: {told}."
        )
        step = folder.name.removeprefix("step_").lstrip("0") or "0"
        yield gallery.show(
            picture,
            f"Cosine similarities in the batch of step {step}: {told}. The less the two overlap, "
            "the better an image is told from others.",
        )
        return


def _bins(path: Path) -> tuple[list[float], list[float]] | None:
    """Return counts and edges of a histogram's file, None if it has none."""
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


def _map(looked: Look, gallery: Gallery, prefix: str) -> Iterator[Html]:
    first, second = looked.variance
    axes = f"component 1, {100 * first:.1f} %", f"component 2, {100 * second:.1f} %"
    images = f"{looked.images:,} {looked.part} images"
    shown = [
        gallery.show(
            pictures.scatter(
                f"{prefix}map_pca",
                "Features by PCA",
                looked.components,
                looked.labels,
                looked.classes,
                axes,
            ),
            f"Backbone features (unit length) of {images} at step {looked.step:,}, along the two "
            f"directions of most variance, which hold {100 * (first + second):.1f} % of it.",
        )
    ]
    if looked.embedding is not None:
        count = len(looked.embedding)
        shown.append(
            gallery.show(
                pictures.scatter(
                    f"{prefix}map_tsne",
                    "Features by t-SNE",
                    looked.embedding,
                    looked.labels[:count],
                    looked.classes,
                    ("", ""),
                ),
                f"The same features of {count:,} of them by t-SNE: neighbours stay neighbours, "
                "while sizes of groups and distances between them mean nothing.",
            )
        )
    yield element("div", *shown, class_="figures")
    remarks = []
    if not looked.classes:
        remarks.append("The data have no classes to colour it by.")
    elif len(looked.classes) > pictures.COLOURED:
        remarks.append(
            f"Colours run around a circle, as {len(looked.classes)} classes are too many to tell."
        )
    if looked.embedding is None:
        remarks.append("A second map, by t-SNE, comes with pip install scikit-learn.")
    if remarks:
        yield note(" ".join(remarks))


def _neighbours(looked: Look, gallery: Gallery, prefix: str) -> Iterator[Html]:
    if not looked.neighbours:
        return
    signs = [tile.good for row in looked.neighbours for tile in row if tile.good is not None]
    right = f"{sum(signs)} of {len(signs)} neighbours are of the query's class" if signs else ""
    alt = f"Rows of an image followed by its nearest others. {right}".strip()
    framed = f" ✓ is an image of the same class, ✗ one of another: {right}." if signs else ""
    yield gallery.show(
        pictures.tiles(f"{prefix}neighbours", looked.neighbours, alt),
        f"Left, {looked.part} images; beside each the nearest of {looked.images - 1:,} others "
        f"by cosine similarity of backbone features, which stands below.{framed}",
    )
