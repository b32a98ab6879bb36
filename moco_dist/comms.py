"""Collectives between the processes of a run; with one process each is exact and sends nothing.

The only file that imports torch.distributed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moco_dist.errors import UserError

Result = TypeVar("Result")


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Return the number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if world_size() > 1 else 0


def is_main() -> bool:
    """Return whether this is process 0, the one that writes and prints."""
    return rank() == 0


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """Return `x` of every process, of equal shapes, joined along dimension 0 in order of ranks."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def total(x: Tensor) -> Tensor:
    """Return the sum of `x` over the processes, added in the order of ranks."""
    return x if world_size() == 1 else all_gather(x[None]).sum(0)


def mean(x: Tensor) -> Tensor:
    """Return the mean of `x` over the processes."""
    return total(x) / world_size()


def gather_objects(value: Any) -> list[Any]:
    """Return the (small) `value` of every process, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def same_everywhere(what: str, value: Any) -> None:
    """Raise UserError, naming the ranks, unless `value` is the same on every process."""
    values = gather_objects(value)
    different = [r for r, other in enumerate(values) if other != values[0]]
    if different:
        raise UserError(
            f"{what} is {values[0]} on process 0 and {values[different[0]]} on process "
            f"{different[0]} (differs on {different}); start all processes with the same command "
            "and files"
        )


def together(work: Callable[[], Result]) -> Result:
    """Return `work()`; a UserError on any process is raised on all, so that none waits forever."""
    result: Result | None = None
    error: UserError | None = None
    try:
        result = work()
    except UserError as raised:
        error = raised
    for first in gather_objects(error):
        if first is not None:
            raise first
    return result  # type: ignore[return-value]  # None only where work() returned it


def from_main(work: Callable[[], Result]) -> Result:
    """Return on every process what `work()` gives on process 0, which alone calls it."""
    mine = together(lambda: work() if is_main() else None)
    first: Result = gather_objects(mine)[0]
    return first
