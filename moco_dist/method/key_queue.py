"""The queue of keys: the newest keys of all samples, as a ring buffer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.profiler import record_function


class KeyQueue(nn.Module):
    """A ring of the newest `size` keys, each with its sample number (He et al. 2020, section 3.2).

    Takes any number of keys up to `size` at a time. Slots that were never filled are not given out,
    so random keys never stand among the negatives.
    """

    keys: Tensor
    samples: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        # float (size, dim), and int64 (size,) with -1 where no key is yet
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("samples", torch.full((size,), -1, dtype=torch.int64))
        # A number of this process, not a tensor: reading it never waits for the device.
        self.enqueued = 0

    @property
    def size(self) -> int:
        """Slots of the ring."""
        return len(self.keys)

    @property
    def filled(self) -> int:
        """Slots that hold a key; they are the first ones."""
        return min(self.enqueued, self.size)

    @record_function("queue")
    def negatives(self) -> tuple[Tensor, Tensor]:
        """Return the filled slots: keys, float (filled, dim), and samples, int64 (filled,)."""
        return self.keys[: self.filled], self.samples[: self.filled]

    @record_function("queue")
    def owners(self, samples: Tensor) -> Tensor:
        """Return for each filled slot the row of `samples` that its key is of, -1 if of none.

        int64 (filled,); `samples`, int64 (rows,), are all different. No matrix of rows by slots.
        """
        theirs = self.samples[: self.filled]
        ordered, rows = samples.sort()
        place = torch.searchsorted(ordered, theirs).clamp_(max=len(samples) - 1)
        return torch.where(ordered[place] == theirs, rows[place], -1)

    @record_function("queue")
    @torch.no_grad()
    def enqueue(self, keys: Tensor, samples: Tensor) -> None:
        """Write `keys` (n, dim), of the samples `samples` (n,), over the oldest ones."""
        assert len(keys) <= self.size, f"{len(keys)} keys don't fit into a queue of {self.size}"
        start = self.enqueued % self.size
        tail = min(len(keys), self.size - start)
        for ring, new in ((self.keys, keys), (self.samples, samples)):
            ring[start : start + tail] = new[:tail]
            ring[: len(new) - tail] = new[tail:]
        self.enqueued += len(keys)
