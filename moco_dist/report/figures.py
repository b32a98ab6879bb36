"""The curves and histograms of a report, drawn for a light and a dark page."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.text import Text
from matplotlib.ticker import NullFormatter

from moco_dist.tracking import fonts

# Inches: one figure fills the screen of a phone, and two fill a line of text.
WIDTH, HEIGHT = 3.6, 2.5
# Dots per inch of the files, and CSS pixels per inch.
DPI, CSS = 220, 96
# A curve of more than MANY points is drawn as BINS means over a band from lowest to highest value.
MANY, BINS = 1000, 400
PLAIN = "DejaVu Sans"
# Place of a legend, and most entries in it.
BELOW: Final = "outside lower left"
ENTRIES = 8
# Random encoders share one colour; these patterns distinguish those of different runs.
DASHES = ("--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1.5)))


@dataclass(frozen=True)
class Picture:
    """A PNG for a light page and, if another, one for a dark page; sizes in CSS pixels."""

    name: str
    alt: str
    width: int
    height: int
    light: bytes
    dark: bytes | None = None


@dataclass(frozen=True)
class Theme:
    """Colours of a page, after Okabe and Ito's palette for colour-blind readers (2008).

    `control` marks random encoders and wrong answers; `curves` are the colours of runs.
    """

    paper: str
    ink: str
    quiet: str
    line: str
    control: str
    curves: tuple[str, ...]


LIGHT = Theme(
    *("#ffffff", "#1c2024", "#5b636b", "#dfe3e6", "#d55e00"),
    ("#0072b2", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#6b4fa0", "#444444"),
)
DARK = Theme(
    *("#14171a", "#e4e7ea", "#9aa3ac", "#30363c", "#ff9a4d"),
    ("#56b4e9", "#2fc79a", "#e39cc4", "#f0d04f", "#9ccff0", "#b39ae0", "#bbbbbb"),
)


@dataclass(frozen=True)
class Series:
    """A curve of run number `run`, or of its random encoder (`control`)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    run: int = 0
    control: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over a common axis, with a named value to compare them with (`reference`)."""

    name: str
    title: str
    series: Sequence[Series]
    x_label: str = "epoch"
    y_label: str = ""
    reference: tuple[float, str] | None = None
    may_be_logarithmic: bool = False  # if positive values differ widely

    @property
    def alt(self) -> str:
        """Return the curves in words."""
        return " ".join([f"{self.title} over {self.x_label}.", *map(_in_words, self.series)])


def _in_words(series: Series) -> str:
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
    """Return the picture that `draw` makes for each theme."""
    images = [_png(draw, theme) for theme in (LIGHT, DARK)]
    width, height = (round(CSS * inches) for inches in images[0][1])
    return Picture(name, alt, width, height, images[0][0], images[1][0])


def _png(draw: Callable[[Theme], Figure], theme: Theme) -> tuple[bytes, tuple[float, float]]:
    settings: Any = {
        "font.family": PLAIN,
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
        "lines.markersize": 4,
    }
    file = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure = draw(theme)
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    width, height = figure.get_size_inches()
    return file.getvalue(), (float(width), float(height))


def chart(content: Chart) -> Picture:
    """Return a chart as a picture."""
    return drawn(content.name, content.alt, lambda theme: draw_chart(content, theme))


def draw_chart(content: Chart, theme: Theme) -> Figure:
    """Return the figure of a chart, with one line for each series in order."""
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.subplots()
    lines = [_curve(axes, each, theme) for each in content.series]
    labels, note = fonts.drawable(each.label for each in content.series)
    entries = [(line, cut(label.text, 28)) for line, label in zip(lines, labels, strict=True)]
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
        if len(entries) > ENTRIES:
            more = f"and {len(entries) - ENTRIES} more"
            shown.append((axes.plot([], [], color="none")[0], more))
        handles, names = zip(*shown, strict=True)
        columns = 2 if max(map(len, names)) < 22 else 1
        figure.set_size_inches(WIDTH, HEIGHT + 0.17 * math.ceil(len(shown) / columns))
        legend = figure.legend(
            handles, names, loc=BELOW, ncols=columns, handlelength=1.8, title=note
        )
        set_fonts(legend.get_texts(), labels[: len(shown)])
    return figure


def set_fonts(texts: Iterable[Text], names: Sequence[fonts.Drawn]) -> None:
    """Give each text of a figure the font that has its letters."""
    for text, name in zip(texts, names, strict=False):
        if name.font != fonts.plain():
            fontManager.addfont(name.font)
            # The plain font still has the other letters, as those of an ellipsis or a number.
            family = FontProperties(fname=name.font).get_name()
            text.set_fontfamily([PLAIN, family])


def _curve(axes: Axes, series: Series, theme: Theme) -> matplotlib.lines.Line2D:
    x, y = np.asarray(series.x, float), np.asarray(series.y, float)
    y = np.where(np.isfinite(y), y, np.nan)
    colour = theme.control if series.control else theme.curves[series.run % len(theme.curves)]
    if len(x) > MANY:
        parts = np.array_split(np.arange(len(x)), BINS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a part without a finite value
            low, high = ([f(y[part]) for part in parts] for f in (np.nanmin, np.nanmax))
            x, y = (np.array([np.nanmean(v[part]) for part in parts]) for v in (x, y))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    marker = "." if len(x) <= 30 and not series.control else None
    style: Any = DASHES[series.run % len(DASHES)] if series.control else "-"
    (line,) = axes.plot(x, y, color=colour, linestyle=style, linewidth=1.4, marker=marker)
    return line


def histogram(
    name: str, title: str, parts: dict[str, tuple[list[float], list[float]]], alt: str
) -> Picture:
    """Return a histogram of shares; `parts` maps names to counts and edges of bins."""

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(WIDTH, HEIGHT + 0.17))
        axes = figure.subplots()
        shapes = []
        for (counts, edges), colour in zip(parts.values(), theme.curves[::3], strict=False):
            share = 100 * np.asarray(counts) / max(1.0, sum(counts))
            shapes.append(axes.stairs(share, edges, color=colour, fill=True, alpha=0.35))
            axes.stairs(share, edges, color=colour, linewidth=1.1)
        axes.set_title(title)
        axes.set_xlabel("cosine similarity")
        axes.set_ylabel("% of pairs in a bin")
        figure.legend(shapes, list(parts), loc=BELOW, ncols=2)
        return figure

    return drawn(name, alt, draw)


def cut(text: str, most: int) -> str:
    """Return a text of at most `most` characters, shortened in the middle."""
    end = most // 2
    return text if len(text) <= most else f"{text[: most - end - 1]}…{text[-end:]}"
