"""A linear probe that learns while the encoder does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Steps over which the moments of the features are averaged, and what keeps a variance above 0.
_STEPS, _EPSILON = 100, 1e-5
_MOMENTUM = 0.9
# Features are standardised and divided by the root of their number, so that a vector has a length
# of about 1 and one rate suits encoders of any width.
RATE = 2.0


class OnlineProbe(nn.Module):
    """Multinomial logistic regression on standardised features, by SGD with momentum.

    Every process sees the features of the whole batch and takes the same step. No gradient reaches
    the encoder: the features are numbers to it.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        for name, shape in (("weight", (classes, features)), ("bias", (classes,))):
            self.register_buffer(name, torch.zeros(shape))
            self.register_buffer(f"{name}_momentum", torch.zeros(shape))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("var", torch.ones(features))
        self.register_buffer("steps", torch.zeros(()))

    @torch.no_grad()
    def learn(
        self, features: Tensor, labels: Tensor, rate: float | Tensor, good: Tensor | None = None
    ) -> None:
        """Take a step on the `features` of a batch, (rows, features), and its `labels`, (rows,).

        A label below 0 is unknown. With `good`, bool (), nothing changes unless it is true.
        """
        old, features = dict(self.named_buffers()), features.to(self.weight.dtype)
        share = 1 / (old["steps"].clamp(max=_STEPS - 1) + 1)
        mean = torch.lerp(old["mean"], features.mean(0), share)
        var = torch.lerp(old["var"], features.var(0, correction=0), share)
        points = _standardised(features, mean, var)
        known = (labels >= 0).to(points.dtype)[:, None]
        targets = F.one_hot(labels.clamp(min=0), len(self.bias)).to(points.dtype)
        errors = (F.softmax(points @ self.weight.T + self.bias, dim=1) - targets) * known
        errors /= known.sum().clamp(min=1)
        new = {"mean": mean, "var": var, "steps": old["steps"] + 1}
        for name, gradient in (("weight", errors.T @ points), ("bias", errors.sum(0))):
            momentum = _MOMENTUM * old[f"{name}_momentum"] + gradient
            new |= {f"{name}_momentum": momentum, name: old[name] - rate * momentum}
        for name, value in new.items():
            old[name].copy_(value if good is None else torch.where(good, value, old[name]))

    @torch.no_grad()
    def right(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return how many of the `features` (rows, features) are classified as `labels` say, ()."""
        points = _standardised(features.to(self.weight.dtype), self.mean, self.var)
        right: Tensor = (points @ self.weight.T + self.bias).argmax(1) == labels
        return right.sum()


def _standardised(features: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    points: Tensor = (features - mean) / (var + _EPSILON).sqrt() / features.shape[1] ** 0.5
    return points
