"""The rows of the data in each step, and those that are this process's queries and keys.

Process r of N owns rows [r B/N, (r + 1) B/N) of a global batch of B samples as queries. With
ShuffleBN (He et al. 2020, section 3.3) the keys are encoded in a permuted order, so that a key and
its query meet different samples in their BatchNorm groups. Every process draws the permutation from
(seed, step) and makes the keys that it assigns to it, so that no image crosses the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from moco_dist.errors import ConfigError
from moco_dist.randomness import Key, Purpose, permutation

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Step:
    """The rows of one step."""

    epoch: Key
    # Sample numbers of the global batch, int64 (batch_size,), the same on every process.
    samples: Tensor
    # This process's queries, as ascending places in the global batch, int64 (local,).
    query_rows: Tensor
    # This process's keys for each view, as places in the global batch, int64 (local,).
    key_rows: tuple[Tensor, ...]
    # For each of those views, int64 (batch_size,): keys[unshuffle] puts gathered keys in order.
    unshuffle: tuple[Tensor, ...]


@dataclass(frozen=True)
class Plan:
    """The order of all samples over a run, as a function of the step."""

    num_samples: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    device: torch.device = _CPU

    def __post_init__(self) -> None:
        if self.batch_size > self.num_samples:
            raise ConfigError(
                f"batch_size={self.batch_size} is more than the {self.num_samples} training "
                f"images; use {max(1, self.num_samples // self.world_size) * self.world_size} or "
                "less"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; each epoch leaves out different samples."""
        return self.num_samples // self.batch_size

    @property
    def local_rows(self) -> slice:
        """The rows of a global batch that this process owns."""
        local = self.batch_size // self.world_size
        return slice(self.rank * local, (self.rank + 1) * local)

    def order(self, epoch: int) -> Tensor:
        """Return the order of the samples in an epoch, int64 (num_samples,)."""
        return _order(self.num_samples, self.seed, epoch, self.device)

    def step(self, step: int, key_views: int = 1) -> Step:
        """Return the rows of a step, counted from 0 over the whole run."""
        epoch, place = divmod(step, self.steps_per_epoch)
        samples = self.order(epoch)[place * self.batch_size :][: self.batch_size]
        return self.rows(epoch, samples, step, key_views)

    def rows(self, epoch: Key, samples: Tensor, step: Key, key_views: int) -> Step:
        """Return the rows of a step of which epoch and samples are known."""
        shuffles = [
            permutation(self.batch_size, self.seed, Purpose.SHUFFLE, step, view, device=self.device)
            for view in range(key_views)
        ]
        return Step(
            epoch=epoch,
            samples=samples,
            query_rows=torch.arange(self.batch_size, device=self.device)[self.local_rows],
            key_rows=tuple(shuffle[self.local_rows] for shuffle in shuffles),
            unshuffle=tuple(shuffle.argsort() for shuffle in shuffles),
        )


@lru_cache(maxsize=4)  # two epochs where one ends, on two devices if data is streamed
def _order(num_samples: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    return permutation(num_samples, seed, Purpose.ORDER, epoch, device=device)


def check_batch(batch_size: int, world_size: int) -> None:
    """Raise ConfigError, naming sizes that work, unless processes get equal parts of a batch."""
    if batch_size % world_size:
        lower = max(world_size, batch_size // world_size * world_size)
        raise ConfigError(
            f"batch_size={batch_size} can't be split over {world_size} processes; "
            f"use a multiple of {world_size}, as {lower} or {lower + world_size}"
        )


def group_share(batch_size: int, bn_groups: int, world_size: int) -> tuple[int, int, int]:
    """Return a process's rows of a BatchNorm group, its groups, and the processes of a group."""
    parts = max(bn_groups, world_size)
    return batch_size // parts, parts // world_size, parts // bn_groups


def _fits(bn_groups: int, world_size: int) -> bool:
    return bn_groups % world_size == 0 or world_size % bn_groups == 0


def check_images(batch_size: int, bn_groups: int, world_size: int, images: int) -> None:
    """Raise ConfigError, naming numbers that fit together, if the images are too few."""
    if batch_size <= images:
        return
    rule = f"batch_size={batch_size} is more than the {images} training images"
    for groups in range(bn_groups, 0, -1):
        parts = max(groups, world_size)
        largest = images // parts * parts
        if _fits(groups, world_size) and largest >= 2 * groups:
            use = "" if groups == bn_groups else f"bn_groups={groups} and "
            raise ConfigError(f"{rule}; use {use}batch_size={largest} or less")
    raise ConfigError(
        f"{rule}, which are too few; a batch has two or more, and one or more for each process "
        f"({world_size})"
    )


def check_groups(bn_groups: int, world_size: int, micro_batches: int, compiled: bool) -> None:
    """Raise ConfigError, naming numbers that work, unless processes can share BatchNorm groups.

    Each pass of a process gets whole groups, or its part of one that several processes share.
    """
    if not _fits(bn_groups, world_size):
        raise ConfigError(
            f"bn_groups={bn_groups} can't be shared by {world_size} processes; "
            f"use {_listed(_divisors(bn_groups))} processes or a multiple of {bn_groups}, "
            f"or set bn_groups to {_listed(_divisors(world_size))} or a multiple of {world_size}"
        )
    if world_size > bn_groups:
        span = f"{world_size // bn_groups} processes share each group of bn_groups={bn_groups}"
        fewer = f"{_listed(_divisors(bn_groups))} process{'es' if bn_groups > 1 else ''}"
        if micro_batches > 1:
            raise ConfigError(
                f"runtime.micro_batches={micro_batches} can't cut a BatchNorm group: {span}; use "
                f"runtime.micro_batches=1, or {fewer}"
            )
        if compiled:
            raise ConfigError(
                f"runtime.compile=true can't compile what processes exchange in a layer: {span}; "
                f"use runtime.compile=false, or {fewer}"
            )
        return
    local = bn_groups // world_size
    if local % micro_batches:
        raise ConfigError(
            f"runtime.micro_batches={micro_batches} can't share the {local} BatchNorm groups of a "
            f"process; use {_listed(_divisors(local))}"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _listed(numbers: list[int]) -> str:
    *lower, last = map(str, numbers)
    return " or ".join(filter(None, [", ".join(lower), last]))
