"""Prints how far the kernels of grouped BatchNorm are from PyTorch's, in Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.interpreted_kernels
"""

from __future__ import annotations

import json
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from moco_dist.config.encoder import EncoderConfig
from moco_dist.distributed import comms
from moco_dist.method import batch_norm_gpu
from moco_dist.method.batch_norm import GroupedBatchNorm, batch_norms
from moco_dist.method.batch_norm_gpu import NormalizeGroups
from moco_dist.method.encoder import build_encoder
from tests import processes

# Rows, channels, height, width and groups: more than a tile, less than one, neither a multiple.
SHAPES = [(16, 64, 9, 7, 4), (8, 100, 5, 5, 2), (12, 16, 1, 1, 3), (5, 64, 32, 32, 1)]
# What follows the norm: nothing, a ReLU, or a shortcut and a ReLU.
KINDS = ("plain", "relu", "shortcut")
SETTINGS = 0.1, 1e-5


def apart(found: Tensor, expected: Tensor) -> float:
    """Return the relative distance of two tensors."""
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


class Case:
    """Tensors of a shape and dtype, and what float64 operations of PyTorch make of them."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
        *size, self.groups = shape
        affine_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        generator = torch.Generator().manual_seed(0)

        def drawn(*size: int) -> Tensor:
            return torch.randn(*size, dtype=affine_dtype, generator=generator)

        def batch() -> Tensor:
            return drawn(*size).to(dtype).contiguous(memory_format=torch.channels_last)

        self.kind = kind
        self.inputs = {"x": 3 + 2 * batch()} | ({"shortcut": batch()} if kind == KINDS[2] else {})
        self.dy = batch()
        self.affine = [drawn(size[1]) for _ in range(2)]
        running = [drawn(self.groups, size[1]), 1 + drawn(self.groups, size[1]).square()]
        self.running = dict(zip(("mean", "var"), running, strict=True))

    def expected(self) -> dict[str, Tensor]:
        """Return outputs, gradients and statistics by one batch_norm for each group."""
        found = {name: each.double().clone() for name, each in self.running.items()}
        inputs = {k: v.double().requires_grad_() for k, v in self.inputs.items()}
        affine = [each.double().requires_grad_() for each in self.affine]
        pieces = zip(inputs["x"].chunk(self.groups), found["mean"], found["var"], strict=True)
        (weight, bias), (momentum, eps) = affine, SETTINGS
        parts = [
            F.batch_norm(x, mean, var, weight, bias, True, momentum, eps) for x, mean, var in pieces
        ]
        y = torch.cat(parts) + inputs.get("shortcut", 0)
        y = y if self.kind == KINDS[0] else y.relu()
        y.backward(self.dy.double())
        return found | {"y": y} | self._gradients(inputs, affine)

    def by_kernels(self, part: slice, span: int = 1) -> dict[str, Tensor]:
        """Return the same for some of the rows, whose groups are the first ones."""
        inputs = {k: v[part].detach().requires_grad_() for k, v in self.inputs.items()}
        affine = [each.detach().requires_grad_() for each in self.affine]
        groups = max(1, len(inputs["x"]) * self.groups // len(self.dy))
        found = {name: each[:groups].clone() for name, each in self.running.items()}
        y = NormalizeGroups.apply(
            *(inputs["x"], inputs.get("shortcut"), *affine, *found.values(), *SETTINGS),
            *(self.kind != KINDS[0], span),
        )
        y.backward(self.dy[part])
        return found | {"y": y.detach()} | self._gradients(inputs, affine)

    def _gradients(self, inputs: dict[str, Tensor], affine: list[Tensor]) -> dict[str, Tensor]:
        named = inputs | dict(zip(("weight", "bias"), affine, strict=True))
        return {f"d{name}": each.grad for name, each in named.items() if each.grad is not None}


def distances(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> dict[str, float]:
    """Return the distance of every result from the expected one."""
    case = Case(shape, dtype, kind)
    expected, found = case.expected(), case.by_kernels(slice(None))
    assert expected.keys() == found.keys()
    each = shape[0] // case.groups
    alone = case.by_kernels(slice(each))["y"]
    # The sums of a group are the same on a process with more groups.
    same = {"alone": float(not alone.equal(found["y"][:each]))}
    return same | {name: apart(found[name], expected[name]) for name in expected}


def spanned(kind: str) -> dict[str, float]:
    """Return the distances of this process's rows, and of sums over all, of a group over all."""
    batch_norm_gpu.PROGRAMS = 8
    case, world = Case((12, 100, 9, 7, 1), torch.float64, kind), comms.world_size()
    each = 12 // world
    part = slice(comms.rank() * each, (comms.rank() + 1) * each)
    expected, found = case.expected(), case.by_kernels(part, world)
    for name in expected:
        if name in ("y", "dx", "dshortcut"):
            expected[name] = expected[name][part]
        elif name in ("dweight", "dbias"):
            found[name] = comms.total(found[name])
    return {name: apart(found[name], expected[name]) for name in expected}


def encoder(backbone: str, size: int) -> dict[str, float]:
    """Return the distances of an encoder whose norms take in ReLUs from one with its own ReLUs."""
    config = EncoderConfig(backbone=backbone, width=2, dim=4)
    fused, plain = (build_encoder(config, 0, 2, 2).double() for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(4, 3, size, size, dtype=torch.float64, generator=generator)
    dy = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    theirs = plain(views)
    with (
        # On a CPU they don't.
        patch.object(GroupedBatchNorm, "fuses", lambda norm, _: norm.training),
        patch.object(GroupedBatchNorm, "rectified", autospec=True, side_effect=rectified) as calls,
    ):
        mine = fused(views)
    for out in (mine, theirs):
        out.backward(dy)
    grads = zip(fused.parameters(), plain.parameters(), strict=True)
    pairs = [(a.grad, b.grad) for a, b in grads]
    norms = zip(batch_norms(fused), batch_norms(plain), strict=True)
    pairs += [(a.group_var, b.group_var) for a, b in norms]
    others = max(apart(a, b) for a, b in pairs if a is not None and b is not None)
    return {"y": apart(mine, theirs), "others": others, "rectified": calls.call_count}


rectified = GroupedBatchNorm.rectified


def main() -> None:
    """Print distances of layers, of groups on two processes, and of encoders."""
    # So few that the groups of these small batches share them.
    batch_norm_gpu.PROGRAMS = 8
    layers = [
        [str(dtype), shape, kind, distances(shape, dtype, kind)]
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
        for shape in SHAPES
        for kind in (KINDS if dtype == torch.float64 else KINDS[2:])
    ]
    spanning = [each for kind in KINDS[::2] for each in processes.run(spanned, 2, kind)]
    blocks = {name: encoder(name, 16) for name in ("resnet18", "resnet50")}
    print(json.dumps([layers, spanning, blocks]))


if __name__ == "__main__":
    main()
