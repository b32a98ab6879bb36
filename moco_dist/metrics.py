"""Figures of training, without labels."""

from __future__ import annotations

import resource
import sys

import torch
from torch import Tensor

from moco_dist import comms


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
    names = ["train/loss", "train/accuracy_top1", "train/accuracy_top5"]
    names += ["similarity/positive", "similarity/negative"]
    shown = dict(zip(names, values, strict=True))
    if not negative.numel():
        del shown["similarity/negative"]
    return shown


def memory_gb(device: torch.device) -> float:
    """Return the most memory that this process has had, in 10^9 bytes: of its GPU, else resident.

    Of a GPU it is what PyTorch has handed out to tensors.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes in what getrusage counts
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
