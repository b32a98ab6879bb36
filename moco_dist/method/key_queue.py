"""The queue of keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.profiler import record_function


class KeyQueue(nn.Module):
    """A ring buffer of the newest `size` keys and their samples (He et al. 2020, section 3.2).

    Only filled slots are returned, so that negatives are never random vectors.
    """

    keys: Tensor
    samples: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("samples", torch.full((size,), -1, dtype=torch.int64))
        # An int, because reading a tensor would wait for the device.
        self.enqueued = 0

    @property
    def size(self) -> int:
        """Number of slots."""
        return len(self.keys)

    @property
    def filled(self) -> int:
        """Number of slots that hold a key, the first ones."""
        return min(self.enqueued, self.size)

    @record_function("memory")
    def negatives(self) -> tuple[Tensor, Tensor]:
        """Return the filled slots: keys, float (filled, dim), and samples, int64 (filled,)."""
        return self.keys[: self.filled], self.samples[: self.filled]

    @record_function("memory")
    @torch.no_grad()
    def enqueue(self, keys: Tensor, samples: Tensor) -> None:
        """Replace the oldest keys by `keys` (n, dim) of `samples` (n,); n is at most `size`."""
        assert len(keys) <= self.size, f"{len(keys)} keys don't fit into a queue of {self.size}"
        start = self.enqueued % self.size
        tail = min(len(keys), self.size - start)
        for ring, new in ((self.keys, keys), (self.samples, samples)):
            ring[start : start + tail] = new[:tail]
            ring[: len(new) - tail] = new[tail:]
        self.enqueued += len(keys)

    @record_function("memory")
    @torch.no_grad()
    def write(self, keys: Tensor, samples: Tensor, enqueued: Tensor, good: Tensor) -> None:
        """Do what `enqueue` does where the device knows the numbers, and only if `good`, bool ().

        `enqueued`, int64 (), are the keys so far; the count of this object stays as it is.
        """
        places = (enqueued + torch.arange(len(keys), device=keys.device)) % self.size
        for ring, new in ((self.keys, keys), (self.samples, samples)):
            ring.index_copy_(0, places, torch.where(good, new, ring[places]))
