"""Figures of a finished probe and their 95% intervals, over all processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

import torch
from torch import Tensor

from moco_dist.distributed import comms
from moco_dist.encoders import features
from moco_dist.probe import heads
from moco_dist.probe.linear_probe import LinearProbe

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


@torch.no_grad()
def train_top1(probe: LinearProbe) -> Tensor:
    """Return each head's accuracy on its own training images, float64 (encoders, seeds, points)."""
    tensors, found = probe.heads.state_dict(), []
    for seed, rows in enumerate(probe.subsets):
        weight, bias = (tensors[key][:, seed, None] for key in ("weight", "bias"))
        inputs, labels = probe.features["train"][:, None, rows], probe.parts["train"].labels[rows]
        found.append(heads.sums(inputs, labels[None], weight, bias, 1)[..., 2] / len(rows))
    return torch.cat(found, dim=1)


@torch.no_grad()
def confusion(probe: LinearProbe, name: str, part: str, point: int) -> Tensor:
    """Return the confusion matrices of an encoder at a point, int64 (seeds, true, predicted)."""
    place, classes = probe.names.index(name), len(probe.splits.train.classes)
    mine = slice(comms.rank(), None, comms.world_size())
    weight, bias = probe.heads.weight[place, :, point], probe.heads.bias[place, :, point]
    found = probe.features[part][place, mine] @ weight.mT + bias[:, None]
    pairs = probe.parts[part].labels[mine] * classes + found.argmax(2)
    counts = torch.stack([each.bincount(minlength=classes**2) for each in pairs])
    return comms.total(counts).reshape(-1, classes, classes)


def knn_top1(probe: LinearProbe, name: str, part: str) -> float:
    """Return the kNN accuracy on a part; the neighbours are the first seed's training images."""
    images, settings, place = probe.parts[part], probe.config.knn, probe.names.index(name)
    mine, known = features.share(len(images)).to(probe.session.device), probe.subsets[0]
    train, bank = probe.parts["train"], probe.features["train"][place]
    if len(known) < len(bank):  # all of them need no copy, which would be one of gigabytes
        bank = bank[known]
    predicted = features.predict(
        probe.features[part][place, mine],
        bank,
        train.labels[known],
        len(train.classes),
        settings.k,
        settings.temperature,
    )
    return float(comms.total((predicted == images.labels[mine]).sum())) / len(images)


def student_t(values: Sequence[float]) -> tuple[float, float]:
    """Return the interval of the mean of at least two values (Student 1908)."""
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the interval of a share of `count` images (Wilson 1927), within 0 and 1."""
    weight = Z**2 / count
    middle = (share + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def normal(mean: float, mean_of_squares: float, count: int) -> tuple[float, float]:
    """Return the normal interval of the mean of `count` values."""
    half = Z * math.sqrt(max(0.0, mean_of_squares - mean**2) / count)
    return mean - half, mean + half


def t_quantile(freedom: int) -> float:
    """Return the two-sided 95% quantile of Student's t for at least one degree of freedom."""
    low, high = 0.0, 13.0  # one degree has 12.706
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < LEVEL else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """Return the probability of [-t, t]: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, odd, total = math.cos(angle), freedom % 2, 0.0
    term = cosine if odd else 1.0
    for k in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
