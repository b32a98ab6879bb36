"""Random numbers as pure functions of keys such as (seed, purpose, epoch, index).

A number doesn't depend on the rank, the worker, the batch or what was drawn before it, so that a
run is the same on any machine and can be resumed exactly in mid-epoch.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

Key = int | Tensor

# splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014): the
# odd number nearest 2^64 / golden ratio, and the multipliers of its finalizer (Stafford's variant
# 13), as signed integers because torch has no unsigned shifts and products.
_TWO_64 = 2**64
_GOLDEN = 0x9E3779B97F4A7C15 - _TWO_64
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - _TWO_64
_MULTIPLIER_2 = 0x94D049BB133111EB - _TWO_64


class Purpose(IntEnum):
    """What a number is drawn for, as a key."""

    SPLIT = 1
    ORDER = 2
    SHUFFLE = 3
    VIEW = 4
    SHAPES = 5
    LABELS = 6
    STAND_IN = 7
    BANK_START = 8
    BANK_DRAW = 9


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MULTIPLIER_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLIER_2
    return x ^ _shift_right(x, 31)


def _mix_number(x: int) -> int:
    """Return what `_mix` does, of an unsigned number; a GPU needs ten kernels for it."""
    x = (x ^ x >> 30) * _MULTIPLIER_1 % _TWO_64
    x = (x ^ x >> 27) * _MULTIPLIER_2 % _TWO_64
    return x ^ x >> 31


def hashed(*keys: Key, device: torch.device | str | None = None) -> Tensor:
    """Return 64 random bits as int64 for each element of the broadcast `keys`.

    Keys are ints or int64 tensors; their order matters. The result is on the tensors' device, or on
    `device` without any.
    """
    for key in keys:
        if isinstance(key, Tensor):
            assert key.dtype == torch.int64, f"keys are int64 tensors, got {key.dtype}"
            device = key.device
    number, place = 0, 0
    while place < len(keys) and isinstance(key := keys[place], int):
        number = _mix_number(((number ^ key % _TWO_64) + _GOLDEN) % _TWO_64)
        place += 1
    signed = number - (_TWO_64 if number >= _TWO_64 // 2 else 0)
    state = torch.full((), signed, dtype=torch.int64, device=device)
    for key in keys[place:]:
        state = _mix((state ^ key) + _GOLDEN)
    return state


def uniform(*keys: Key, device: torch.device | str | None = None) -> Tensor:
    """Return uniform float64 numbers in [0, 1) with 53 bits, in the broadcast shape of `keys`."""
    return _shift_right(hashed(*keys, device=device), 11).to(torch.float64) * 2.0**-53


def permutation(size: int, *keys: Key, device: torch.device | str | None = None) -> Tensor:
    """Return a permutation of range(`size`) as int64: the order of the indices' hashes."""
    index = torch.arange(size, dtype=torch.int64, device=device)
    return hashed(*keys, index).argsort(stable=True)
