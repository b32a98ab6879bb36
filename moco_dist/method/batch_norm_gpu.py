"""Grouped BatchNorm on a GPU as a function of autograd, by the kernels of its neighbour."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moco_dist.distributed import comms
from moco_dist.method import batch_norm_kernels as kernels

# Pixels and channels that a program holds at once.
ROWS, COLUMNS = 64, 64
_TILE = {"rows": ROWS, "columns": COLUMNS}
# Blocks of a group whose sums are combined, at most: every program reads them all.
MOST = 64
# Programs that keep a GPU busy.
PROGRAMS = 1024


class NormalizeGroups(torch.autograd.Function):
    """BatchNorm of each group of rows of a channels_last batch (Ioffe and Szegedy 2015, section 3).

    Sums are in the dtype of `weight`, float32 or float64. The only group of a process may be one of
    `span` equal parts of a group on as many processes, which exchange moments and sums.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        shortcut: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        rectifies: bool = False,
        span: int = 1,
    ) -> Tensor:
        """Return `x` normalised, plus `shortcut`, and its ReLU if it `rectifies`.

        Updates the running statistics, float (groups, channels).
        """
        x = x.contiguous(memory_format=torch.channels_last)
        adds, other = shortcut is not None, x
        if shortcut is not None:
            other = shortcut.contiguous(memory_format=torch.channels_last)
        ctx.cut = cut = _Cut(x, running_mean, span)
        y, used = torch.empty_like(x), weight.new_empty(2, *running_mean.shape)
        means, squares = weight.new_empty(2, cut.groups, cut.blocks, cut.channels)
        sizes = cut.pixels, cut.channels
        kernels.moments[cut.grid(cut.blocks)](x, means, squares, *sizes, cut.each, **_TILE)
        blocks, each = cut.blocks, cut.each
        if span > 1:
            moments = weight.new_empty(2, cut.channels)
            kernels.combine[(cut.strips,)](
                *(means, squares, moments, *sizes, blocks, each), most=MOST, columns=COLUMNS
            )
            means, squares = comms.all_gather_within(moments, span).movedim(1, 0).contiguous()
            blocks, each = span, cut.pixels
        kernels.normalize[cut.grid(cut.writers)](
            *(x, other, y, means, squares, weight, bias, used, running_mean, running_var),
            *(*sizes, blocks, each, cut.mine, cut.total, momentum, eps),
            **(_TILE | {"most": cut.most, "adds": adds, "rectifies": rectifies}),
        )
        ctx.save_for_backward(x, weight, used, y if rectifies else x)
        ctx.of_other = other.dtype if adds else None
        ctx.rectifies, ctx.span = rectifies, span
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `x`, `shortcut`, `weight` and `bias`.

        Those of weight and bias are of this process's rows alone.
        """
        x, weight, used, y = ctx.saved_tensors
        dy, cut = dy.contiguous(memory_format=torch.channels_last), ctx.cut
        dx, of_groups = torch.empty_like(x), torch.empty_like(used)
        of_other = torch.empty_like(x, dtype=ctx.of_other) if ctx.of_other else None
        sums = weight.new_empty(2, cut.groups, cut.blocks, cut.channels)
        sizes = cut.pixels, cut.channels
        tile = _TILE | {"rectifies": ctx.rectifies}
        kernels.gradient_sums[cut.grid(cut.blocks)](dy, y, x, used, sums, *sizes, cut.each, **tile)
        own, blocks = of_groups, cut.blocks
        if ctx.span > 1:  # `of_groups` will be of all processes of the group
            own = sums.sum(2)
            sums = comms.all_gather_within(own[:, 0], ctx.span).movedim(1, 0).contiguous()
            blocks = ctx.span
        kernels.gradient[cut.grid(cut.writers)](
            *(dy, y, x, dx, dx if of_other is None else of_other),
            *(used, sums, weight, of_groups, *sizes, blocks, cut.mine, cut.total),
            **(tile | {"most": cut.most, "adds": of_other is not None}),
        )
        of_bias, of_weight = own.sum(1) if cut.groups > 1 else own[:, 0]
        return dx, of_other, of_weight, of_bias, *6 * [None]


class _Cut:
    """How a batch is cut: `blocks` of `each` pixels are summed, `writers` of `mine` written."""

    def __init__(self, x: Tensor, running: Tensor, span: int) -> None:
        self.groups, self.channels = running.shape
        self.pixels = x.numel() // running.numel()
        # Those of a group on all of its processes.
        self.total = span * self.pixels
        self.most = max(MOST, 1 << (span - 1).bit_length())
        self.strips = _cdiv(self.channels, COLUMNS)
        wanted = _cdiv(PROGRAMS, self.groups * self.strips)
        tiles = _cdiv(self.pixels, ROWS)
        # By the pixels of a group alone: its sums don't depend on how many groups a process has.
        self.each = _cdiv(tiles, min(tiles, MOST)) * ROWS
        self.mine = _cdiv(tiles, min(wanted, tiles)) * ROWS
        self.blocks = _cdiv(self.pixels, self.each)
        self.writers = _cdiv(self.pixels, self.mine)

    def grid(self, parts: int) -> tuple[int, int, int]:
        """Return the grid of programs with `parts` for each group and strip of channels."""
        return self.groups, parts, self.strips


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
