"""Collectives between the processes of a run; with one process each is exact and sends nothing.

The only file that imports torch.distributed.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import parse_flag_from_env
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.profiler import record_function

from moco_dist.distributed.machine import BOOT
from moco_dist.errors import ConfigError, shown

_USE_CPU = "ACCELERATE_USE_CPU"
# Collectives that this process has entered: the process with the fewest keeps the others waiting.
calls = 0
# Bytes of tensors that this process has sent in all-gathers, to N - 1 others; as many are received.
sent_bytes = 0
_rendezvous: Store | None = None


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


def uses_gpus(cpu: bool) -> bool:
    """Return whether Accelerate will use GPUs, if not asked for a `cpu`; ConfigError if unclear."""
    try:
        return torch.cuda.is_available() and not (cpu or parse_flag_from_env(_USE_CPU))
    except ValueError as error:
        raise ConfigError(
            f"{_USE_CPU}={shown(os.environ[_USE_CPU])} in the environment is neither true nor "
            "false; correct it, or unset it"
        ) from error


def require_own_gpu(timeout: timedelta) -> None:
    """Make this process's GPU the current one; ConfigError, on all, if two processes share a GPU.

    A collective of processes on GPUs, before NCCL's first one, which fails without saying so.
    """
    global _rendezvous
    if "LOCAL_RANK" not in os.environ:
        return
    number = int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()
    torch.cuda.set_device(number)
    # Kept, because it may be the only one of its server, which the process group uses, too.
    _rendezvous, rank, world = next(rendezvous("env://", timeout=timeout))
    store = PrefixStore("moco_dist/gpus", _rendezvous)
    gpu = str(torch.cuda.get_device_properties(number).uuid)
    store.set(f"{rank}", json.dumps([socket.gethostname(), BOOT, gpu]))
    places = [tuple(json.loads(t)) for t in store.multi_get([f"{r}" for r in range(world)])]
    store.set(f"read {rank}", "")
    if rank == 0:  # the server may end with it
        store.wait([f"read {r}" for r in range(world)])
    for other, place in enumerate(places):
        if (owner := places.index(place)) != other:
            host, _, gpu = place
            raise ConfigError(
                f"processes {owner} and {other} on {host} have the same GPU ({gpu}); start one "
                "process for each GPU, and check --num_processes and CUDA_VISIBLE_DEVICES"
            ).on_all()


@record_function("communication")
@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """Return `x` of every process, of equal shapes, joined along dimension 0 in order of ranks."""
    return all_gather_later(x)()


@torch.no_grad()
def all_gather_later(x: Tensor) -> Callable[[], Tensor]:
    """Begin an `all_gather`; return what waits for it and returns its result.

    What is computed in between, and the time until the last process comes, overlap with it.
    """
    if world_size() == 1:
        return lambda: x
    _count(x.nbytes * (world_size() - 1))
    # One collective under NCCL, where a list of parts would be a broadcast for each process.
    whole, x = x.new_empty(world_size() * len(x), *x.shape[1:]), x.contiguous()
    work = dist.all_gather_into_tensor(whole, x, async_op=True)

    @record_function("communication")
    def end() -> Tensor:
        assert work, "an asynchronous collective returns its work"
        work.wait()
        return whole

    return end


@torch.no_grad()
def all_gather_with_note(x: Tensor, note: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """Begin to gather `x` and each process's `note`, int64 (k,), in one message.

    Return what waits for it and returns `all_gather(x)` and the notes, (processes, k).
    """
    if world_size() == 1:
        return lambda: (x, note[None])
    whole = all_gather_later(torch.cat([x.flatten(), note.view(x.dtype)])[None])

    def end() -> tuple[Tensor, Tensor]:
        keys, notes = whole().tensor_split([x.numel()], dim=1)
        return keys.reshape(-1, *x.shape[1:]), notes.contiguous().view(torch.int64)

    return end


def all_gather_within(x: Tensor, processes: int) -> Tensor:
    """Return `x` of each process of a block of so many, this one's, (processes, *x.shape).

    Process r is in block r // processes. All processes of the run take part.
    """
    first = rank() // processes * processes
    return all_gather(x[None])[first : first + processes]


def without_waiting(x: Tensor, device: torch.device) -> Tensor:
    """Return `x`, which is on the CPU, on `device`; the copy to a GPU runs behind the host."""
    pinned = x.pin_memory() if device.type == "cuda" else x
    return pinned.to(device, non_blocking=True)


@record_function("communication")
@torch.no_grad()
def all_to_all_rows(x: Tensor, places: Tensor) -> Tensor:
    """Return this process's share of all rows after a permutation; each row is sent once.

    `x` (rows, ...), of any dtype, are this process's rows; all have equally many. `places`,
    int64 (rows * processes,) on the CPU and the same everywhere, has the new place of each row of
    all processes in the order of ranks: process r gets places [r rows, (r + 1) rows) in order.
    """
    each, processes, mine = len(x), world_size(), rank()
    assert len(places) == each * processes, f"{len(places)} places for {each} x {processes} rows"
    # Each process sends to another one in the order of the places there.
    own = places.view(processes, each)[mine]
    message = x[without_waiting(own.argsort(), x.device)]
    if processes == 1:
        return message
    owners = places.argsort()[mine * each :][:each] // each
    sent = (own // each).bincount(minlength=processes).tolist()
    wanted = owners.bincount(minlength=processes).tolist()
    received = torch.empty_like(message)
    _count()
    dist.all_to_all_single(received, message, wanted, sent)
    # From the order of the senders to that of the places.
    return received[without_waiting(owners.argsort(stable=True).argsort(), x.device)]


@torch.no_grad()
def total(x: Tensor) -> Tensor:
    """Return the sum of `x` over the processes, added in the order of ranks."""
    return x if world_size() == 1 else all_gather(x[None]).sum(0)


@record_function("communication")
@torch.no_grad()
def add_up(x: Tensor) -> None:
    """Replace `x` by its sum over the processes, in the order that suits the network."""
    _count()
    dist.all_reduce(x)


def mean(x: Tensor) -> Tensor:
    """Return the mean of `x` over the processes."""
    return total(x) / world_size()


def gather_objects(value: Any) -> list[Any]:
    """Return the small `value` of every process, in the order of ranks."""
    if world_size() == 1:
        return [value]
    _count()
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_bytes(size: int) -> int:
    """Return the bytes that each process sends, and receives, in a ring all-reduce of `size`.

    Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009.
    """
    return 2 * size * (world_size() - 1) // world_size()


def _count(sent: int = 0) -> None:
    global calls, sent_bytes
    calls += 1
    sent_bytes += sent


def lost_connection(error: BaseException) -> bool:
    """Return whether an error is one of a collective in which another process failed."""
    if isinstance(error, dist.DistError):
        return True
    words = r"gloo|nccl|connection (closed|reset|refused)|timed out waiting|broken pipe"
    return type(error) is RuntimeError and re.search(words, str(error), re.IGNORECASE) is not None


class Board:
    """Short texts, by key, that the processes leave for one another while collectives hang."""

    def __init__(self) -> None:
        # A separate connection: the threads of a process may not share one.
        self._store = dist.distributed_c10d._get_default_store().clone()
        self._store.set_timeout(timedelta(seconds=5))

    def post(self, key: str, text: str) -> None:
        """Leave `text` under `key`; RuntimeError if the process with the store is gone."""
        self._store.set(f"moco_dist/{key}", text)

    def has(self, keys: list[str]) -> bool:
        """Return whether there is a text under each of `keys`."""
        return bool(self._store.check([f"moco_dist/{key}" for key in keys]))

    def read(self, key: str) -> str | None:
        """Return the text under `key`, or None."""
        return self._store.get(f"moco_dist/{key}").decode() if self.has([key]) else None
