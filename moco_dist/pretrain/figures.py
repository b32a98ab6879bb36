"""Figures of a step without labels: its loss, and the health of the run.

Health is how keys and queries lie on the sphere, and how old the keys are. All figures come from
tensors that a step has anyway, change none of them, and are the same on any number of processes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from moco_dist.distributed import comms
from moco_dist.method.loss import owners
from moco_dist.method.moco import MoCo
from moco_dist.runs.record import Metric

logger = logging.getLogger(__name__)

# What `progress` returns, in order.
PROGRESS = (
    *(Metric.LOSS, Metric.ACCURACY_TOP1, Metric.ACCURACY_TOP5, Metric.POSITIVE, Metric.NEGATIVE),
)


def progress(loss: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Return this process's PROGRESS in a step, float64 (5,): loss, accuracies, mean similarities.

    `loss` is its mean, float (); `logits` its rows, (rows, 1 + negatives), positive first, -inf
    where a negative doesn't count.
    """
    positive, negative = logits[:, :1], logits[:, 1:]
    rank = (negative >= positive).sum(1)
    count = negative.isfinite().sum()
    mean_negative = negative.masked_fill(~negative.isfinite(), 0).sum() / count.clamp(min=1)
    figures = [loss, (rank < 1).double().mean(), (rank < 5).double().mean()]
    figures += [positive.mean() * temperature, mean_negative * temperature]
    return torch.stack([figure.double() for figure in figures])


def alignment(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the mean squared distance of positive pairs, (rows, dim) each; 0 is the best, ().

    Wang and Isola 2020 (arXiv:2005.10242), section 4.1, with alpha 2.
    """
    return (queries - keys).square().sum(1).mean()


def uniformity(points: Tensor) -> Tensor:
    """Return log E exp(-2 |x - y|^2) over the pairs of different rows of `points`, (rows, dim), ().

    0 where all unit vectors are the same one, about -4 where they are spread evenly over a sphere
    of many dimensions. Two rows or more. Wang and Isola 2020, section 4.1, with t 2.
    """
    rows, squares = len(points), points.square().sum(1)
    distances = squares[:, None] + squares - 2 * points @ points.T
    kernel = (-2 * distances.clamp(min=0)).exp()
    return ((kernel.sum() - kernel.diagonal().sum()) / (rows * (rows - 1))).log()


def rankme(points: Tensor, epsilon: float = 1e-7) -> Tensor:
    """Return the effective rank of `points` (rows, dim), from 1 to min(rows, dim), ().

    The exponential of the entropy of the normalised singular values, with the epsilon of float32;
    Garrido et al. 2023 (arXiv:2210.02885), equation 1. The singular values are roots of eigenvalues
    of the small Gram matrix: exact to 1e-8 of the largest in float64, below the epsilon.
    """
    smaller = points.T @ points if len(points) > points.shape[1] else points @ points.T
    singular = torch.linalg.eigvalsh(smaller).clamp(min=0).sqrt()
    shares = singular / singular.sum() + epsilon
    effective: Tensor = torch.exp((-shares * shares.log()).sum())
    return effective


def feature_std(points: Tensor) -> Tensor:
    """Return the standard deviation of unit vectors (rows, dim), mean over dims, times sqrt(dim).

    1 where they are spread evenly over the sphere (1 / sqrt(dim) in each dimension), 0 where all
    are the same one, (). Chen and He 2021 (arXiv:2011.10566), section 4.1.
    """
    return points.std(0).mean() * math.sqrt(points.shape[1])


def ema_distance(keys: Iterable[Tensor], queries: Iterable[Tensor]) -> Tensor:
    """Return |keys - queries| / |queries| over all parameters of the two encoders, ()."""
    mine, theirs = list(queries), list(keys)
    apart = torch._foreach_norm(torch._foreach_sub(theirs, mine))
    norms = torch.stack(list(torch._foreach_norm(mine)))
    relative: Tensor = torch.stack(list(apart)).norm() / norms.norm()
    return relative


def age_steps(filled: int, keys_per_step: int) -> float:
    """Return the mean age, in steps, of the `filled` newest keys; the newest are 1 step old."""
    whole, rest = divmod(filled, keys_per_step)
    total = keys_per_step * whole * (whole + 1) / 2 + rest * (whole + 1)
    return total / filled if filled else 0.0


def own_images(samples: Tensor, queue_samples: Tensor) -> Tensor:
    """Return how many keys of its own image a query finds in the queue, the mean, ().

    Sample numbers: `samples` int64 (batch_size,), all different, and `queue_samples` (filled,).
    """
    return (owners(queue_samples, samples) >= 0).sum() / len(samples)


@torch.no_grad()
def health(
    network: MoCo, queries: Tensor, positives: list[Tensor], samples: Tensor
) -> dict[str, float]:
    """Return the figures of a step by their names, before its vectors enter the memory.

    `queries` are this process's rows of the first pass, (rows, dim); `positives` those of the whole
    batch for each pass, (batch_size, dim), and `samples` their images. The rank is that of the keys
    in the queue, and there is none in the first step; without a queue it is that of the queries.
    Figures of two halves, (rows, 2, dim) each, are the means of both. A collective; nothing is
    changed.
    """
    points, drawn_to = map(_halves, (comms.all_gather(queries), positives[0]))
    figures = {
        Metric.ALIGNMENT: _mean(alignment, points, drawn_to),
        Metric.UNIFORMITY: _mean(uniformity, points),
        Metric.FEATURE_STD: _mean(feature_std, points),
    }
    if "key" in network.encoders:
        weights = (each.shared_parameters() for each in reversed(network.encoders.values()))
        figures[Metric.EMA_DISTANCE] = ema_distance(*weights)
    spread, others = points, dict[str, float]()
    if hasattr(network, "queue"):
        older, their_samples = network.queue.negatives()
        figures[Metric.OWN_IMAGES] = own_images(samples, their_samples)
        others[Metric.QUEUE_AGE] = age_steps(len(older), len(positives) * len(samples))
        spread = _halves(older)
    if len(spread[0]):
        try:
            figures[Metric.RANKME] = _mean(rankme, spread)
        except RuntimeError as error:  # of a solver that does not converge or has no memory
            why = " ".join(str(error).split())
            logger.warning("%s can't be computed (%s); the run continues", Metric.RANKME, why)
    values = torch.stack([figure.double() for figure in figures.values()]).tolist()
    return dict(zip(figures, values, strict=True)) | others


def _halves(points: Tensor) -> list[Tensor]:
    """Return the points of each half in float64, or all of them."""
    return [*points.double().unbind(1)] if points.ndim == 3 else [points.double()]


def _mean(figure: Callable[..., Tensor], *of: list[Tensor]) -> Tensor:
    return torch.stack([figure(*each) for each in zip(*of, strict=True)]).mean()
