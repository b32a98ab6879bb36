"""What stands behind a backbone: the projection head, and the predictor of MoCo v3's queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from moco_dist.config.encoder import EncoderConfig
from moco_dist.method.batch_norm import GroupedBatchNorm


class VectorBatchNorm(GroupedBatchNorm):
    """Grouped BatchNorm of vectors; without `affine` it has no weight and bias to learn."""

    def __init__(
        self, channels: int, rows_per_group: int, groups: int, span: int = 1, affine: bool = True
    ) -> None:
        super().__init__(channels, rows_per_group, groups, span)
        if not affine:
            # Constants, and so no tensors of a checkpoint, which all kernels take.
            del self.weight, self.bias
            self.register_buffer("weight", torch.ones(channels), persistent=False)
            self.register_buffer("bias", torch.zeros(channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` (rows, channels) normalised."""
        return super().forward(x[:, :, None, None]).flatten(1)


def projection(
    config: EncoderConfig, features: int, norm: Callable[..., nn.Module]
) -> nn.Sequential:
    """Return the head of `config`, from `features` to `config.dim` numbers.

    linear and mlp are those of MoCo v1 and v2. mlp_bn is that of SimCLR and MoCo v3 (Chen, Xie and
    He 2021, section 5.2): no biases, and a `norm` behind each layer, the last without an affine
    transform.
    """
    layers = 1 if config.head == "linear" else config.head_layers
    hidden = [config.head_width or features] * (layers - 1)
    return _mlp([features, *hidden, config.dim], norm if config.head == "mlp_bn" else None)


class HalfHeads(nn.ModuleList):
    """A head for each half of the features."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the vectors (rows, halves, dim) of joined features (rows, length)."""
        parts = x.chunk(len(self), 1)
        return torch.stack([head(part) for head, part in zip(self, parts, strict=True)], 1)


def of_halves(config: EncoderConfig, features: int, norm: Callable[..., nn.Module]) -> HalfHeads:
    """Return a `projection` for each half of so many features."""
    each = range(config.vectors)
    return HalfHeads(projection(config, features // config.vectors, norm) for _ in each)


def predictor(
    config: EncoderConfig, features: int, norm: Callable[..., nn.Module]
) -> nn.Sequential:
    """Return the predictor of MoCo v3: two layers with BatchNorm, as wide as the head."""
    return _mlp([config.dim, config.head_width or features, config.dim], norm)


def _mlp(widths: Sequence[int], norm: Callable[..., nn.Module] | None) -> nn.Sequential:
    bias = norm is None
    *hidden, last = pairwise(widths)
    final: list[nn.Module] = [nn.Linear(*last, bias=bias)]  # it draws its weights first
    layers: list[nn.Module] = []
    for shape in hidden:
        layers += [nn.Linear(*shape, bias=bias), *([norm(shape[1])] if norm else [])]
        layers.append(nn.ReLU(inplace=True))
    if norm:
        final.append(norm(widths[-1], affine=False))
    return nn.Sequential(*layers, *final)
