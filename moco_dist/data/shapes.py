"""The built-in data set: ten classes of shapes drawn by code, with nothing to download.

An image shows nine copies of one shape, its class. Colours, places, sizes and turns of the copies
and the background have the same distribution in all classes, and all shapes cover the same area, so
that only the shape gives the class away and random encoders do badly. Two crops of an image show
different copies; what they share is the shape, which contrastive learning finds.

Image i is a function of (seed, i, size). It uses only operations that IEEE 754 rounds exactly, one
at a time (no sine, no fused product, no sum of free order), so that the bits, and the data set's
fingerprint, are the same on any machine and in chunks of any size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moco_dist.randomness import Purpose, uniform

# Copies lie on a grid of _SIDE x _SIDE cells, each moved by up to _JITTER cells either way.
_SIDE = 3
_COPIES = _SIDE * _SIDE
_JITTER = 0.25
# Share of the image that a copy covers, and the tangent of half the largest turn (11 degrees).
_AREA_MIN, _AREA_MAX = 0.035, 0.05
_HALF_TURN = 0.1
# Largest distance of the background's channels from gray, of a copy's from black or white.
_BACKGROUND = 0.1
_INK = 0.45
# The background is blended between colours drawn at _KNOTS x _KNOTS places.
_KNOTS = 3
# Half the width of a soft edge, in pixels.
_EDGE = 0.7
# Images of each class that are drawn at once, so that they fit a cache.
_ROUNDS = 10

_ROOT_HALF = math.sqrt(0.5)


def _circle(x: Tensor, y: Tensor, centre_x: float, centre_y: float, radius: float) -> Tensor:
    across, up = x - centre_x, y - centre_y
    return (across * across + up * up).sqrt() - radius


def _box(x: Tensor, y: Tensor, centre_y: float, width: float, height: float) -> Tensor:
    return torch.maximum(x.abs() - width, (y - centre_y).abs() - height)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(-y, x.abs() * math.sqrt(0.75) + y * 0.5) - 0.5


def _star(x: Tensor, y: Tensor) -> Tensor:
    # A point is inside a pentagram if it is inside four of the five lines: the second largest
    # distance decides.
    largest = second = x.new_tensor(-math.inf)
    for tip in range(5):
        angle = 2 * math.pi * tip / 5
        line = x * math.sin(angle) - y * math.cos(angle)
        second = torch.maximum(second, torch.minimum(largest, line))
        largest = torch.maximum(largest, line)
    return second - 0.36


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0, 0.95, 0.3), _box(x, y, 0, 0.3, 0.95))


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(_circle(x, y, 0, 0, 0.95), -_circle(x, y, 0.45, 0, 0.75))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    side, right = 0.52, x.abs()
    lobe = _circle(right, y, side * _ROOT_HALF, side * _ROOT_HALF - 0.25, side)
    return torch.minimum(lobe, (right + (y + 0.25).abs()) * _ROOT_HALF - side)


def _bars(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.5, 0.9, 0.28), _box(x, y, -0.5, 0.9, 0.28))


def _hourglass(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y.abs() - 0.9, (x.abs() - y.abs()) * _ROOT_HALF - 0.08)


# For each class: the approximate distance of points (x to the right, y upwards) from the edge,
# negative inside; and the shape's area in the same units.
_SHAPES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "disc": (lambda x, y: _circle(x, y, 0, 0, 1), math.pi),
    "ring": (lambda x, y: _circle(x, y, 0, 0, 1).abs() - 0.28, math.pi * 1.12),
    "square": (lambda x, y: _box(x, y, 0, 1, 1), 4.0),
    "triangle": (_triangle, 1.299),
    "star": (_star, 1.5235),
    "cross": (_cross, 1.92),
    "crescent": (_crescent, 1.3694),
    "heart": (_heart, 1.9307),
    "bars": (_bars, 2.016),
    "hourglass": (_hourglass, 2.0263),
}
CLASSES: tuple[str, ...] = tuple(_SHAPES)


def draw(count: int, size: int, seed: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Return uint8 images (count, 3, size, size), from number `first` on, and their classes.

    The class, int64 (count,), of an image is its number modulo 10, the place in `CLASSES`.
    """
    start, classes = first // len(CLASSES) * len(CLASSES), len(CLASSES)
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    for begin in range(start, first + count, _ROUNDS * classes):
        end = min(begin + _ROUNDS * classes, -(-(first + count) // classes) * classes)
        drawn = _draw_rounds(torch.arange(begin, end), size, seed)
        low, high = max(begin, first), min(end, first + count)
        images[low - first : high - first] = drawn[low - begin : high - begin]
    return images, torch.arange(first, first + count) % classes


def _draw_rounds(index: Tensor, size: int, seed: int) -> Tensor:
    """Return the images `index`, int64 (n,), starting with class 0: uint8 (n, 3, size, size)."""
    slots = torch.arange(8 * _COPIES + 2 + 3 * _KNOTS**2)
    numbers = uniform(seed, Purpose.SHAPES, index[:, None], slots).to(torch.float32)
    copies, shift, knots = numbers.split([8 * _COPIES, 2, 3 * _KNOTS**2], dim=1)
    images = _background(knots.reshape(-1, 3, _KNOTS, _KNOTS), size)
    places, turn, area, light, ink = copies.reshape(-1, _COPIES, 8).split([2, 1, 1, 1, 3], dim=2)
    cell = torch.arange(_COPIES)
    cells = torch.stack([cell % _SIDE, cell // _SIDE], dim=1) + 0.5
    centres = (cells + (places * 2 - 1) * _JITTER) * (1 / _SIDE) + shift[:, None]
    sides = (area * (_AREA_MAX - _AREA_MIN) + _AREA_MIN).sqrt()
    distance = _distances(centres, sides, turn, size) * size
    cover = (0.5 - distance * (0.5 / _EDGE)).clamp(0, 1)
    cover = cover * cover * (3 - cover * 2)  # smoothstep
    colours = torch.where(light < 0.5, ink * _INK, 1 - ink * _INK)
    for copy in range(_COPIES):
        images = images + cover[:, copy, None] * (colours[:, copy, :, None, None] - images)
    return (images * 255).round().to(torch.uint8)


def _background(knots: Tensor, size: int) -> Tensor:
    """Return `knots` (n, 3, k, k) in [0, 1) blended to seamless colours (n, 3, size, size)."""
    pixels = (knots * 2 - 1) * _BACKGROUND + 0.5
    place = (torch.arange(size) + 0.5) * (_KNOTS / size)
    before = place.floor().long()
    after, share = (before + 1) % _KNOTS, place - before
    above, below = pixels[..., before, :], pixels[..., after, :]
    pixels = above + share[:, None] * (below - above)
    return pixels[..., before] + share * (pixels[..., after] - pixels[..., before])


def _distances(centres: Tensor, sides: Tensor, turn: Tensor, size: int) -> Tensor:
    """Return the signed distances (n, copies, size, size) of pixels to copies, in image widths.

    `centres` (n, copies, 2), `sides` and `turn` (n, copies, 1). The image wraps around.
    """
    pixel = (torch.arange(size) + 0.5) * (1 / size)
    across, down = (pixel - centres.unsqueeze(3)).unbind(2)
    across = (across - across.round())[:, :, None, :]
    down = (down - down.round())[:, :, :, None]
    tangent = ((turn * 2 - 1) * _HALF_TURN).unsqueeze(3)  # of half the angle
    sides = sides.unsqueeze(3)
    square = tangent * tangent
    cosine, sine = (1 - square) / (1 + square) / sides, tangent * 2 / (1 + square) / sides
    x, y = cosine * across - sine * down, -(sine * across + cosine * down)
    distances = torch.empty_like(x)
    for number, (shape, area) in enumerate(_SHAPES.values()):
        unit = math.sqrt(area)
        own = slice(number, None, len(CLASSES))
        distances[own] = shape(x[own] * unit, y[own] * unit) * (1 / unit)
    return distances * sides
