"""Figures of a probe that are taken once, at its end; each image counts once on all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from moco_dist.distributed import comms
from moco_dist.encoders import features
from moco_dist.probe import heads
from moco_dist.probe.linear_probe import LinearProbe


@torch.no_grad()
def train_top1(probe: LinearProbe) -> Tensor:
    """Return each head's share of hits among the images that it learns from.

    It is float64 (encoders, seeds, points).
    """
    tensors, found = probe.heads.state_dict(), []
    for seed, rows in enumerate(probe.subsets):
        weight, bias = (tensors[key][:, seed, None] for key in ("weight", "bias"))
        inputs, labels = probe.features["train"][:, None, rows], probe.parts["train"].labels[rows]
        found.append(heads.sums(inputs, labels[None], weight, bias, 1)[..., 2] / len(rows))
    return torch.cat(found, dim=1)


@torch.no_grad()
def confusion(probe: LinearProbe, name: str, part: str, point: int) -> Tensor:
    """Return how many images of each class are taken for which, int64 (seeds, true, predicted).

    By the heads of one encoder and point of the grid.
    """
    place, classes = probe.names.index(name), len(probe.splits.train.classes)
    mine = slice(comms.rank(), None, comms.world_size())
    weight, bias = probe.heads.weight[place, :, point], probe.heads.bias[place, :, point]
    found = probe.features[part][place, mine] @ weight.mT + bias[:, None]
    pairs = probe.parts[part].labels[mine] * classes + found.argmax(2)
    counts = torch.stack([each.bincount(minlength=classes**2) for each in pairs])
    return comms.total(counts).reshape(-1, classes, classes)


def knn_top1(probe: LinearProbe, name: str, part: str) -> float:
    """Return the share of a part's images that the nearest training images classify rightly.

    The neighbours are those whose labels the first seed knows.
    """
    images, settings, place = probe.parts[part], probe.config.knn, probe.names.index(name)
    mine, known = features.share(len(images)).to(probe.session.device), probe.subsets[0]
    train = probe.parts["train"]
    predicted = features.predict(
        probe.features[part][place, mine],
        probe.features["train"][place, known],
        train.labels[known],
        len(train.classes),
        settings.k,
        settings.temperature,
    )
    return float(comms.total((predicted == images.labels[mine]).sum())) / len(images)
