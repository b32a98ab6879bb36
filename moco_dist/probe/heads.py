"""Independent linear classifiers, trained together as one tensor.

There is one for each encoder, seed, and point of the grid of learning rates and weight decays.
Many of them cost little more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moco_dist.config.optim import OptimConfig
from moco_dist.method import schedule

# Most logits in memory at once during an evaluation.
_LOGITS = 2**24


@dataclass(frozen=True)
class Point:
    """A point of the grid."""

    lr: float
    weight_decay: float


class Heads(nn.Module):
    """The classifiers: `weight` (encoders, seeds, points, classes, features) and `bias`.

    All points of a seed have the same initial weights.
    """

    def __init__(
        self, encoders: int, seeds: Sequence[int], points: int, num_features: int, num_classes: int
    ) -> None:
        super().__init__()
        weights = torch.empty(encoders, len(seeds), 1, num_classes, num_features)
        with torch.random.fork_rng(devices=[]):
            for place, seed in enumerate(seeds):
                torch.manual_seed(seed)
                for encoder in range(encoders):  # more encoders don't change the first ones
                    head = nn.Linear(num_features, num_classes)
                    weights[encoder, place, 0] = nn.init.normal_(head.weight.detach(), std=0.01)
        self.weight = nn.Parameter(weights.repeat(1, 1, points, 1, 1))
        self.bias = nn.Parameter(torch.zeros(self.weight.shape[:4]))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of features (encoders, seeds or 1, rows, features)."""
        return logits(inputs, self.weight, self.bias)


def logits(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the logits (encoders, seeds, points, classes, rows) of features."""
    flat: Tensor = weight.flatten(2, 3) @ inputs.mT
    whole: Tensor = flat.unflatten(2, weight.shape[2:4]) + bias.unsqueeze(-1)
    return whole


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross-entropies (encoders, seeds, points, rows) for int64 labels (seeds, rows)."""
    places = labels[:, None, None].expand(*logits.shape[:3], 1, -1)
    return -logits.log_softmax(3).gather(3, places).squeeze(3)


class HeadOptimizer:
    """torch.optim.SGD with momentum, but each point has its own learning rate and weight decay."""

    def __init__(self, heads: Heads, points: Sequence[Point], optim: OptimConfig) -> None:
        self.parameters = dict(heads.named_parameters())
        self.buffers = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.momentum = heads.weight.new_tensor(optim.momentum)
        self.schedules = [replace(optim, lr=point.lr) for point in points]
        self.decays = heads.weight.new_tensor([point.weight_decay for point in points])
        self.decay = any(point.weight_decay for point in points)

    def rates(self, step: int, steps_per_epoch: int, total_steps: int) -> list[float]:
        """Return the learning rate of each point in step `step`."""
        place = step, steps_per_epoch, total_steps
        return [schedule.learning_rate(each, *place) for each in self.schedules]

    @torch.no_grad()
    def step(self, rates: Tensor, good: Tensor | None = None) -> None:
        """Update the classifiers by the rate of each point, and clear their gradients.

        Where `good`, bool () on their device, is false, the update changes nothing.
        """
        rate, momentum = rates, self.momentum
        if good is not None:
            rate, momentum = rate * good, torch.where(good, momentum, 1.0)
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None, "a step follows a backward pass"
            shape = (-1, *[1] * (parameter.dim() - 3))
            gradient, buffer = parameter.grad, self.buffers[name]
            if self.decay:
                gradient.addcmul_(parameter, self.decays.view(shape))
            if good is not None:
                gradient = torch.where(good, gradient, 0.0)
            buffer.mul_(momentum).add_(gradient)
            parameter.addcmul_(buffer, rate.view(shape), value=-1)
            parameter.grad = None


class Best:
    """Each classifier's weights after its best epoch on the validation images."""

    def __init__(self, heads: Heads) -> None:
        shape, device = heads.weight.shape[:3], heads.weight.device
        self.tensors = {
            "weight": heads.weight.detach().clone(),
            "bias": heads.bias.detach().clone(),
            "top1": torch.full(shape, -1.0, dtype=torch.float64, device=device),
            "epoch": torch.zeros(shape, dtype=torch.int64, device=device),
        }

    def note(self, heads: Heads, top1: Tensor, epoch: int) -> None:
        """Keep the weights whose accuracy `top1` (encoders, seeds, points) is a new best."""
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
    """Return each classifier's sums over all rows: loss, squared loss, top-1 and top-k hits.

    `inputs` are (encoders, seeds or 1, rows, features) and `labels` int64 (seeds or 1, rows); the
    result is float64 (encoders, seeds, points, 4). Of equal logits the first class wins, and a NaN
    never hits.
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
