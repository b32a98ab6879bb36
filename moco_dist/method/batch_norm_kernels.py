"""Grouped BatchNorm on a GPU: four Triton kernels, whatever the number of groups.

Tensors are channels_last: their memory is (groups, pixels, channels), where the pixels of a group
are those of all its images. Sums over pixels are split over blocks, and the blocks' results are
combined in order, without atomics: the same input gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import os
from typing import Any

# Triton 3.9 warns until one of the two is chosen.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Pixels and channels that a program holds at once.
_ROWS, _COLUMNS = 64, 64
# Blocks of a group whose sums are combined, at most: every program reads them all.
_MOST = 64
# Programs that keep a GPU busy.
_PROGRAMS = 1024

# One compilation for all sizes; only the number of channels decides how wide a load may be.
_kernel = triton.jit(do_not_specialize=["pixels", "each", "blocks", "mine"])


@_kernel
def _moments(
    x,
    means,
    squares,
    pixels,
    channels,
    each,
    wide: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Write the mean and the sum of squared deviations of each block of `each` pixels."""
    group, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    c = tl.program_id(2) * columns + tl.arange(0, columns)
    last = tl.minimum((block + 1) * each, pixels)
    start = group.to(tl.int64) * pixels * channels
    # Sums of what is left of each value once about the mean is gone, which loses no digits.
    row = tl.minimum(block * each + tl.arange(0, rows), last - 1)
    known = (c < channels)[None, :]
    near = tl.load(x + start + row[:, None] * channels + c[None, :], known, 0.0).to(wide)
    near = tl.sum(near, 0)[None, :] / rows
    sums, squared = tl.zeros([rows, columns], wide), tl.zeros([rows, columns], wide)
    for first in range(block * each, last, rows):
        row = first + tl.arange(0, rows)
        inside = (row < last)[:, None] & known
        part = tl.load(x + start + row[:, None] * channels + c[None, :], inside, 0.0).to(wide)
        apart = tl.where(inside, part - near, 0.0)
        sums += apart
        squared += apart * apart
    count = tl.zeros([1], wide) + (last - block * each)
    whole = tl.sum(sums, 0)
    mean = tl.sum(near, 0) + whole / count
    square = tl.sum(squared, 0) - whole * whole / count
    to = (group * blocks + block) * channels + c
    tl.store(means + to, mean, c < channels)
    tl.store(squares + to, square, c < channels)


@_kernel
def _normalize(
    x,
    y,
    means,
    squares,
    weight,
    bias,
    used,
    running_mean,
    running_var,
    pixels,
    channels,
    blocks,
    each,
    mine,
    momentum: tl.constexpr,
    eps: tl.constexpr,
    wide: tl.constexpr,
    most: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Combine the moments of all blocks and write `mine` pixels of `y`.

    The first program of a group also writes its mean and inverse deviation to `used`, and moves
    the running statistics.
    """
    group, block = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * columns + tl.arange(0, columns)
    known = c < channels
    other = tl.arange(0, most)
    there = (other < blocks)[:, None] & known[None, :]
    theirs = (group * blocks + other)[:, None] * channels + c[None, :]
    count = tl.maximum(tl.minimum(pixels - other * each, each), 0).to(wide)[:, None]
    their_means = tl.load(means + theirs, there, 0.0)
    mean = tl.sum(their_means * count, 0) / pixels
    their_change = their_means - mean[None, :]
    their_squares = tl.load(squares + theirs, there, 0.0)
    square = tl.sum(their_squares + their_change * their_change * count, 0)
    inverse = 1.0 / tl.sqrt(square / pixels + eps)
    own = group * channels + c
    if block == 0:
        tl.store(used + own, mean, known)
        tl.store(used + tl.num_programs(0) * channels + own, inverse, known)
        old = tl.load(running_mean + own, known)
        tl.store(running_mean + own, old + (mean - old) * momentum, known)
        spread = tl.load(running_var + own, known)
        unbiased = square / (pixels - 1)
        tl.store(running_var + own, spread + (unbiased - spread) * momentum, known)
    scale, shift = inverse * tl.load(weight + c, known), tl.load(bias + c, known)
    start = group.to(tl.int64) * pixels * channels
    last = tl.minimum((block + 1) * mine, pixels)
    for first in range(block * mine, last, rows):
        row = first + tl.arange(0, rows)
        inside = (row < last)[:, None] & known[None, :]
        at = start + row[:, None] * channels + c[None, :]
        part = (tl.load(x + at, inside, 0.0).to(wide) - mean[None, :]) * scale[None, :]
        tl.store(y + at, (part + shift[None, :]).to(y.dtype.element_ty), inside)


@_kernel
def _gradient_sums(
    dy,
    x,
    used,
    sums,
    pixels,
    channels,
    each,
    wide: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Write each block's sums of `dy` and of `dy` times the normalised `x`."""
    group, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    groups = tl.num_programs(0)
    c = tl.program_id(2) * columns + tl.arange(0, columns)
    known = c < channels
    mean = tl.load(used + group * channels + c, known)
    inverse = tl.load(used + (groups + group) * channels + c, known)
    last = tl.minimum((block + 1) * each, pixels)
    start = group.to(tl.int64) * pixels * channels
    plain, unit = tl.zeros([rows, columns], wide), tl.zeros([rows, columns], wide)
    for first in range(block * each, last, rows):
        row = first + tl.arange(0, rows)
        inside = (row < last)[:, None] & known[None, :]
        at = start + row[:, None] * channels + c[None, :]
        of_y = tl.load(dy + at, inside, 0.0).to(wide)
        apart = tl.load(x + at, inside, 0.0).to(wide) - mean[None, :]
        plain += of_y
        unit += of_y * apart
    to = (group * blocks + block) * channels + c
    tl.store(sums + to, tl.sum(plain, 0), known)
    tl.store(sums + groups * blocks * channels + to, tl.sum(unit, 0) * inverse, known)


@_kernel
def _gradient(
    dy,
    x,
    dx,
    used,
    sums,
    weight,
    of_groups,
    pixels,
    channels,
    blocks,
    mine,
    wide: tl.constexpr,
    most: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Combine the sums of all blocks and write `mine` pixels of `dx`.

    The first program of a group also writes its share of the gradients of bias and weight.
    """
    group, block, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    c = tl.program_id(2) * columns + tl.arange(0, columns)
    known = c < channels
    other = tl.arange(0, most)
    there = (other < blocks)[:, None] & known[None, :]
    theirs = (group * blocks + other)[:, None] * channels + c[None, :]
    plain = tl.sum(tl.load(sums + theirs, there, 0.0), 0)
    unit = tl.sum(tl.load(sums + groups * blocks * channels + theirs, there, 0.0), 0)
    if block == 0:
        tl.store(of_groups + group * channels + c, plain, known)
        tl.store(of_groups + (groups + group) * channels + c, unit, known)
    mean = tl.load(used + group * channels + c, known)
    inverse = tl.load(used + (groups + group) * channels + c, known)
    scale = inverse * tl.load(weight + c, known)
    plain, unit = plain / pixels, unit * inverse / pixels
    start = group.to(tl.int64) * pixels * channels
    last = tl.minimum((block + 1) * mine, pixels)
    for first in range(block * mine, last, rows):
        row = first + tl.arange(0, rows)
        inside = (row < last)[:, None] & known[None, :]
        at = start + row[:, None] * channels + c[None, :]
        of_y = tl.load(dy + at, inside, 0.0).to(wide)
        apart = tl.load(x + at, inside, 0.0).to(wide) - mean[None, :]
        of_x = (of_y - plain[None, :] - apart * unit[None, :]) * scale[None, :]
        tl.store(dx + at, of_x.to(dx.dtype.element_ty), inside)


class NormalizeGroups(torch.autograd.Function):
    """BatchNorm of each group of rows of a channels_last batch (Ioffe and Szegedy 2015, section 3).

    Sums are in the dtype of `weight`, float32 or float64.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Return `x` normalised; update the running statistics, float (groups, channels)."""
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.cut = cut = _Cut(x, running_mean)
        y, used = torch.empty_like(x), weight.new_empty(2, *running_mean.shape)
        means, squares = weight.new_empty(2, cut.groups, cut.blocks, cut.channels)
        sizes = cut.pixels, cut.channels
        _moments[cut.grid(cut.blocks)](x, means, squares, *sizes, cut.each, **cut.tile(weight))
        _normalize[cut.grid(cut.writers)](
            *(x, y, means, squares, weight, bias, used, running_mean, running_var),
            *(*sizes, cut.blocks, cut.each, cut.mine, momentum, eps),
            most=_MOST,
            **cut.tile(weight),
        )
        ctx.save_for_backward(x, weight, used)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `x`, `weight` and `bias`."""
        x, weight, used = ctx.saved_tensors
        dy, cut = dy.contiguous(memory_format=torch.channels_last), ctx.cut
        dx, of_groups = torch.empty_like(x), torch.empty_like(used)
        sums = weight.new_empty(2, cut.groups, cut.blocks, cut.channels)
        sizes, tile = (cut.pixels, cut.channels), cut.tile(weight)
        _gradient_sums[cut.grid(cut.blocks)](dy, x, used, sums, *sizes, cut.each, **tile)
        _gradient[cut.grid(cut.writers)](
            *(dy, x, dx, used, sums, weight, of_groups, *sizes, cut.blocks, cut.mine),
            most=_MOST,
            **tile,
        )
        of_bias, of_weight = of_groups.sum(1)
        return dx, of_weight, of_bias, None, None, None, None


class _Cut:
    """How a batch is cut: `blocks` of `each` pixels are summed, `writers` of `mine` written."""

    def __init__(self, x: Tensor, running: Tensor) -> None:
        self.groups, self.channels = running.shape
        self.pixels = x.numel() // running.numel()
        self.strips = triton.cdiv(self.channels, _COLUMNS)
        wanted = triton.cdiv(_PROGRAMS, self.groups * self.strips)
        tiles = triton.cdiv(self.pixels, _ROWS)
        # By the pixels of a group alone: its sums don't depend on how many groups a process has.
        self.each = triton.cdiv(tiles, min(tiles, _MOST)) * _ROWS
        self.mine = triton.cdiv(tiles, min(wanted, tiles)) * _ROWS
        self.blocks = triton.cdiv(self.pixels, self.each)
        self.writers = triton.cdiv(self.pixels, self.mine)

    def grid(self, parts: int) -> tuple[int, int, int]:
        """Return the grid of programs with `parts` for each group and strip of channels."""
        return self.groups, parts, self.strips

    def tile(self, weight: Tensor) -> dict[str, Any]:
        """Return what the compiler is told: the dtype of sums and the shape of a tile."""
        wide = tl.float64 if weight.dtype == torch.float64 else tl.float32
        return {"wide": wide, "rows": _ROWS, "columns": _COLUMNS}
