"""Prints how far the kernels of grouped BatchNorm are from PyTorch's, in Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.interpreted_kernels
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch import Tensor

from moco_dist.method import batch_norm_kernels
from moco_dist.method.batch_norm_kernels import NormalizeGroups

# Rows, channels, height, width and groups: more than a tile, less than one, neither a multiple.
SHAPES = [(16, 64, 9, 7, 4), (8, 100, 5, 5, 2), (12, 16, 1, 1, 3), (12, 64, 32, 32, 1)]


def apart(found: Tensor, expected: Tensor) -> float:
    """Return the relative distance of two tensors."""
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def distances(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> dict[str, float]:
    """Return the distance of every result from that of one float64 batch_norm for each group."""
    *size, groups = shape
    affine_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, dtype=affine_dtype, generator=generator)

    def batch() -> Tensor:
        return drawn(*size).to(dtype).contiguous(memory_format=torch.channels_last)

    x, dy = (3 + 2 * batch()).requires_grad_(), batch()
    affine = [drawn(size[1]).requires_grad_() for _ in range(2)]
    running = [drawn(groups, size[1]), 1 + drawn(groups, size[1]).square()]
    wide = [each.detach().double().requires_grad_() for each in (x, *affine)]
    known = [each.double().clone() for each in running]
    alone = [
        NormalizeGroups.apply(
            part, *affine, *(each[g : g + 1].clone() for each in running), 0.1, 1e-5
        )
        for g, part in enumerate(x.chunk(groups))
    ]
    y = NormalizeGroups.apply(x, *affine, *running, 0.1, 1e-5)
    y.backward(dy)
    parts = [
        F.batch_norm(part, mean, var, wide[1], wide[2], True, 0.1, 1e-5)
        for part, mean, var in zip(wide[0].chunk(groups), *known, strict=True)
    ]
    expected = torch.cat(parts)
    expected.backward(dy.double())
    pairs = {"y": (y, expected)}
    pairs |= dict(zip(("mean", "var"), zip(running, known, strict=True), strict=True))
    grads = [(a.grad, b.grad) for a, b in zip((x, *affine), wide, strict=True)]
    found = {name: apart(*pair) for name, pair in pairs.items()}
    # The sums of a group are the same on a process with more groups.
    found["alone"] = float(not torch.cat(alone).equal(y))
    for name, (mine, theirs) in zip(("dx", "dweight", "dbias"), grads, strict=True):
        assert mine is not None
        assert theirs is not None
        found[name] = apart(mine, theirs)
    return found


if __name__ == "__main__":
    # So few that the groups of these small batches share them.
    batch_norm_kernels._PROGRAMS = 8
    print(
        json.dumps(
            [
                [str(dtype), shape, distances(shape, dtype)]
                for dtype in (torch.float64, torch.float32, torch.bfloat16)
                for shape in SHAPES
            ]
        )
    )
