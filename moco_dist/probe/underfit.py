"""Whether a classifier had not yet learned what its features tell when its training ended."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moco_dist.probe.linear_probe import LinearProbe

# Training images that are looked at, and steps tried, each half as long as the one before.
_IMAGES, _STEPS = 5000, 12


def losses(probe: LinearProbe, encoder: int, point: int) -> tuple[float, float]:
    """Return the training loss of an encoder's classifier, and the least after one more step.

    The loss is the mean cross-entropy of the first seed's classifier on unaugmented training
    images, at most _IMAGES of them. The step is one of gradient descent on all of these, with the
    best of several lengths, so that it doesn't depend on the learning rate. Classifiers of the same
    features have one minimum of the loss: far from it, one step lowers the loss by much.
    """
    rows = probe.subsets[0]
    rows = rows[:: -(-len(rows) // _IMAGES)]
    features = probe.features["train"][encoder, rows].double()
    labels = probe.splits.train.labels[rows]
    return descent(
        features, labels, probe.heads.weight[encoder, 0, point], probe.heads.bias[encoder, 0, point]
    )


def descent(features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> tuple[float, float]:
    """Return the cross-entropy of a linear classifier, and the least after one step of descent."""
    weight, bias = weight.detach().double(), bias.detach().double()
    with torch.no_grad():
        logits = functional.linear(features, weight, bias)
        now = functional.cross_entropy(logits, labels)
        error = logits.softmax(1)
        error[torch.arange(len(labels), device=labels.device), labels] -= 1
        error /= len(labels)
        # Features on one scale, around 0: a random encoder's hardly differ from their mean.
        scaled = (features - features.mean(0)) / features.std(0).clamp(min=1e-12)
        slope, shift = error.T @ scaled, error.sum(0)
        steepness = slope.square().sum() + shift.square().sum()
        # To a loss of 0, if it fell as steeply all the way: longer steps can't be the best.
        longest = now / steepness.clamp(min=torch.finfo(now.dtype).tiny)
        change = functional.linear(scaled, slope, shift)
        after = [
            functional.cross_entropy(logits - longest * 0.5**k * change, labels)
            for k in range(_STEPS)
        ]
    return float(now), float(torch.stack([now, *after]).min())
