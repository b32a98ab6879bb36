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

    With two `halves` there are two banks, `vectors` (images, 2, dim), and crossed: the queries of
    each half meet the vectors of the other one (Tian et al. 2019).
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
        halves: int = 1,
    ) -> None:
        super().__init__()
        shape = (dim,) if halves == 1 else (halves, dim)
        self.register_buffer("vectors", torch.zeros(images, *shape))
        self.seed, self.draws, self.momentum = seed, draws, momentum
        if not random_start:
            return
        columns = torch.arange(halves * dim)
        for rows in torch.arange(images).split(_ROWS):
            keys = seed, Purpose.BANK_START, rows[:, None], columns
            u, v = (uniform(*keys, number) for number in range(2))
            normal = (-2 * torch.log1p(-u)).sqrt() * torch.cos(2 * math.pi * v)  # Box and Muller
            points = F.normalize(normal.view(-1, *shape), dim=-1)
            self.vectors[rows] = points.to(self.vectors.dtype)

    def drawn(self, step: Key) -> Tensor:
        """Return the images whose vectors are a step's negatives, int64 (draws,)."""
        images, device = len(self.vectors), self.vectors.device
        slots = torch.arange(self.draws or images, device=device)
        if not self.draws:
            return slots
        return (uniform(self.seed, Purpose.BANK_DRAW, step, slots) * images).long()

    def met_by(self, samples: Tensor) -> Tensor:
        """Return the vectors of `samples` (n,) that queries meet, float (n, dim) or (n, 2, dim)."""
        vectors = self.vectors[samples]
        return vectors if vectors.ndim == 2 else vectors.flip(1)

    @record_function("memory")
    def negatives(self, step: Key, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Return a step's negatives, as `met_by` does, and the row of `samples` each shows."""
        drawn = self.drawn(step)
        return self.met_by(drawn), owners(drawn, samples)

    @record_function("memory")
    @torch.no_grad()
    def update(self, queries: Tensor, samples: Tensor, good: Tensor | None = None) -> None:
        """Move the vectors of `samples` (n,), all different, towards `queries` (n, ...).

        With `good`, bool (), only if it is true.
        """
        old = self.vectors[samples]
        new = F.normalize(self.momentum * old + (1 - self.momentum) * queries, dim=-1)
        self.vectors[samples] = new if good is None else torch.where(good, new, old)
