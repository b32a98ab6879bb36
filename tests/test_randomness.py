"""Random numbers are a function of their keys, and behave as random numbers."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from moco_dist.randomness import hashed, permutation, uniform

MASK = 2**64 - 1


def splitmix(*keys: int) -> int:
    """The published finalizer in Python's own integers, as a signed number."""
    state = 0
    for key in keys:
        x = ((state ^ (key & MASK)) + 0x9E3779B97F4A7C15) & MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        state = x ^ (x >> 31)
    return state - 2**64 if state >= 2**63 else state


def test_hash_is_splitmix64_in_unsigned_arithmetic() -> None:
    index = torch.arange(-500, 500)
    assert hashed(3, index, 2**40).tolist() == [splitmix(3, i, 2**40) for i in range(-500, 500)]


def test_numbers_do_not_depend_on_the_batch_they_are_computed_in() -> None:
    whole = uniform(1, torch.arange(1000)[:, None], torch.arange(7))
    part = uniform(1, torch.tensor([[617], [3]]), torch.arange(7))
    assert part.equal(whole[[617, 3]])


def test_each_key_and_its_place_matter() -> None:
    keys = [(1, 2, 3), (1, 3, 2), (3, 2, 1), (1, 2, 4), (2, 2, 3), (1, 2), (1, 2, 3, 0)]
    assert len({int(hashed(*k)) for k in keys}) == len(keys)


@pytest.mark.parametrize("varied", [0, 1, 2])
def test_uniforms_are_uniform_along_each_key(varied: int) -> None:
    keys: list[int | torch.Tensor] = [5, 6, 7]
    keys[varied] = torch.arange(100_000)
    numbers = uniform(*keys)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.numpy(), "uniform").pvalue > 1e-3
    assert (
        abs(stats.pearsonr(numbers[:-1].numpy(), numbers[1:].numpy()).statistic) < 0.0125
    )  # 4 sigma


def test_a_permutation_holds_each_number_once_and_every_place_is_as_likely() -> None:
    assert permutation(1000, 3, 4).sort().values.equal(torch.arange(1000))
    assert not permutation(1000, 3, 4).equal(permutation(1000, 3, 5))
    first = torch.stack([permutation(6, 9, step) for step in range(6000)])
    for place in range(6):
        counts = torch.bincount(first[:, place], minlength=6).numpy()
        assert stats.chisquare(counts).pvalue > 1e-3
