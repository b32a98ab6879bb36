"""Linear classifiers trained side by side as one batch, without touching each other.

There is one for each encoder, each seed and each point of the grid of learning rates and weight
decays; they lie in one tensor, so that many cost little more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moco_dist.config.probe import GridConfig
from moco_dist.config.recipe import OptimConfig
from moco_dist.method import schedule

# Numbers that the logits of one evaluation may take at once.
_LOGITS = 2**24


@dataclass(frozen=True)
class Point:
    """A point of the grid."""

    lr: float
    weight_decay: float


def points(grid: GridConfig, optim: OptimConfig) -> list[Point]:
    """Return the points of the grid, weight decay by weight decay."""
    rates, decays = grid.lr or [optim.lr], grid.weight_decay or [optim.weight_decay]
    return [Point(lr, decay) for decay in decays for lr in rates]


class Heads(nn.Module):
    """The classifiers: `weight` (encoders, seeds, points, classes, features) and `bias`.

    All points of a seed begin with the same weights.
    """

    def __init__(
        self, encoders: int, seeds: Sequence[int], points: int, num_features: int, num_classes: int
    ) -> None:
        super().__init__()
        weights = [_first_weights(encoders, seed, num_features, num_classes) for seed in seeds]
        shape = encoders, len(seeds), points, num_classes
        weight = torch.stack(weights, dim=1)[:, :, None].expand(*shape, num_features)
        self.weight = nn.Parameter(weight.clone())
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits (encoders, seeds, points, classes, rows) of the features `inputs`.

        They are (encoders, seeds, rows, features), or of one row of seeds for all.
        """
        return logits(inputs, self.weight, self.bias)


def _first_weights(encoders: int, seed: int, num_features: int, num_classes: int) -> Tensor:
    """Return first weights (encoders, classes, features), each not depending on those after it."""
    weights = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(encoders):
            head = nn.Linear(num_features, num_classes)
            nn.init.normal_(head.weight, std=0.01)
            weights.append(head.weight.detach())
    return torch.stack(weights)


def logits(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the logits (encoders, seeds, points, classes, rows) that these weights give."""
    flat: Tensor = weight.flatten(2, 3) @ inputs.mT
    whole: Tensor = flat.unflatten(2, weight.shape[2:4]) + bias.unsqueeze(-1)
    return whole


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each classifier for each row, (encoders, seeds, points, rows).

    `labels` are int64 (seeds, rows).
    """
    places = labels[:, None, None].expand(*logits.shape[:3], 1, -1)
    return -logits.log_softmax(3).gather(3, places).squeeze(3)


class HeadOptimizer:
    """SGD with momentum as torch.optim.SGD does it, with each point's own rate and decay."""

    def __init__(self, heads: Heads, points: Sequence[Point], optim: OptimConfig) -> None:
        self.parameters = dict(heads.named_parameters())
        self.buffers = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.momentum = optim.momentum
        self.schedules = [replace(optim, lr=point.lr) for point in points]
        self.decays = heads.weight.new_tensor([point.weight_decay for point in points])
        self.decay = any(point.weight_decay for point in points)

    def rates(self, step: int, steps_per_epoch: int, total_steps: int) -> list[float]:
        """Return the learning rate of each point in step `step`."""
        return [
            schedule.learning_rate(each, step, steps_per_epoch, total_steps)
            for each in self.schedules
        ]

    @torch.no_grad()
    def step(self, rates: Sequence[float]) -> None:
        """Move the classifiers by their gradients, which are then gone."""
        rate = self.decays.new_tensor(rates)
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None, "a step follows a backward pass"
            shape = (-1, *[1] * (parameter.dim() - 3))
            gradient, buffer = parameter.grad, self.buffers[name]
            if self.decay:
                gradient.addcmul_(parameter, self.decays.view(shape))
            buffer.mul_(self.momentum).add_(gradient)
            parameter.addcmul_(buffer, rate.view(shape), value=-1)
            parameter.grad = None


class Best:
    """For each classifier its weights after the epoch that was best on the validation split."""

    def __init__(self, heads: Heads) -> None:
        shape, device = heads.weight.shape[:3], heads.weight.device
        self.tensors = {
            "weight": heads.weight.detach().clone(),
            "bias": heads.bias.detach().clone(),
            "top1": torch.full(shape, -1.0, dtype=torch.float64, device=device),
            "epoch": torch.zeros(shape, dtype=torch.int64, device=device),
        }

    def note(self, heads: Heads, top1: Tensor, epoch: int) -> None:
        """Take over the weights whose accuracy `top1` (encoders, seeds, points) is a new best."""
        old = self.tensors
        better = top1 > old["top1"]
        self.tensors = {
            "weight": torch.where(better[..., None, None], heads.weight.detach(), old["weight"]),
            "bias": torch.where(better[..., None], heads.bias.detach(), old["bias"]),
            "top1": torch.where(better, top1, old["top1"]),
            "epoch": torch.where(better, epoch, old["epoch"]),
        }


@torch.no_grad()
def sums(inputs: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> Tensor:
    """Return of each classifier, over all rows, the sums of loss, loss squared, hits, hits in k.

    `inputs` is (encoders, seeds or 1, rows, features), `labels` int64 (seeds or 1, rows); the
    result float64 (encoders, seeds, points, 4). A hit's class has the highest logit, and of equal
    ones the smallest number; a logit that is no number hits nothing.
    """
    encoders, seeds, points, classes, _ = weight.shape
    rows = max(1, _LOGITS // (encoders * seeds * points * classes))
    total = torch.zeros(encoders, seeds, points, 4, dtype=torch.float64, device=weight.device)
    for part, labels_of_part in zip(inputs.split(rows, 2), labels.split(rows, 1), strict=True):
        found = logits(part, weight, bias)
        places = torch.arange(classes, device=labels.device)[:, None]
        target = labels_of_part[:, None, None]
        own = found.gather(3, target.expand(*found.shape[:3], 1, -1))
        behind = (found < own) | ((found == own) & (places >= target))
        before = classes - behind.sum(3)
        loss = losses(found, labels_of_part).double()
        columns = [loss, loss.square(), before < 1, before < top_k]
        total += torch.stack([column.double().sum(-1) for column in columns], dim=-1)
    return total
