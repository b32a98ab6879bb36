"""InfoNCE (equation 1 of the paper) and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def info_nce(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float,
    owners: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean InfoNCE loss (equation 1) and the logits, (rows, 1 + filled), positive first.

    `queries` and `positives` are unit vectors (rows, dim), `negatives` (filled, dim). `owners`,
    int64 (filled,), is the row whose own image a negative shows, so that it doesn't count in that
    row; -1 for none. Only the loss has a gradient, and only for the queries.
    """
    loss, logits = _InfoNCE.apply(queries, positives, negatives, temperature, owners)
    return loss, logits


def owners(theirs: Tensor, samples: Tensor) -> Tensor:
    """Return for each of the samples `theirs` the row of `samples` that it is, -1 for none.

    int64 (n,); `samples`, int64 (rows,), are distinct. Builds no matrix of rows by n.
    """
    ordered, rows = samples.sort()
    place = torch.searchsorted(ordered, theirs).clamp_(max=len(samples) - 1)
    return torch.where(ordered[place] == theirs, rows[place], -1)


class _InfoNCE(torch.autograd.Function):
    """The loss with a single tensor of logits, so that nothing of the queue's size is copied."""

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
        """Return the gradient of the queries: (softmax - one-hot positive) times the keys."""
        positives, negatives, logits, total = ctx.saved_tensors
        shares = (logits - total[:, None]).exp_()
        shares[:, 0] -= 1
        shares *= of_loss / (len(logits) * ctx.temperature)
        gradient = torch.addmm(shares[:, :1] * positives, shares[:, 1:], negatives)
        return gradient, None, None, None, None
