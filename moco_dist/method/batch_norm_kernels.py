"""Grouped BatchNorm on a GPU: four Triton kernels, whatever the number of groups.

They also add the shortcut of a residual block and apply its ReLU, if asked to.

Tensors are channels_last: their memory is (groups, pixels, channels), where the pixels of a group
are those of all its images. Sums over pixels are split over blocks, and the blocks' results are
combined in order, without atomics: the same input gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import os

# Triton 3.9 warns until one of the two is chosen.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
import triton
import triton.language as tl

# One compilation for all sizes; only the number of channels decides how wide a load may be.
_kernel = triton.jit(do_not_specialize=["pixels", "each", "blocks", "mine", "total"])


@_kernel
def moments(
    x,
    means,
    squares,
    pixels,
    channels,
    each,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Write the mean and the sum of squared deviations of each block of `each` pixels."""
    wide = means.dtype.element_ty
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


@triton.jit
def _combined(means, squares, group, c, channels, blocks, each, total, most: tl.constexpr):
    """Return the mean and the sum of squared deviations of a group.

    Of its `total` pixels each of its `blocks` has `each`, the last one what is left of them.
    """
    wide = means.dtype.element_ty
    other = tl.arange(0, most)
    there = (other < blocks)[:, None] & (c < channels)[None, :]
    theirs = (group * blocks + other)[:, None] * channels + c[None, :]
    count = tl.maximum(tl.minimum(total - other * each, each), 0).to(wide)[:, None]
    their_means = tl.load(means + theirs, there, 0.0)
    mean = tl.sum(their_means * count, 0) / total
    their_change = their_means - mean[None, :]
    their_squares = tl.load(squares + theirs, there, 0.0)
    return mean, tl.sum(their_squares + their_change * their_change * count, 0)


@_kernel
def combine(
    means,
    squares,
    moments,
    pixels,
    channels,
    blocks,
    each,
    most: tl.constexpr,
    columns: tl.constexpr,
):
    """Write the mean and the sum of squared deviations of the only group."""
    c = tl.program_id(0) * columns + tl.arange(0, columns)
    mean, square = _combined(means, squares, 0, c, channels, blocks, each, pixels, most)
    tl.store(moments + c, mean, c < channels)
    tl.store(moments + channels + c, square, c < channels)


@_kernel
def normalize(
    x,
    shortcut,
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
    total,
    momentum: tl.constexpr,
    eps: tl.constexpr,
    adds: tl.constexpr,
    rectifies: tl.constexpr,
    most: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Combine the moments of all blocks and write `mine` pixels of `y`.

    The first program of a group also writes its mean and inverse deviation to `used`, and moves
    the running statistics.
    """
    wide = weight.dtype.element_ty
    group, block = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * columns + tl.arange(0, columns)
    known = c < channels
    mean, square = _combined(means, squares, group, c, channels, blocks, each, total, most)
    inverse = 1.0 / tl.sqrt(square / total + eps)
    own = group * channels + c
    if block == 0:
        tl.store(used + own, mean, known)
        tl.store(used + tl.num_programs(0) * channels + own, inverse, known)
        old = tl.load(running_mean + own, known)
        tl.store(running_mean + own, old + (mean - old) * momentum, known)
        spread = tl.load(running_var + own, known)
        unbiased = square / (total - 1)
        tl.store(running_var + own, spread + (unbiased - spread) * momentum, known)
    scale, shift = inverse * tl.load(weight + c, known), tl.load(bias + c, known)
    start = group.to(tl.int64) * pixels * channels
    last = tl.minimum((block + 1) * mine, pixels)
    for first in range(block * mine, last, rows):
        row = first + tl.arange(0, rows)
        inside = (row < last)[:, None] & known[None, :]
        at = start + row[:, None] * channels + c[None, :]
        part = (tl.load(x + at, inside, 0.0).to(wide) - mean[None, :]) * scale[None, :]
        part += shift[None, :]
        if adds:
            part += tl.load(shortcut + at, inside, 0.0).to(wide)
        if rectifies:
            part = tl.where(part < 0, 0.0, part)  # what is not a number stays so
        tl.store(y + at, part.to(y.dtype.element_ty), inside)


@triton.jit
def _of_sum(dy, y, at, inside, wide: tl.constexpr, rectifies: tl.constexpr):
    """Return the gradient of what the ReLU is applied to, if there is one."""
    of_y = tl.load(dy + at, inside, 0.0).to(wide)
    if rectifies:
        of_y = tl.where(tl.load(y + at, inside, 0.0).to(wide) <= 0, 0.0, of_y)
    return of_y


@_kernel
def gradient_sums(
    dy,
    y,
    x,
    used,
    sums,
    pixels,
    channels,
    each,
    rectifies: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Write each block's sums of `dy` and of `dy` times the normalised `x`."""
    wide = used.dtype.element_ty
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
        of_y = _of_sum(dy, y, at, inside, wide, rectifies)
        apart = tl.load(x + at, inside, 0.0).to(wide) - mean[None, :]
        plain += of_y
        unit += of_y * apart
    to = (group * blocks + block) * channels + c
    tl.store(sums + to, tl.sum(plain, 0), known)
    tl.store(sums + groups * blocks * channels + to, tl.sum(unit, 0) * inverse, known)


@_kernel
def gradient(
    dy,
    y,
    x,
    dx,
    of_shortcut,
    used,
    sums,
    weight,
    of_groups,
    pixels,
    channels,
    blocks,
    mine,
    total,
    adds: tl.constexpr,
    rectifies: tl.constexpr,
    most: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Combine the sums of all blocks and write `mine` pixels of `dx`.

    The first program of a group also writes its share of the gradients of bias and weight.
    """
    wide = weight.dtype.element_ty
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
    plain, unit = plain / total, unit * inverse / total
    start = group.to(tl.int64) * pixels * channels
    last = tl.minimum((block + 1) * mine, pixels)
    for first in range(block * mine, last, rows):
        row = first + tl.arange(0, rows)
        inside = (row < last)[:, None] & known[None, :]
        at = start + row[:, None] * channels + c[None, :]
        of_y = _of_sum(dy, y, at, inside, wide, rectifies)
        if adds:
            tl.store(of_shortcut + at, of_y.to(of_shortcut.dtype.element_ty), inside)
        apart = tl.load(x + at, inside, 0.0).to(wide) - mean[None, :]
        of_x = (of_y - plain[None, :] - apart * unit[None, :]) * scale[None, :]
        tl.store(dx + at, of_x.to(dx.dtype.element_ty), inside)
