"""Random numbers as a function: (seed, purpose, epoch, index, ...) to uniforms, permutations.

Nothing here has a state, so a number does not depend on the rank, the worker, the batch that it is
computed in, or on what was drawn before it. That is what makes a run the same on any machine and a
resume exact in mid-epoch.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

Key = int | Tensor

# splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014):
# the odd constant nearest 2^64 / golden ratio, and the two multipliers of its finalizer (variant 13
# of Stafford), as signed 64-bit integers because torch has no unsigned shifts and products.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
_MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


class Purpose(IntEnum):
    """What a number is drawn for: equal keys with different purposes give unrelated numbers."""

    SPLIT = 1
    ORDER = 2
    SHUFFLE = 3
    VIEW = 4
    SHAPES = 5
    LABELS = 6


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIER_2
    return x ^ _shift_right(x, 31)


def hashed(*keys: Key, device: torch.device | str | None = None) -> Tensor:
    """Return 64 random bits as int64, one number for each place of the broadcast `keys`.

    Keys are integers or int64 tensors that broadcast against each other; their order matters.
    The result lies on the device of the tensors among them, or on `device`.
    """
    for key in keys:
        if isinstance(key, Tensor):
            assert key.dtype == torch.int64, f"keys are int64 tensors, got {key.dtype}"
            device = key.device
    state = torch.zeros((), dtype=torch.int64, device=device)
    for key in keys:
        state = _mix((state ^ key) + _GOLDEN)
    return state


def uniform(*keys: Key, device: torch.device | str | None = None) -> Tensor:
    """Return float64 numbers in [0, 1), uniform with 53 bits, shaped as the broadcast `keys`."""
    return _shift_right(hashed(*keys, device=device), 11).to(torch.float64) * 2.0**-53


def permutation(size: int, *keys: int, device: torch.device | str | None = None) -> Tensor:
    """Return a permutation of range(`size`) as int64: the order of one hash for each index."""
    index = torch.arange(size, dtype=torch.int64, device=device)
    return hashed(*keys, index).argsort(stable=True)
