"""Losses whose negatives are the same step's vectors, with gradients on both sides of a pair.

Each is a function of the vectors of the whole batch. A process computes its own rows' share of that
function's gradient in closed form, so that nothing is differentiated through a collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Returns what all processes hold for both views in the batch's order, (2 batch_size, ...), from
# what this process holds for its rows of the first view and of the permuted second one,
# (local, 2, ...).
Everyone = Callable[[Tensor], Tensor]


class Share(NamedTuple):
    """This process's share of a loss."""

    # The mean loss of this process's rows, ().
    loss: Tensor
    # Their logits, (rows, 1 + others), positive first, -inf where another one doesn't count.
    logits: Tensor
    # The gradient of the batch's mean loss by this process's vectors of both views,
    # (local, 2, dim).
    gradient: Tensor


@torch.no_grad()
def nt_xent(
    mine: Tensor, places: Tensor, vectors: Tensor, everyone: Everyone, temperature: float
) -> Share:
    """Return NT-Xent, whose rows are both views (Chen et al. 2020, equation 1).

    `mine`, unit vectors (local, 2, dim), are those of `places`, int64 (local, 2), in the batch, and
    `vectors` those of all processes, (2 batch_size, dim). The loss is the mean over all rows, and
    the gradient that of the sum of the two views' means, as in the symmetric loss of MoCo.
    """
    local, batch = len(mine), len(vectors) // 2
    views = torch.arange(2, device=mine.device) * batch
    own, partner = (places + views).flatten(), (places + views.flip(0)).flatten()
    logits, totals = _logits(mine.flatten(0, 1), vectors, partner, temperature, but=own)
    theirs = everyone(totals.view(local, 2))
    positive, similarities = logits[:, 0], logits[:, 1:]
    shares = (similarities - totals[:, None]).exp_()
    shares += (similarities - theirs).exp_()
    rows = torch.arange(2 * local, device=mine.device)
    shares[rows, partner] = (positive - totals).exp() + (positive - theirs[partner]).exp() - 2
    gradient = (shares @ vectors) / (batch * temperature)
    return Share((totals - positive).mean(), logits, gradient.view_as(mine))


@torch.no_grad()
def one_way(
    mine: Tensor, places: Tensor, vectors: Tensor, everyone: Everyone, temperature: float
) -> Share:
    """Return InfoNCE of the first view's rows among the second one's (He et al. 2020, figure 2a).

    The arguments are those of `nt_xent`. All vectors of the second view are candidates.
    """
    (firsts, seconds), (at, of) = mine.unbind(1), places.unbind(1)
    queries, keys = vectors.chunk(2)
    logits, totals = _logits(firsts, keys, at, temperature)
    theirs, _ = everyone(torch.stack([totals, totals], 1)).chunk(2)
    positive, rows = logits[:, 0], torch.arange(len(mine), device=mine.device)
    shares = (logits[:, 1:] - totals[:, None]).exp_()
    shares[rows, at] = (positive - totals).exp() - 1
    back = (seconds @ queries.T / temperature - theirs).exp_()
    back[rows, of] -= 1
    gradient = torch.stack([shares @ keys, back @ queries], 1) / (len(keys) * temperature)
    return Share((totals - positive).mean(), logits, gradient)


def _logits(
    rows: Tensor,
    candidates: Tensor,
    positive: Tensor,
    temperature: float,
    but: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the logits of `rows` with the positive's in front, and their logsumexp, (rows,).

    A row's positive, and what `but` names, are -inf among its other candidates.
    """
    logits = rows.new_empty(len(rows), 1 + len(candidates))
    torch.mm(rows, candidates.T, out=logits[:, 1:])
    logits /= temperature
    place = torch.arange(len(rows), device=rows.device)
    logits[:, 0] = logits[place, 1 + positive]
    for left_out in (positive,) if but is None else (positive, but):
        logits[place, 1 + left_out] = -torch.inf
    return logits, logits.logsumexp(1)
