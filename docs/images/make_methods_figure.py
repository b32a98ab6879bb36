"""Draw the figure of docs/methods.md, docs/images/methods.png: figure 2 of the paper, and MoCo v3.

python docs/images/make_methods_figure.py
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TARGET = Path(__file__).parent / "methods.png"
# The figure is shown 860 pixels wide and has twice as many.
WIDTH, HEIGHT, DPI = 8.6, 3.5, 200
INK, GREY, LEARNS, KEPT, MOVED = "#1c2430", "#8791a0", "#2f6fb5", "#b8671d", "#3d8b57"
# Heights of the floors, from images to the loss, and the columns of queries and keys.
IMAGE, ENCODER, VECTOR, LOSS = 0.2, 0.95, 1.72, 2.5
QUERY, KEY = 0.47, 1.53
Point = tuple[float, float]
Style = str | tuple[float, tuple[float, float]]
DASHED, DOTTED = (0.0, (3.0, 1.6)), (0.0, (1.0, 1.0))


class Panel(NamedTuple):
    """A mechanism: its title, the configuration, and what makes its keys."""

    title: str
    keys: str
    encoder: str
    colour: str
    others: str
    is_memory: bool = False
    has_predictor: bool = False


PANELS = (
    Panel("(a) end-to-end, SimCLR", "batch, gradient", "encoder", LEARNS, "the step's vectors"),
    Panel(
        "(b) memory bank", "bank, gradient", "a vector for\neach image", KEPT, "drawn images", True
    ),
    Panel("(c) MoCo v1, v2", "queue, momentum", "momentum\nencoder", MOVED, "the newest keys"),
    Panel(
        *("MoCo v3", "batch, momentum", "momentum\nencoder", MOVED, "the step's keys"),
        has_predictor=True,
    ),
)


def box(
    axes: Axes, x: float, y: float, text: str, colour: str, high: float = 0.4, wide: float = 0.8
) -> None:
    """Draw a box around a text, its middle at x, y."""
    corner = (x - wide / 2, y - high / 2)
    shape = FancyBboxPatch(corner, wide, high, boxstyle="round,pad=0,rounding_size=0.07")
    shape.set(facecolor=colour + "22", edgecolor=colour, linewidth=1.1)
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", size=7.2, color=INK, linespacing=1.15)


def line(axes: Axes, tail: Point, head: Point, colour: str, style: Style = "-") -> None:
    """Draw an arrow from `tail` to `head`."""
    arrow = FancyArrowPatch(tail, head, arrowstyle="-|>", mutation_scale=7, shrinkA=0, shrinkB=0)
    arrow.set(color=colour, linestyle=style, linewidth=1.1)
    axes.add_patch(arrow)


def way(axes: Axes, start: Point, end: Point, back: bool) -> None:
    """Draw the way of a vector, and with `back` that of its gradient next to it."""
    line(axes, start, end, INK)
    if back:
        (x, y), (u, v) = start, end
        line(axes, (u + 0.12, v), (x + 0.12, y), LEARNS, DASHED)


def draw(axes: Axes, panel: Panel) -> None:
    """Draw one mechanism."""
    axes.set(xlim=(0, 2), ylim=(-0.1, 3.3), aspect="equal")
    axes.axis("off")
    axes.text(1, 3.25, panel.title, ha="center", va="top", size=8.8, weight="bold", color=INK)
    axes.text(1, 2.98, panel.keys, ha="center", va="top", size=7.6, color=GREY)
    gradient = panel.colour == LEARNS
    box(axes, 1, LOSS, "contrastive loss", INK, 0.3, 1.1)
    box(axes, QUERY, ENCODER, "encoder,\npredictor" if panel.has_predictor else "encoder", LEARNS)
    box(axes, KEY, ENCODER, panel.encoder, panel.colour)
    for x, name, back in ((QUERY, "q", True), (KEY, "k", gradient)):
        axes.text(x, VECTOR, f"${name}$", ha="center", va="center", size=10, color=INK)
        way(axes, (x, ENCODER + 0.22), (x, VECTOR - 0.13), back)
        way(axes, (x, VECTOR + 0.13), (1 + (x - 1) * 0.6, LOSS - 0.17), back)
        if x == QUERY or not panel.is_memory:
            image = f"$x^{{{name}}}$"
            axes.text(x, IMAGE, image, ha="center", va="center", size=10, color=INK)
            line(axes, (x, IMAGE + 0.14), (x, ENCODER - 0.22), INK)
    if gradient:
        axes.plot((QUERY + 0.41, KEY - 0.41), (ENCODER, ENCODER), color=LEARNS, linewidth=1.1)
        axes.text(1, ENCODER + 0.05, "one", ha="center", size=6.4, color=LEARNS)
    elif panel.is_memory:
        line(axes, (QUERY + 0.2, VECTOR - 0.05), (KEY - 0.3, ENCODER + 0.22), KEPT, DOTTED)
    else:
        line(axes, (QUERY + 0.41, ENCODER), (KEY - 0.41, ENCODER), MOVED, DOTTED)
    axes.text(1, -0.04, f"negatives: {panel.others}", ha="center", size=7.6, color=INK)


def main() -> None:
    """Draw the panels and what their lines mean."""
    figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, facecolor="white")
    for place, panel in enumerate(PANELS):
        draw(figure.add_axes((place / 4, 0.09, 0.25, 0.9)), panel)
    signs = (
        (0.03, "-", INK, "vectors"),
        (0.17, DASHED, LEARNS, "gradients"),
        (0.34, DOTTED, MOVED, "weights follow the encoder's by momentum"),
        (0.71, DOTTED, KEPT, "vectors follow the queries by momentum"),
    )
    axes = figure.add_axes((0, 0, 1, 0.09))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    for x, style, colour, text in signs:
        axes.plot((x, x + 0.03), (0.5, 0.5), color=colour, linestyle=style, linewidth=1.3)
        axes.text(x + 0.036, 0.5, text, va="center", size=7, color=INK)
    figure.savefig(TARGET)


if __name__ == "__main__":
    main()
