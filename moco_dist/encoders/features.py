"""Backbone features of a set of images, computed by all processes, and nearest neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_dist.config.recipe import ViewsConfig
from moco_dist.data.datasets import AnyImages
from moco_dist.distributed import comms
from moco_dist.method import views


def share(size: int) -> Tensor:
    """Return this process's share of range(`size`), int64; the shares are disjoint."""
    return torch.arange(comms.rank(), size, comms.world_size())


@torch.no_grad()
def extract(
    backbone: nn.Module,
    images: AnyImages,
    config: ViewsConfig,
    batch_size: int,
    pause: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the features of the images' centre views, (len(images), features), in order.

    Every process gets all of them and calls `pause` equally often, before each batch. The backbone
    must be in evaluation mode; the features have its dtype.
    """
    assert not backbone.training, "features need a backbone in evaluation mode"
    dtype = next(backbone.parameters()).dtype
    size, processes = len(images), comms.world_size()
    each = -(-size // processes)
    rows = torch.arange(each) * processes + comms.rank()
    # Every process has equally many rows; the last image replaces those beyond the end.
    rows = rows.clamp(max=max(size - 1, 0)).to(images.labels.device)
    batches = rows.split(batch_size)
    parts, pixels = [], images.batches(batches)
    for _ in batches:
        pause()
        parts.append(backbone(views.center(next(pixels), config, dtype)).to(dtype))
    gathered = comms.all_gather(torch.cat(parts))
    return gathered.reshape(processes, each, -1).transpose(0, 1).flatten(0, 1)[:size]


@torch.no_grad()
def nearest(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Return the rows of `bank` with the highest cosine similarity, int64 (queries, k), in order.

    A `k` above the length of the bank returns all of it.
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
        # The largest similarity is subtracted against overflow.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(chunk), num_classes)
        votes.scatter_add_(1, bank_labels[nearest], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions) if predictions else bank_labels[:0]
