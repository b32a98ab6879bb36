"""The pictures of a report: confusion matrices, maps of features and rows of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moco_dist.report.figures import BELOW, WIDTH, Picture, Theme, cut, drawn, set_fonts
from moco_dist.tracking import fonts

# Most classes that colours distinguish, and most whose names and numbers fit a matrix.
COLOURED, READABLE = 20, 30


def matrix(
    name: str, title: str, counts: Sequence[Sequence[float]], classes: Sequence[str]
) -> Picture:
    """Return a confusion matrix as shares of its rows, with percentages where they fit."""
    numbers = np.asarray(counts, float)
    shares = numbers / np.maximum(numbers.sum(1, keepdims=True), 1)
    readable = len(classes) <= READABLE
    side = min(7.6, 1.3 + 0.34 * len(classes)) if readable else 5.6
    names, note = fonts.drawable(classes) if readable else ([], "")

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(max(3.4, side), max(3.2, side)))
        axes = figure.subplots()
        colours = LinearSegmentedColormap.from_list("", [theme.paper, theme.curves[0]])
        axes.imshow(shares, cmap=colours, vmin=0, vmax=1)
        axes.grid(False)
        axes.set_title(title)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        if not readable:
            return figure
        axes.set_xlabel(f"predicted class\n{note}" if note else "predicted class")
        texts = [cut(each.text, 14) for each in names]
        axes.set_xticks(range(len(classes)), texts, rotation=90)
        axes.set_yticks(range(len(classes)), texts)
        for axis in (axes.xaxis, axes.yaxis):
            set_fonts(axis.get_ticklabels(), names)
        axes.tick_params(length=0)
        size = 8 if len(classes) <= 15 else 5
        for (row, column), share in np.ndenumerate(shares):
            ink = theme.paper if share > 0.55 else theme.ink
            text = f"{100 * share:.0f}"
            axes.text(column, row, text, color=ink, size=size, ha="center", va="center")
        return figure

    right = 100 * np.trace(numbers) / max(1.0, numbers.sum())
    wrong = numbers - np.diag(np.diag(numbers))
    row, column = divmod(int(wrong.argmax()), len(classes))
    alt = f"{title}: {right:.2f}% of {numbers.sum():.0f} images are on the diagonal."
    if wrong.any():
        alt += f" Most frequent confusion: {wrong[row, column]:.0f} images of {classes[row]} "
        alt += f"classified as {classes[column]}."
    return drawn(name, alt, draw)


def scatter(
    name: str,
    title: str,
    points: NDArray[np.floating],
    labels: NDArray[np.integer],
    classes: Sequence[str],
    axes_labels: tuple[str, str],
) -> Picture:
    """Return a map of points (n, 2), coloured by class; the label -1 means no class."""

    def draw(theme: Theme) -> Figure:
        coloured = 0 < len(classes) <= COLOURED
        columns = 4 if coloured and max(map(len, classes)) <= 10 else 3
        rows = math.ceil(len(classes) / columns) if coloured else 0
        figure = Figure(figsize=(WIDTH, 3.5 + 0.17 * rows))
        axes = figure.subplots()
        map_of_colours = matplotlib.colormaps["tab10" if len(classes) <= 10 else "tab20"]
        if coloured:
            handles = [
                _points(axes, points[labels == i], map_of_colours(i)) for i in range(len(classes))
            ]
            names, note = fonts.drawable(classes)
            style: Any = {"ncols": columns, "markerscale": 2.2, "handletextpad": 0.1}
            texts = [cut(each.text, 12) for each in names]
            legend = figure.legend(handles, texts, loc=BELOW, title=note, **style)
            set_fonts(legend.get_texts(), names)
        elif classes:
            many = matplotlib.colormaps["twilight_shifted"]
            _points(axes, points, many(labels / len(classes)))
        else:
            _points(axes, points, to_rgba(theme.curves[0]))
        axes.set_title(title)
        axes.set_xticks([], [])
        axes.set_yticks([], [])
        axes.set_xlabel(axes_labels[0])
        axes.set_ylabel(axes_labels[1])
        return figure

    named = f", coloured by {len(classes)} classes" if len(classes) else ""
    return drawn(name, f"{title}: {len(points)} images as points{named}.", draw)


def _points(axes: Axes, points: NDArray[np.floating], colour: Any) -> PathCollection:
    return axes.scatter(points[:, 0], points[:, 1], s=4, c=np.atleast_2d(colour), linewidths=0)


@dataclass(frozen=True)
class Tile:
    """An image, uint8 (height, width, 3), its caption, and whether it is a correct answer."""

    pixels: NDArray[np.uint8]
    text: str = ""
    good: bool | None = None


def show_tile(axes: Axes, tile: Tile, theme: Theme) -> None:
    """Draw an image above its caption; answers are framed and marked."""
    axes.imshow(tile.pixels, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    colour = {True: theme.curves[1], False: theme.control, None: theme.paper}[tile.good]
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=2)
    sign = {True: "✓ ", False: "✗ ", None: ""}[tile.good]
    ((text, font),), _ = fonts.drawable([tile.text])
    label = axes.set_xlabel(sign + text, size=7.5, color=theme.ink, labelpad=2)
    set_fonts([label], [fonts.Drawn(text, font)])


def tiles(name: str, rows: Sequence[Sequence[Tile]], alt: str, inches: float = 0.86) -> Picture:
    """Return rows of tiles as a picture."""

    def draw(theme: Theme) -> Figure:
        columns, text = len(rows[0]), 0.2 if any(t.text for row in rows for t in row) else 0.05
        size = (inches * columns, (inches + text) * len(rows))
        figure = Figure(figsize=size)
        figure.set_layout_engine("none")
        for y, row in enumerate(rows):
            for x, tile in enumerate(row):
                left, bottom = x / columns, 1 - (y + 1) / len(rows) + text / size[1]
                width, height = 0.94 / columns, (inches * 0.94) / size[1]
                axes = figure.add_axes((left, bottom, width, height))
                show_tile(axes, tile, theme)
        return figure

    return drawn(name, alt, draw)
