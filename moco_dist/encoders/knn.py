"""The weighted nearest-neighbour classifier: how good features are, without training anything."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def nearest(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Return the rows of `bank` with the highest cosine similarity, int64 (queries, k), in order.

    `k` may be more than there are.
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    return similarity.topk(min(k, len(bank)), dim=1).indices


@torch.no_grad()
def predict(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int, k: int, temperature: float
) -> Tensor:
    """Return the class of each query, int64 (rows,).

    The `k` nearest of `bank` (n, features) by cosine similarity s vote for their class in
    `bank_labels`, int64 (n,), with weight exp(s / temperature). Wu et al. 2018 (arXiv:1805.01978),
    section 3.4.
    """
    bank = F.normalize(bank, dim=1)
    k = min(k, len(bank))
    predictions = []
    for chunk in F.normalize(queries, dim=1).split(1024):
        similarity, nearest = (chunk @ bank.T).topk(k, dim=1)
        weights = (
            (similarity - similarity[:, :1]) / temperature
        ).exp()  # the same votes, no overflow
        votes = weights.new_zeros(len(chunk), num_classes)
        votes.scatter_add_(1, bank_labels[nearest], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions) if predictions else bank_labels[:0]
