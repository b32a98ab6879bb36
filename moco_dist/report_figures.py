"""The figures of a report: curves, histograms, matrices, maps, for a light and a dark page."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from moco_dist.report_html import Picture

# Inches; a small figure is as wide as the page of a phone, two of them as a page of text.
WIDTH, HEIGHT = 3.6, 2.5
# Dots per inch of the files, and CSS pixels per inch.
DPI, CSS = 220, 96
# Points of a curve above which it is drawn as means, inside the range of what they are means of.
MANY = 1000
BINS = 400
# Legend entries and classes that can be told apart.
ENTRIES, COLOURED, READABLE = 8, 20, 30


@dataclass(frozen=True)
class Theme:
    """Colours of a page; the curves are those of Okabe and Ito (2008), for all kinds of eyes."""

    paper: str
    ink: str
    quiet: str
    line: str
    curves: tuple[str, ...]


LIGHT = Theme(
    *("#ffffff", "#1c2024", "#5b636b", "#dfe3e6"),
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#6b4fa0", "#444444"),
)
DARK = Theme(
    *("#14171a", "#e4e7ea", "#9aa3ac", "#30363c"),
    ("#56b4e9", "#ff9a4d", "#2fc79a", "#e39cc4", "#f0d04f", "#9ccff0", "#b39ae0", "#bbbbbb"),
)


@dataclass(frozen=True)
class Series:
    """A curve: `colour` is the place of its run, and a dashed one is a control."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over a common axis; `reference` is a value to compare with, and what it is."""

    name: str
    title: str
    series: Sequence[Series]
    x_label: str = "epoch"
    y_label: str = ""
    reference: tuple[float, str] | None = None
    # Whether the values, all above 0, are on a logarithmic axis if they differ widely.
    may_be_logarithmic: bool = False

    @property
    def alt(self) -> str:
        """Return the curves in words."""
        told = [_told(each) for each in self.series]
        return f"{self.title} over {self.x_label}. " + " ".join(filter(None, told))


def _told(series: Series) -> str:
    pairs = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    if not pairs:
        return f"{series.label}: no finite value."
    (first_x, first), (last_x, last) = pairs[0], pairs[-1]
    low, high = min(y for _, y in pairs), max(y for _, y in pairs)
    return (
        f"{series.label}: from {first:.4g} at {first_x:.4g} to {last:.4g} at {last_x:.4g}, "
        f"between {low:.4g} and {high:.4g}."
    )


def drawn(name: str, alt: str, draw: Callable[[Theme], Figure]) -> Picture:
    """Return what `draw` draws, for both pages."""
    images = [_png(draw, theme) for theme in (LIGHT, DARK)]
    width, height = (round(CSS * inches) for inches in images[0][1])
    return Picture(name, alt, width, height, images[0][0], images[1][0])


def _png(draw: Callable[[Theme], Figure], theme: Theme) -> tuple[bytes, tuple[float, float]]:
    settings: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.quiet,
        "axes.labelcolor": theme.quiet,
        "axes.titlecolor": theme.ink,
        "axes.grid": True,
        "grid.color": theme.line,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "xtick.color": theme.quiet,
        "ytick.color": theme.quiet,
        "text.color": theme.ink,
        "text.parse_math": False,  # a name may hold a $
        "figure.facecolor": theme.paper,
        "figure.constrained_layout.use": True,
        "legend.frameon": False,
        "legend.fontsize": 7.5,
    }
    file = io.BytesIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # A name may be of a script that the font lacks; the page itself shows it.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = draw(theme)
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    width, height = figure.get_size_inches()
    return file.getvalue(), (float(width), float(height))


def chart(content: Chart) -> Picture:
    """Return curves as a picture."""
    return drawn(content.name, content.alt, lambda theme: curves(content, theme))


def curves(content: Chart, theme: Theme) -> Figure:
    """Return the figure of a chart: one line for each series, in their order."""
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.subplots()
    lines = [_curve(axes, each, theme) for each in content.series]
    entries = [(line, _cut(s.label, 28)) for line, s in zip(lines, content.series, strict=True)]
    if content.reference:
        value, name = content.reference
        entries.append((axes.axhline(value, color=theme.quiet, linewidth=0.9, linestyle=":"), name))
    axes.set_title(content.title)
    axes.set_xlabel(content.x_label)
    axes.set_ylabel(content.y_label)
    axes.margins(x=0.02)
    finite = [y for each in content.series for y in each.y if math.isfinite(y)]
    if content.may_be_logarithmic and finite and 0 < 20 * min(finite) < max(finite):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if len(entries) > 1:
        shown = entries[:ENTRIES]
        more = [f"and {len(entries) - ENTRIES} more"] if len(entries) > ENTRIES else []
        if more:
            shown.append((axes.plot([], [], color="none")[0], more[0]))
        handles, names = zip(*shown, strict=True)
        columns = 2 if max(map(len, names)) < 22 else 1
        figure.set_size_inches(WIDTH, HEIGHT + 0.17 * math.ceil(len(shown) / columns))
        _legend(figure, handles, names, ncols=columns, handlelength=1.8)
    return figure


def _curve(axes: Axes, series: Series, theme: Theme) -> matplotlib.lines.Line2D:
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    y = np.where(np.isfinite(y), y, np.nan)
    colour = theme.curves[series.colour % len(theme.curves)]
    if len(x) > MANY:
        parts = np.array_split(np.arange(len(x)), BINS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a part without a finite value
            low, high = ([f(y[part]) for part in parts] for f in (np.nanmin, np.nanmax))
            x, y = (np.array([np.nanmean(v[part]) for part in parts]) for v in (x, y))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    marker = "." if len(x) <= 30 else None
    style = "--" if series.dashed else "-"
    (line,) = axes.plot(x, y, style, color=colour, linewidth=1.3, marker=marker, markersize=4)
    return line


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str], **style: Any) -> None:
    figure.legend(handles, names, loc="outside lower left", **style)


def histogram(
    name: str, title: str, parts: dict[str, tuple[list[float], list[float]]], alt: str
) -> Picture:
    """Return shares of counts; `parts` has counts and edges of bins under what they are of."""

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(WIDTH, HEIGHT + 0.17))
        axes = figure.subplots()
        shapes = []
        for (counts, edges), colour in zip(parts.values(), theme.curves, strict=False):
            share = 100 * np.asarray(counts) / max(1.0, sum(counts))
            shapes.append(axes.stairs(share, edges, color=colour, fill=True, alpha=0.35))
            axes.stairs(share, edges, color=colour, linewidth=1.1)
        axes.set_title(title)
        axes.set_xlabel("cosine similarity")
        axes.set_ylabel("% of pairs in a bin")
        _legend(figure, shapes, list(parts), ncols=2)
        return figure

    return drawn(name, alt, draw)


def matrix(
    name: str, title: str, counts: Sequence[Sequence[float]], classes: Sequence[str]
) -> Picture:
    """Return a confusion matrix in shares of its rows, with percentages where they can be read."""
    numbers = np.asarray(counts, float)
    shares = numbers / np.maximum(numbers.sum(1, keepdims=True), 1)
    readable = len(classes) <= READABLE
    side = min(7.6, 1.3 + 0.34 * len(classes)) if readable else 5.6

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
        cut = [_cut(each, 14) for each in classes]
        axes.set_xticks(range(len(classes)), cut, rotation=90)
        axes.set_yticks(range(len(classes)), cut)
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
    worst = (
        f" Most frequent confusion: {wrong[row, column]:.0f} images of {classes[row]} taken for "
        f"{classes[column]}."
        if wrong.any()
        else ""
    )
    alt = f"{title}: {right:.2f} % of {numbers.sum():.0f} images are on the diagonal.{worst}"
    return drawn(name, alt, draw)


def scatter(
    name: str,
    title: str,
    points: NDArray[np.floating],
    labels: NDArray[np.integer],
    classes: Sequence[str],
    axes_labels: tuple[str, str],
) -> Picture:
    """Return a map of points (n, 2), coloured by class; -1 is an image without one."""

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
            cut = [_cut(each, 12) for each in classes]
            _legend(figure, handles, cut, ncols=columns, markerscale=2.2, handletextpad=0.1)
        else:
            many = matplotlib.colormaps["twilight_shifted"]
            colours = (
                many(labels / max(1, len(classes))) if len(classes) else to_rgba(theme.curves[0])
            )
            _points(axes, points, colours)
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
    """An image, uint8 (height, width, 3), what stands below it, and whether that is good news."""

    pixels: NDArray[np.uint8]
    text: str = ""
    good: bool | None = None


def tiles(name: str, rows: Sequence[Sequence[Tile]], alt: str, inches: float = 0.86) -> Picture:
    """Return rows of images; those with good or bad news are framed, with a sign before it."""

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
                axes.imshow(tile.pixels, interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(False)
                colour = {True: theme.curves[2], False: theme.curves[1], None: theme.paper}
                for spine in axes.spines.values():
                    spine.set(visible=True, color=colour[tile.good], linewidth=2)
                sign = {True: "✓ ", False: "✗ ", None: ""}[tile.good]
                axes.set_xlabel(sign + tile.text, size=7.5, color=theme.ink, labelpad=2)
        return figure

    return drawn(name, alt, draw)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
