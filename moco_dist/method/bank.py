"""The memory bank: one vector for each training image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from moco_dist.method.loss import owners
from moco_dist.randomness import Key, Purpose, uniform

# Rows whose random numbers are made at a time.
_ROWS = 65_536


class Bank(nn.Module):
    """A unit vector for each image, the moving average of its queries (Wu et al. 2018, section 3).

    `draws` images are the negatives of all queries of a step, drawn uniformly with replacement, or
    all images with 0. `momentum` is the share of an image's old vector that stays. Without
    `random_start` the vectors are zeros, which somebody has to replace.
    """

    vectors: Tensor

    def __init__(
        self,
        images: int,
        dim: int,
        seed: int,
        draws: int,
        momentum: float,
        random_start: bool = True,
    ) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(images, dim))
        self.seed, self.draws, self.momentum = seed, draws, momentum
        if not random_start:
            return
        columns = torch.arange(dim)
        for rows in torch.arange(images).split(_ROWS):
            keys = seed, Purpose.BANK_START, rows[:, None], columns
            u, v = (uniform(*keys, number) for number in range(2))
            normal = (-2 * torch.log1p(-u)).sqrt() * torch.cos(2 * math.pi * v)  # Box and Muller
            self.vectors[rows] = F.normalize(normal, dim=1).to(self.vectors.dtype)

    def drawn(self, step: Key) -> Tensor:
        """Return the images whose vectors are a step's negatives, int64 (draws,)."""
        images, device = len(self.vectors), self.vectors.device
        slots = torch.arange(self.draws or images, device=device)
        if not self.draws:
            return slots
        return (uniform(self.seed, Purpose.BANK_DRAW, step, slots) * images).long()

    @record_function("memory")
    def negatives(self, step: Key, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return a step's negatives, float (draws, dim), and the row of `samples` each shows."""
        drawn = self.drawn(step)
        return self.vectors[drawn], owners(drawn, samples)

    @record_function("memory")
    @torch.no_grad()
    def update(self, queries: Tensor, samples: Tensor, good: Tensor | None = None) -> None:
        """Move the vectors of `samples` (n,), all different, towards `queries` (n, dim).

        With `good`, bool (), only if it is true.
        """
        old = self.vectors[samples]
        new = F.normalize(self.momentum * old + (1 - self.momentum) * queries, dim=1)
        self.vectors[samples] = new if good is None else torch.where(good, new, old)
