"""Backbone features of a whole set of images, computed by all processes together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moco_dist.config.recipe import ViewsConfig
from moco_dist.data.datasets import AnyImages
from moco_dist.distributed import comms
from moco_dist.method import views


def share(size: int) -> Tensor:
    """Return this process's share of range(`size`), int64; each number is in one share only."""
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

    Every process gets them all, and calls `pause` equally often, before each batch. The backbone
    must be in evaluation mode; the dtype of the features is its own.
    """
    assert not backbone.training, "features are taken in evaluation mode"
    dtype = next(backbone.parameters()).dtype
    size, processes = len(images), comms.world_size()
    each = -(-size // processes)
    rows = torch.arange(each) * processes + comms.rank()
    # Processes take equally many; the last image stands in for rows that there are not.
    rows = rows.clamp(max=max(size - 1, 0)).to(images.labels.device)
    batches = rows.split(batch_size)
    parts, pixels = [], images.batches(batches)
    for _ in batches:
        pause()
        parts.append(backbone(views.center(next(pixels), config, dtype)))
    gathered = comms.all_gather(torch.cat(parts))
    return gathered.reshape(processes, each, -1).transpose(0, 1).flatten(0, 1)[:size]
