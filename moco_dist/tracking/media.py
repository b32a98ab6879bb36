"""Pictures of a run, as files: runs/NAME/media/step_00039000/*.png, and histograms as *.json.

Process 0 makes them without the others; W&B, TensorBoard and the report show them.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from moco_dist.config.recipe import ViewsConfig
from moco_dist.tracking import fonts

logger = logging.getLogger(__name__)

# Images in a picture, and neighbours of each.
ROWS, NEIGHBOURS = 8, 8
BINS = 64
# Pixels of the smallest tile, of a frame, and between tiles.
TILE, FRAME, GAP = 64, 3, 3
GREEN, RED, WHITE = (40, 160, 70), (210, 50, 50), (255, 255, 255)
READABLE = 30  # classes whose names and counts fit into a picture

Pixels = NDArray[np.uint8]


class Album:
    """The pictures of a run; the first that can't be written gives the only warning."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failed = False

    def views(self, step: int, first: Tensor, second: Tensor, config: ViewsConfig) -> None:
        """Save views.png: two views of each image, one below the other.

        Both are float (images, 3, size, size), normalised.
        """
        rows = [[_tile(view) for view in colours(part, config)] for part in (first, second)]
        self._save(step, "views.png", lambda path: _grid(rows).save(path))

    def neighbours(self, step: int, queries: Tensor, nearest: Tensor, right: Tensor) -> None:
        """Save neighbours.png: each query before its neighbours, framed green where `right`.

        `queries` is uint8 (n, 3, height, width), `nearest` (n, k, 3, height, width), `right` bool
        (n, k): whether the neighbour is of the query's class.
        """
        frames = [[WHITE, *(GREEN if good else RED for good in row)] for row in right.tolist()]
        images = torch.cat([queries[:, None], nearest], dim=1).cpu()
        rows = [list(map(_tile, *each)) for each in zip(images, frames, strict=True)]
        self._save(step, "neighbours.png", lambda path: _grid(rows).save(path))

    def histogram(self, step: int, name: str, similarities: Tensor) -> None:
        """Save NAME.json: counts of cosine similarities, of finite ones, and the bins' edges."""
        x = similarities.float()
        edges = torch.linspace(-1, 1, BINS + 1, device=x.device)
        # torch.histc has no deterministic kernel on GPUs. Rounding takes some beyond 1.
        below = [(x < edge).sum() for edge in edges[1:-1]]
        totals = torch.stack([(x == -torch.inf).sum(), *below, (x < torch.inf).sum()])
        counts = totals.diff().tolist()
        text = json.dumps({"counts": counts, "edges": edges.tolist()})
        self._save(step, f"{name}.json", lambda path: path.write_text(text))

    def confusion(self, step: int, counts: Tensor, classes: Sequence[str]) -> None:
        """Save confusion.png and .csv: `counts` is int64 (true class, predicted class)."""
        rows = [["", *classes], *([n, *c] for n, c in zip(classes, counts.tolist(), strict=True))]
        csv.writer(text := io.StringIO(), "unix", quoting=csv.QUOTE_NONNUMERIC).writerows(rows)
        content = text.getvalue().encode(errors="backslashreplace")
        self._save(step, "confusion.csv", lambda path: path.write_bytes(content))
        self._save(step, "confusion.png", lambda path: _matrix(counts, classes).save(path))

    def _save(self, step: int, name: str, write: Callable[[Path], object]) -> None:
        path = self.folder / f"step_{step:08d}" / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except OSError as error:
            if not self.failed:
                self.failed = True
                logger.warning("%s: can't be written (%s); the run continues", path, error)


def colours(views: Tensor, config: ViewsConfig) -> Tensor:
    """Return normalised views as uint8 (images, 3, size, size) on the CPU."""
    views = views.cpu()
    mean, std = (views.new_tensor(each)[:, None, None] for each in (config.mean, config.std))
    return ((views * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


@lru_cache
def _font(file: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, 10)


def _tile(image: Tensor, frame: tuple[int, int, int] = WHITE) -> Pixels:
    """Return a uint8 image (1 or 3, height, width) as (height, width, 3), enlarged and framed."""
    pixels: Pixels = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
    factor = max(1, TILE // min(pixels.shape[:2]))
    large = Image.fromarray(pixels.repeat(factor, 0).repeat(factor, 1))
    return np.asarray(ImageOps.expand(large, FRAME, frame))


def _grid(rows: Sequence[Sequence[Pixels]]) -> Image.Image:
    """Return the tiles of one size, row by row, on white."""
    height, width, _ = rows[0][0].shape
    size = len(rows[0]) * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP
    picture = Image.new("RGB", size, WHITE)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            picture.paste(Image.fromarray(tile), (x * (width + GAP), y * (height + GAP)))
    return picture


def _matrix(counts: Tensor, classes: Sequence[str]) -> Image.Image:
    """Return the matrix in shades of its rows' shares, true classes downwards."""
    shares = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    shade = (255 * (1 - shares)).round().to(torch.uint8).cpu().numpy()
    pixels = np.stack([shade, shade, np.full_like(shade, 255)], axis=-1)
    readable = len(classes) <= READABLE
    cell, left = (44, 110) if readable else (max(1, 800 // len(classes)), 0)
    side = cell * len(classes)
    names, note = fonts.drawable(classes) if readable else ([], "")
    size = max(left + side, 260 if note else 0), side + 20 * readable + (30 if note else 0)
    picture = Image.new("RGB", size, WHITE)
    matrix = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
    picture.paste(matrix, (left, 20 * readable))
    if readable:
        draw, font = ImageDraw.Draw(picture), _font(fonts.plain())
        draw.text((4, side + 22), note, (0, 0, 0), font)
        for y, (name, own) in enumerate(names):
            draw.text((4, 20 + cell * y + 15), name[:16], (0, 0, 0), _font(own))
            draw.text((left + cell * y + 2, 4), name[:6], (0, 0, 0), _font(own))
            for x, count in enumerate(counts[y].tolist()):
                ink = (255, 255, 255) if shares[y, x] > 0.6 else (0, 0, 0)
                draw.text((left + cell * x + 4, 20 + cell * y + 15), str(count), ink, font)
    return picture
