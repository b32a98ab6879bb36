"""Draw the figure of the README, docs/images/demo.png, from a finished demo.

python docs/images/make_demo_figure.py runs/demo
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from moco_dist.report import curves, encoder, figures, pictures
from moco_dist.report.figures import Theme
from moco_dist.report.pictures import Tile
from moco_dist.runs import record

# All lengths are in inches. The figure is shown 760 pixels wide and has twice as many.
WIDTH, HEIGHT, MARGIN, TOP = 2 * 760 / figures.DPI, 3.88, 0.08, 0.32
# Distances between tiles of each kind, and the share of a distance that a tile fills.
VIEW, NEIGHBOUR, TILE = 0.47, 0.415, 0.9
NEIGHBOURS = 5
TARGET = Path(__file__).parent / "demo.png"


def main(run: Path) -> None:
    """Draw two views of eight images, the kNN accuracy, and the neighbours of eight images."""
    look = encoder.look(run)
    epochs, shares = curves.epochs(record.read(run), "knn/top1")
    percent = [100 * share for share in shares]
    bottom = TOP + len(look.neighbours) * NEIGHBOUR

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(WIDTH, HEIGHT))
        figure.set_layout_engine("none")

        def place(left: float, top: float, width: float, height: float) -> tuple[float, ...]:
            return left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT

        def title(left: float, top: float, text: str) -> None:
            x, y, _, _ = place(left, top - 0.1, 0, 0)
            figure.text(x, y, text, color=theme.ink, size=8.5, weight="bold")

        def show(tile: Tile, left: float, top: float, size: float) -> None:
            axes = figure.add_axes(place(left, top, TILE * size, TILE * size))  # type: ignore[arg-type]
            pictures.show_tile(axes, Tile(tile.pixels, "", tile.good), theme)
            axes.set_xlabel("")  # no signs: the frames are explained once

        title(MARGIN, TOP, "Two random views of eight drawn images")
        for y, row in enumerate(look.pairs):
            for x, tile in enumerate(row):
                show(tile, MARGIN + x * VIEW, TOP + y * VIEW, VIEW)

        top, left = TOP + 2 * VIEW + 0.42, MARGIN + 0.32
        title(MARGIN, top, "kNN accuracy on held-out images, %")
        width = MARGIN + 8 * VIEW - (1 - TILE) * VIEW - left
        axes = figure.add_axes(place(left, top, width, bottom - top - 0.18))  # type: ignore[arg-type]
        axes.plot(epochs, percent, color=theme.curves[0], marker=".", linewidth=1.6)
        axes.axhline(percent[0], color=theme.control, linestyle=figures.DASHES[0], linewidth=1.6)
        trained, random = (f"{percent[place]:.1f}" for place in (-1, 0))
        end = {"x": epochs[-1], "ha": "right", "size": 8.5}
        axes.text(y=percent[-1] - 18, s=f"trained encoder: {trained}", color=theme.curves[0], **end)
        axes.text(y=percent[0] + 4, s=f"random encoder: {random}", color=theme.control, **end)
        axes.set_xlim(0, epochs[-1] * 1.01)
        axes.set_ylim(0, 104)
        axes.set_xticks(range(0, round(epochs[-1]) + 1, 5))
        axes.set_yticks(range(0, 101, 25))
        axes.set_xlabel("epoch", labelpad=1)

        gap = 0.1
        left = WIDTH - MARGIN - (1 + NEIGHBOURS) * NEIGHBOUR + (1 - TILE) * NEIGHBOUR - gap
        title(left, TOP, "Nearest neighbours of test images")
        for y, row in enumerate(look.neighbours):
            for x, tile in enumerate(row[: 1 + NEIGHBOURS]):
                shift = x * NEIGHBOUR + (gap if x else 0)
                show(tile, left + shift, TOP + y * NEIGHBOUR, NEIGHBOUR)
        x, y, _, _ = place(left + NEIGHBOUR + gap, bottom + 0.12, 0, 0)
        for text, colour in (("same shape", theme.curves[1]), ("another shape", theme.control)):
            figure.text(x, y, text, color=colour, size=8.5, va="center")
            x += 1.0 / WIDTH
        return figure

    picture = figures.drawn("demo", "", draw)
    with Image.open(io.BytesIO(picture.light)) as image:
        image.convert("RGB").save(TARGET, optimize=True)
    print(f"{TARGET}: {TARGET.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
