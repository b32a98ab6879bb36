"""Grouped BatchNorm: the layer, its statistics over groups and processes, and how to undo them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moco_dist.distributed import comms

try:
    from moco_dist.method.batch_norm_gpu import NormalizeGroups
except ImportError:  # Triton comes with PyTorch for Linux and NVIDIA GPUs
    NormalizeGroups = None  # type: ignore[assignment,misc]


class Undo:
    """Keeps BatchNorm statistics, moved into one tensor, so that a forward pass can be undone."""

    @torch.no_grad()
    def __init__(self, *encoders: nn.Module) -> None:
        norms = [norm for encoder in encoders for norm in batch_norms(encoder)]
        owned = [(norm, name) for norm in norms for name in ("group_mean", "group_var")]
        each = [getattr(norm, name).flatten() for norm, name in owned]
        # Without BatchNorm there are no statistics, and none of another device.
        self._live = torch.cat(each) if each else next(encoders[0].parameters()).new_empty(0)
        self._kept = self._live.clone()
        offset = 0
        for norm, name in owned:
            old = getattr(norm, name)
            setattr(norm, name, self._live[offset : offset + old.numel()].view_as(old))
            offset += old.numel()

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the statistics as they are."""
        self._kept.copy_(self._live)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the statistics that `keep` saw."""
        self._live.copy_(self._kept)

    @torch.no_grad()
    def restore_unless(self, good: Tensor) -> None:
        """Do what `restore` does unless `good`, bool (), which only the device knows."""
        torch.where(good, self._live, self._kept, out=self._live)


class GroupedBatchNorm(nn.BatchNorm2d):
    """BatchNorm that normalises each block of `rows_per_group` rows of the batch separately.

    The result is that of one process per group with ordinary BatchNorm, on any number of processes
    (He et al. 2020, section 3.3, and the "split" BatchNorm of its authors' CIFAR demo).

    A training pass covers whole groups, in order; micro-batches cycle through the `groups` of this
    process. Each group has running statistics, `group_mean` and `group_var`, float (groups,
    channels), which don't depend on the process that computes them. Evaluation uses their mean over
    all processes, which `average_statistics` writes to `running_mean` and `running_var`.

    A group may also lie on `span` processes of consecutive ranks, with `rows_per_group` rows on
    each, and is then the only one of these processes. They exchange moments in the forward pass and
    sums of gradients in the backward pass, in the process group in which DistributedDataParallel
    sums gradients: like its sums, and those of SyncBatchNorm, they begin in the order of the
    backward pass, which is the same on all processes. All of them take part in each training pass.
    """

    running_mean: Tensor
    running_var: Tensor
    group_mean: Tensor
    group_var: Tensor
    # Whether `take_in` is called after each compiled pass.
    leaves_seen = False
    # Mean and variance, (groups, channels), that a compiled pass leaves for `take_in`.
    seen: tuple[Tensor, Tensor] | None = None

    def __init__(self, channels: int, rows_per_group: int, groups: int, span: int = 1) -> None:
        super().__init__(channels)
        assert groups == 1 or span == 1, f"{groups} groups on each of {span} processes"
        self.rows_per_group, self.span = rows_per_group, span
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
        if self._has_kernels(x):
            return self._by_kernels(x)
        first, count = self.next_group, len(x) // rows
        self.next_group = (first + count) % groups
        affine, rates = (self.weight, self.bias), (self.momentum or 0.1, self.eps)
        normalized: Tensor
        places = [(first + place) % groups for place in range(count)]
        means, variances = self.group_mean.unbind(), self.group_var.unbind()
        mean, var = [means[place] for place in places], [variances[place] for place in places]
        if self.span > 1:
            normalized = _NormalizeSpanning.apply(x, *affine, mean[0], var[0], *rates, self.span)
            return normalized
        if count == 1:
            return F.batch_norm(x, mean[0], var[0], *affine, True, *rates)
        normalized = _NormalizeGroups.apply(x, *affine, mean, var, *rates)
        return normalized

    def _has_kernels(self, x: Tensor) -> bool:
        """Return whether `x` is on a GPU, and no group is too large for offsets of 32 bits.

        Nor may there be more groups than statistics, in which the kernels don't go round.
        """
        there = x.is_cuda and NormalizeGroups is not None
        there = there and len(x) <= self.rows_per_group * len(self.group_mean)
        return there and x.numel() // len(x) * self.rows_per_group < 2**31

    def fuses(self, x: Tensor) -> bool:
        """Return whether `rectified` can be called, and is faster than other operations are."""
        return self.training and self._has_kernels(x) and not torch.compiler.is_compiling()

    def rectified(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Return the ReLU of the normalised `x`, plus `shortcut`, in one pass over their memory."""
        return self._by_kernels(x, shortcut, rectifies=True)

    def _by_kernels(
        self, x: Tensor, shortcut: Tensor | None = None, rectifies: bool = False
    ) -> Tensor:
        first, count = self.next_group, len(x) // self.rows_per_group
        self.next_group = (first + count) % len(self.group_mean)
        running = (each[first : first + count] for each in (self.group_mean, self.group_var))
        settings = self.momentum or 0.1, self.eps, rectifies, self.span
        normalized: Tensor = NormalizeGroups.apply(
            x, shortcut, self.weight, self.bias, *running, *settings
        )
        return normalized

    def _by_formula(self, x: Tensor) -> Tensor:
        """Return `x` normalised by operations that a compiler can fuse with their neighbours.

        `take_in` updates the statistics outside the graph, which would otherwise be compiled once
        for each value of `next_group`.
        """
        # Without a reshape, which a compiler simplifies for minutes.
        parts = x.unflatten(0, (-1, self.rows_per_group))
        wide = parts.to(self.weight.dtype)
        var, mean = torch.var_mean(wide, dim=(1, 3, 4), correction=0, keepdim=True)
        weight, bias = (each[:, None, None] for each in (self.weight, self.bias))
        y = (wide - mean) * ((var + self.eps).rsqrt() * weight) + bias
        pixels = parts[0, :, 0].numel()
        with torch.no_grad():
            seen = mean.detach(), var.detach() * (pixels / (pixels - 1))
            self.seen = seen[0].flatten(1), seen[1].flatten(1)
        normalized: Tensor = y.to(x.dtype).flatten(0, 1)
        return normalized


@torch.no_grad()
def take_in(norms: list[GroupedBatchNorm]) -> None:
    """Update the running statistics and `next_group` after a compiled pass."""
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
    """BatchNorm of each group of rows, written to one tensor without a copy or change of format.

    Kernels and the order of sums are those of one `batch_norm` per group.
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
        """Return the gradients of `x`, `weight` and `bias`, summed from the last group down."""
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


class _NormalizeSpanning(torch.autograd.Function):
    """BatchNorm of a group of which this process has one of `span` equal parts.

    Moments are combined in the order of ranks (Chan, Golub and LeVeque 1979).
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
        span: int,
    ) -> Tensor:
        """Return `x` normalised; update the group's `running_mean` and `running_var`."""
        wide, pixels = x.to(weight.dtype), x.numel() // len(weight)
        moments = torch.stack(torch.var_mean(wide, dim=(0, 2, 3), correction=0))
        variances, means = comms.all_gather_within(moments, span).unbind(1)
        mean = means.mean(0)
        var = variances.mean(0) + (means - mean).square().mean(0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (span * pixels / (span * pixels - 1)), momentum)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.span = eps, span
        return F.batch_norm(wide, mean, var, weight, bias, False, 0, eps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `x`, `weight` and `bias`; the last two of this process's rows."""
        x, weight, mean, var = ctx.saved_tensors
        dy, wide, wanted = dy.to(weight.dtype), x.to(weight.dtype), [True, True, True]
        dx, *sums = torch.ops.aten.native_batch_norm_backward(
            *(dy, wide, weight, mean, var, None, None, False, ctx.eps, wanted)
        )
        pixels, invstd = x.numel() // len(weight), (var + ctx.eps).rsqrt()
        of_weight, of_bias = comms.all_gather_within(torch.stack(sums), ctx.span).mean(0) / pixels
        scale = weight * invstd
        slope = (scale * invstd * of_weight)[:, None, None]
        dx -= (wide - mean[:, None, None]) * slope + (scale * of_bias)[:, None, None]
        return dx.to(x.dtype), *sums, None, None, None, None, None


def batch_norms(encoder: nn.Module) -> list[GroupedBatchNorm]:
    """Return the grouped BatchNorm layers of an encoder, in order."""
    return [module for module in encoder.modules() if isinstance(module, GroupedBatchNorm)]


@torch.no_grad()
def average_statistics(encoder: nn.Module) -> None:
    """Set the statistics that evaluation uses to the mean over all groups of all processes."""
    groups = group_statistics(encoder)
    for number, norm in enumerate(batch_norms(encoder)):
        norm.running_mean.copy_(groups[f"{number}.group_mean"].mean(0))
        norm.running_var.copy_(groups[f"{number}.group_var"].mean(0))


@torch.no_grad()
def group_statistics(encoder: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Return the running statistics of all groups of all processes, float (bn_groups, channels).

    Their names are those of the layers, in order, behind `prefix`.
    """
    local = _local_statistics(encoder, prefix)
    if not local:  # a backbone without BatchNorm
        return {}
    gathered = comms.all_gather(torch.cat([each.flatten() for each in local.values()])[None])
    gathered = gathered[:: _span(encoder)]  # the processes of a group have the same
    parts = gathered.split([each.numel() for each in local.values()], dim=1)
    return {
        name: part.reshape(-1, each.shape[1])
        for (name, each), part in zip(local.items(), parts, strict=True)
    }


def _local_statistics(encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}{number}.{name}": getattr(norm, name)
        for number, norm in enumerate(batch_norms(encoder))
        for name in ("group_mean", "group_var")
    }


def _span(encoder: nn.Module) -> int:
    return batch_norms(encoder)[0].span


def statistics_shapes(encoder: nn.Module, groups: int, prefix: str = "") -> dict[str, torch.Size]:
    """Return the shapes of what `group_statistics` returns for `groups` groups in all."""
    local = _local_statistics(encoder, prefix)
    return {name: torch.Size([groups, mine.shape[1]]) for name, mine in local.items()}


@torch.no_grad()
def restore_group_statistics(
    encoder: nn.Module, statistics: dict[str, Tensor], prefix: str = ""
) -> None:
    """Restore this process's share of what any number of processes saved."""
    for name, mine in _local_statistics(encoder, prefix).items():
        first = comms.rank() // _span(encoder) * len(mine)
        mine.copy_(statistics[name][first:][: len(mine)])
