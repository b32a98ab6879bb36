"""The encoder: a torchvision ResNet and a projection head, two named parts; grouped BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from moco_dist import convolutions, timm_backbone
from moco_dist.compilation import compiled
from moco_dist.config import EncoderConfig

# Block, blocks of each stage, groups and channels of a group's 3x3 convolution in stage 1 (at the
# published width): He et al. 2016, table 1; Xie et al. 2017, table 1; Zagoruyko et al. 2016.
_STAGES: dict[str, tuple[type[BasicBlock | Bottleneck], list[int], int, int]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2], 1, 64),
    "resnet34": (BasicBlock, [3, 4, 6, 3], 1, 64),
    "resnet50": (Bottleneck, [3, 4, 6, 3], 1, 64),
    "resnet101": (Bottleneck, [3, 4, 23, 3], 1, 64),
    "resnet152": (Bottleneck, [3, 8, 36, 3], 1, 64),
    "resnext50_32x4d": (Bottleneck, [3, 4, 6, 3], 32, 4),
    "resnext101_32x8d": (Bottleneck, [3, 4, 23, 3], 32, 8),
    "resnext101_64x4d": (Bottleneck, [3, 4, 23, 3], 64, 4),
    "wide_resnet50_2": (Bottleneck, [3, 4, 6, 3], 1, 128),
    "wide_resnet101_2": (Bottleneck, [3, 4, 23, 3], 1, 128),
}


class GroupedBatchNorm(nn.BatchNorm2d):
    """BatchNorm that normalises each block of `rows_per_group` rows of the batch by itself.

    It is what `groups` processes with ordinary BatchNorm would compute, on any number of processes
    (He et al. 2020, section 3.3, and the "split" BatchNorm of its authors' CIFAR demo).

    A process holds `groups` of them. A forward pass in training takes whole groups, in order;
    several passes (micro-batches) go round them. Each group keeps running statistics of its own in
    `group_mean` and `group_var`, float (groups, channels): no process needs another's, and what a
    group has seen doesn't depend on who computed it. Evaluation uses `running_mean` and
    `running_var`, which hold the mean over all groups of all processes once
    `moco.average_statistics` has been called.
    """

    running_mean: Tensor
    running_var: Tensor
    group_mean: Tensor
    group_var: Tensor
    # Whether someone calls `take_in` after each compiled pass.
    leaves_seen = False
    # Mean and variance that a compiled pass has seen and `take_in` hasn't, (its groups, channels).
    seen: tuple[Tensor, Tensor] | None = None

    def __init__(self, channels: int, rows_per_group: int, groups: int) -> None:
        super().__init__(channels)
        self.rows_per_group = rows_per_group
        self.next_group = 0
        self.register_buffer("group_mean", torch.zeros(groups, channels), persistent=False)
        self.register_buffer("group_var", torch.ones(groups, channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` (rows, channels, height, width) normalised."""
        if not self.training:
            return super().forward(x)
        rows, groups = self.rows_per_group, len(self.group_mean)
        assert len(x) % rows == 0, f"{len(x)} rows are not whole groups of {rows}"
        if self.leaves_seen and torch.compiler.is_compiling():
            return self._by_formula(x)
        first, count = self.next_group, len(x) // rows
        self.next_group = (first + count) % groups
        places = [(first + place) % groups for place in range(count)]
        means, variances = self.group_mean.unbind(), self.group_var.unbind()
        mean, var = [means[place] for place in places], [variances[place] for place in places]
        momentum = self.momentum or 0.1
        if count == 1:
            return F.batch_norm(
                x, mean[0], var[0], self.weight, self.bias, True, momentum, self.eps
            )
        normalized: Tensor = _NormalizeGroups.apply(
            x, self.weight, self.bias, mean, var, momentum, self.eps
        )
        return normalized

    def _by_formula(self, x: Tensor) -> Tensor:
        """Return `x` normalised, by operations that a compiler fuses with those around them.

        Its statistics are left in `seen`, for `take_in`: with that in the graph each of the places
        in the turn of the groups would be compiled.
        """
        groups, channels = len(x) // self.rows_per_group, x.shape[1]
        pixels = x.permute(0, 2, 3, 1).reshape(groups, -1, channels)
        y: Tensor
        y, mean, var = _NormFormula.apply(pixels, self.weight, self.bias, self.eps)
        self.seen = mean, var
        return y.reshape(len(x), *x.shape[2:], channels).permute(0, 3, 1, 2)


@torch.no_grad()
def take_in(norms: list[GroupedBatchNorm]) -> None:
    """Have running statistics take in what a compiled pass has seen, and groups their turn."""
    running, new, momenta = list[Tensor](), list[Tensor](), list[float]()
    for norm in norms:
        if norm.seen:
            count = len(norm.seen[0])
            places = slice(norm.next_group, norm.next_group + count)
            norm.next_group = (norm.next_group + count) % len(norm.group_mean)
            running += norm.group_mean[places], norm.group_var[places]
            new += norm.seen
            momenta += 2 * [norm.momentum or 0.1]
            norm.seen = None
    if new:
        torch._foreach_lerp_(running, new, momenta)


class _NormalizeGroups(torch.autograd.Function):
    """BatchNorm of each group of rows, into one tensor: no groups are joined, no format changes.

    Groups are blocks of the first dimension, which are as dense as the whole in either format. The
    kernels, and the order in which sums are made, are those of a `batch_norm` for each group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: list[Tensor],
        var: list[Tensor],
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Return `x` normalised; update a `mean` and `var`, float (channels,), for each group."""
        y, used = torch.empty_like(x), weight.new_empty(2, len(mean), len(weight))
        outs = zip(y.chunk(len(mean)), *(each.unbind() for each in used), strict=True)
        parts = zip(x.chunk(len(mean)), mean, var, outs, strict=True)
        for part, running_mean, running_var, out in parts:
            torch.native_batch_norm(
                *(part, weight, bias, running_mean, running_var, True, momentum, eps), out=out
            )
        ctx.save_for_backward(x, weight, used)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `x`, `weight` and `bias`; sums go from the last group down."""
        x, weight, used = ctx.saved_tensors
        count = used.shape[1]
        dx, wanted = torch.empty_like(x), [True, True, True]
        sums: list[Tensor] = []
        parts = zip(*(t.chunk(count) for t in (dy, x, dx)), *used, strict=True)
        for dy_part, x_part, dx_part, mean, invstd in reversed(list(parts)):
            found, *ours = torch.ops.aten.native_batch_norm_backward(
                *(dy_part, x_part, weight, None, None, mean, invstd, True, ctx.eps, wanted)
            )
            dx_part.copy_(found)
            sums = [a.add_(b) for a, b in zip(sums, ours, strict=True)] if sums else ours
        return dx, *sums, None, None, None, None


class _NormFormula(torch.autograd.Function):
    """BatchNorm of groups of pixels in plain operations (Ioffe and Szegedy 2015, section 3)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return `x` (groups, pixels, channels) normalised, and each group's mean and variance."""
        wide, number = x.to(weight.dtype), x.shape[1]
        var, mean = torch.var_mean(wide, dim=1, correction=0)
        invstd = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, invstd)
        y = (wide - mean[:, None]) * (invstd * weight)[:, None] + bias
        var = var * (number / (number - 1))
        ctx.mark_non_differentiable(mean, var)
        return y.to(x.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of `x`, `weight` and `bias`."""
        x, weight, mean, invstd = ctx.saved_tensors
        wide = dy.to(weight.dtype)
        unit = (x.to(weight.dtype) - mean[:, None]) * invstd[:, None]
        of_bias, of_weight = wide.sum(1), (wide * unit).sum(1)
        shared = (of_bias[:, None] + unit * of_weight[:, None]) / x.shape[1]
        dx = (wide - shared) * (invstd * weight)[:, None]
        return dx.to(x.dtype), of_weight.sum(0), of_bias.sum(0), None


class Backbone(ResNet):
    """torchvision's ResNet without its classifier; `width` channels in stage 1 (published: 64)."""

    def __init__(self, config: EncoderConfig, norm_layer: Any) -> None:
        block, stages, groups, group_width = _STAGES[config.backbone]
        channels = config.channels
        self.width = config.width
        super().__init__(
            block,
            stages,
            num_classes=1,
            groups=groups,
            width_per_group=group_width,
            norm_layer=norm_layer,
        )
        if config.stem == "cifar":
            self.conv1 = nn.Conv2d(channels, config.width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()  # type: ignore[assignment]
        else:
            self.conv1 = nn.Conv2d(channels, config.width, 7, 2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = norm_layer(config.width)
        self.fc = nn.Identity()  # type: ignore[assignment]
        self.num_features: int = self.inplanes

    def _make_layer(
        self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        if planes == 64:
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, blocks, stride, dilate)


def build_backbone(config: EncoderConfig, norm_layer: Any) -> Any:
    """Return a backbone with new weights; its `num_features` is the length of its features.

    Raises ConfigError for a model that this project can't train, or that is not there.
    """
    if config.is_timm:
        return timm_backbone.build(
            config.backbone.removeprefix("timm/"), config.channels, norm_layer
        )
    backbone = Backbone(config, norm_layer)
    convolutions.suit(backbone)
    return backbone


class Encoder(nn.Module):
    """Backbone and head; `forward` returns keys or queries, the backbone alone features."""

    def __init__(self, config: EncoderConfig, rows_per_group: int = 1, groups: int = 1) -> None:
        super().__init__()
        norm_layer = partial(GroupedBatchNorm, rows_per_group=rows_per_group, groups=groups)
        self.backbone = build_backbone(config, norm_layer)
        features = self.num_features
        last = nn.Linear(features, config.dim)
        hidden = (
            [nn.Linear(features, features), nn.ReLU(inplace=True)] if config.head == "mlp" else []
        )
        self.head = nn.Sequential(*hidden, last)
        # Convolutions are 1.3 times as fast with the channels of a pixel side by side, also on a
        # CPU; what comes out of one stays so.
        self.to(memory_format=torch.channels_last)
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def compile_training(self) -> None:
        """Have `forward` compiled, in training, at its first call."""
        for norm in batch_norms(self):
            norm.leaves_seen = True
        self._compiled = compiled(self._vectors)

    def forward(self, views: Tensor) -> Tensor:
        """Return unit vectors (rows, dim), float32 or more, of `views` (rows, c, height, width)."""
        if self._compiled is None or not self.training:
            return self._vectors(views)
        vectors = self._compiled(views)
        take_in(batch_norms(self))
        return vectors

    def _vectors(self, views: Tensor) -> Tensor:
        out = self.head(self.backbone(views))
        return F.normalize(out if out.dtype == torch.float64 else out.float(), dim=1)

    @property
    def num_features(self) -> int:
        """Length of the backbone's features."""
        # Of timm's models some have a last layer behind what they call their features.
        found = getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features
        assert isinstance(found, int), f"a backbone with {found!r} features"
        return found


def build_encoder(
    config: EncoderConfig, seed: int, rows_per_group: int = 1, groups: int = 1
) -> Encoder:
    """Return a new float32 encoder on the CPU; its weights depend on `config` and `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(config, rows_per_group, groups)


def batch_norms(encoder: nn.Module) -> list[GroupedBatchNorm]:
    """Return the grouped BatchNorm layers of an encoder, in order."""
    return [module for module in encoder.modules() if isinstance(module, GroupedBatchNorm)]
