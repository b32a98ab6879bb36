"""Figures of training, without labels."""

from __future__ import annotations

import torch
from torch import Tensor

from moco_dist.distributed import comms
from moco_dist.runs.record import Metric


def of_step(loss: Tensor, logits: Tensor, temperature: float) -> dict[str, float]:
    """Return loss, instance accuracy and mean similarities of a step, over all processes.

    `loss` is this process's mean, float (); `logits` its rows, (rows, 1 + negatives), positive
    first, -inf where a negative doesn't count. Without negatives, as in the first step, there is no
    similarity of them.
    """
    positive, negative = logits[:, :1], logits[:, 1:]
    rank = (negative >= positive).sum(1)
    count = negative.isfinite().sum()
    mean_negative = negative.masked_fill(~negative.isfinite(), 0).sum() / count.clamp(min=1)
    figures = [loss, (rank < 1).double().mean(), (rank < 5).double().mean()]
    figures += [positive.mean() * temperature, mean_negative * temperature]
    values = comms.mean(torch.stack([figure.double() for figure in figures])).tolist()
    names = [Metric.LOSS, Metric.ACCURACY_TOP1, Metric.ACCURACY_TOP5]
    names += [Metric.POSITIVE, Metric.NEGATIVE]
    shown = dict(zip(names, values, strict=True))
    if not negative.numel():
        del shown[Metric.NEGATIVE]
    return shown
