"""Momentum Contrast: query and key encoders, shuffled keys, InfoNCE, momentum update.

He, Fan, Wu, Xie, Girshick: Momentum Contrast for Unsupervised Visual Representation Learning,
CVPR 2020.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moco_dist import comms
from moco_dist.encoder import Encoder, batch_norms
from moco_dist.key_queue import KeyQueue


class MoCo(nn.Module):
    """The two encoders and the queue: all state of the method besides the optimizer's."""

    def __init__(self, encoder: Encoder, queue_size: int, dim: int) -> None:
        super().__init__()
        self.query_encoder = encoder
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.queue = KeyQueue(queue_size, dim)

    @torch.no_grad()
    def update_key_encoder(self, momentum: float) -> None:
        """Move the key parameters to momentum * key + (1 - momentum) * query (equation 2)."""
        keys: list[Tensor] = list(self.key_encoder.parameters())
        queries: list[Tensor] = list(self.query_encoder.parameters())
        torch._foreach_lerp_(keys, queries, 1 - momentum)


@torch.no_grad()
def shuffled_keys(
    encoder: Callable[[Tensor], Tensor],
    pieces: Sequence[Callable[[], Tensor]],
    unshuffle: Tensor,
    note: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return on every process the keys of the global batch in its order, float (batch_size, dim).

    `pieces` give the views of this process's share of the permuted batch, piece by piece; one
    gather joins the keys of all processes and `unshuffle`, int64 (batch_size,), undoes the
    permutation (section 3.3). The `note` of each process, int64 (k,), goes along: (processes, k).
    """
    mine = torch.cat([encoder(piece()) for piece in pieces])
    keys, notes = comms.all_gather_with_note(mine, note)
    return keys[unshuffle], notes


def info_nce(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float,
    owners: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean InfoNCE loss (equation 1) and the logits, (rows, 1 + filled), positive first.

    `queries` and `positives` are unit vectors (rows, dim), `negatives` (filled, dim). `owners`,
    int64 (filled,), is the row whose image a negative is an older key of, which doesn't count for
    it; -1 where there is none. The loss alone has a gradient, that of the queries.
    """
    loss, logits = _InfoNCE.apply(queries, positives, negatives, temperature, owners)
    return loss, logits


class _InfoNCE(torch.autograd.Function):
    """The loss in one tensor of logits, written once: nothing of the queue's size is copied."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        positives: Tensor,
        negatives: Tensor,
        temperature: float,
        owners: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, (), and the logits."""
        filled = len(negatives)
        logits = queries.new_empty(len(queries), 1 + filled)
        torch.sum(queries * positives, 1, out=logits[:, 0])
        torch.mm(queries, negatives.T, out=logits[:, 1:])
        logits /= temperature
        if owners is not None:
            rows, columns = owners.clamp(min=0), torch.arange(1, 1 + filled, device=owners.device)
            others = logits[rows, columns]
            logits[rows, columns] = others.masked_fill_(owners >= 0, -torch.inf)
        total = logits.logsumexp(1)
        ctx.save_for_backward(positives, negatives, logits, total)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(logits)
        return (total - logits[:, 0]).mean(), logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the queries: softmax less one at the positive, times the keys."""
        positives, negatives, logits, total = ctx.saved_tensors
        shares = (logits - total[:, None]).exp_()
        shares[:, 0] -= 1
        shares *= of_loss / (len(logits) * ctx.temperature)
        gradient = torch.addmm(shares[:, :1] * positives, shares[:, 1:], negatives)
        return gradient, None, None, None, None


@torch.no_grad()
def average_statistics(encoder: nn.Module) -> None:
    """Set the statistics that evaluation uses to the mean over all groups of all processes."""
    groups = group_statistics(encoder)
    for number, norm in enumerate(batch_norms(encoder)):
        norm.running_mean.copy_(groups[f"{number}.group_mean"].mean(0))
        norm.running_var.copy_(groups[f"{number}.group_var"].mean(0))


@torch.no_grad()
def group_statistics(encoder: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics of all groups by name, float (bn_groups, channels).

    One gather brings them all.
    """
    local = {
        f"{number}.{name}": getattr(norm, name)
        for number, norm in enumerate(batch_norms(encoder))
        for name in ("group_mean", "group_var")
    }
    if not local:  # a backbone without BatchNorm
        return {}
    gathered = comms.all_gather(torch.cat([each.flatten() for each in local.values()])[None])
    parts = gathered.split([each.numel() for each in local.values()], dim=1)
    return {
        name: part.reshape(-1, each.shape[1])
        for (name, each), part in zip(local.items(), parts, strict=True)
    }


def statistics_shapes(encoder: nn.Module, groups: int) -> dict[str, torch.Size]:
    """Return the shapes of what `group_statistics` returns for `groups` groups in all."""
    return {
        f"{number}.{name}": torch.Size([groups, norm.num_features])
        for number, norm in enumerate(batch_norms(encoder))
        for name in ("group_mean", "group_var")
    }


@torch.no_grad()
def restore_group_statistics(encoder: nn.Module, statistics: dict[str, Tensor]) -> None:
    """Take this process's share of what `group_statistics` returned, on any number of processes."""
    for number, norm in enumerate(batch_norms(encoder)):
        for name in ("group_mean", "group_var"):
            mine = getattr(norm, name)
            first = comms.rank() * len(mine)
            mine.copy_(statistics[f"{number}.{name}"][first : first + len(mine)])
