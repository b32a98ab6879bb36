"""Each step's rows: every sample once, shared out evenly, keys mixed over the BatchNorm groups."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from moco_dist.distributed import comms
from moco_dist.errors import ConfigError
from moco_dist.method import moco
from moco_dist.method.plan import Plan, check_batch, check_groups
from tests import processes

PLAN = Plan(num_samples=1000, batch_size=64, seed=3)


def on_rank(rank: int, world_size: int) -> Plan:
    return dataclasses.replace(PLAN, rank=rank, world_size=world_size)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("step", [0, 14, 15, 40])
def test_processes_share_out_queries_and_keys_once_each(world_size: int, step: int) -> None:
    steps = [on_rank(rank, world_size).step(step, key_views=2) for rank in range(world_size)]
    alone = PLAN.step(step, key_views=2)
    everything = torch.arange(64)
    assert all(s.samples.equal(alone.samples) for s in steps)
    assert torch.cat([s.query_rows for s in steps]).equal(everything)
    for view in range(2):
        keys = torch.cat([s.key_rows[view] for s in steps])
        assert keys.sort().values.equal(everything)
        assert keys.equal(alone.key_rows[view])
        assert keys[steps[0].unshuffle[view]].equal(everything)
    assert not alone.key_rows[0].equal(alone.key_rows[1])


def test_a_key_meets_its_own_querys_group_as_often_as_by_chance() -> None:
    groups = torch.arange(64) // 8
    same = torch.stack([groups[PLAN.step(step).key_rows[0]] == groups for step in range(400)])
    # Rows of a permutation aren't independent, so the error is estimated from the steps.
    shares = same.double().mean(1)
    error = float(shares.std()) / math.sqrt(400)
    assert error < 0.005
    assert abs(float(shares.mean()) - 1 / 8) < 4 * error


def shuffled_identity(world_size: int, step: int) -> tuple[list[float], list[float], int]:
    """Send row numbers through ShuffleBN with an encoder that returns them, and one that counts."""
    rank = comms.rank()
    rows = on_rank(rank, world_size).step(step)
    seen: list[torch.Tensor] = []

    def spy(piece: torch.Tensor) -> torch.Tensor:
        seen.append(piece)
        return piece

    mine = rows.key_rows[0].double()[:, None]
    pieces = [lambda part=part: part for part in mine.chunk(2)]
    keys = moco.shuffled_keys(spy, pieces, rows.unshuffle[0])
    _, notes = comms.all_gather_with_note(keys, torch.tensor([rank, -(2**62)]))()
    assert notes.tolist() == [[other, -(2**62)] for other in range(world_size)]
    own = set(rows.query_rows.tolist())
    strangers = sum(int(row) not in own for row in torch.cat(seen)[:, 0])
    return keys[:, 0].tolist(), torch.cat(seen)[:, 0].tolist(), strangers


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shuffled_keys_come_back_in_order_on_every_process(world_size: int) -> None:
    results = processes.run(shuffled_identity, world_size, world_size, 5)
    for keys, _, _ in results:
        assert keys == [float(row) for row in range(64)]
    encoded = [row for _, seen, _ in results for row in seen]
    assert sorted(encoded) == [float(row) for row in range(64)]
    if world_size > 1:
        assert all(strangers > 64 // world_size // 4 for _, _, strangers in results)


@pytest.mark.parametrize(
    ("rule", "numbers", "sentence"),
    [
        (
            Plan,
            (100, 128, 0),
            "batch_size=128 is more than the 100 training images; use 100 or less",
        ),
        (
            check_batch,
            (250, 8),
            "batch_size=250 can't be split over 8 processes; use a multiple of 8, as 248 or 256",
        ),
        (
            check_groups,
            (8, 6, 1, False),
            "bn_groups=8 can't be shared by 6 processes; use 1, 2, 4 or 8 processes or a multiple "
            "of 8, or set bn_groups to 1, 2, 3 or 6 or a multiple of 6",
        ),
        (
            check_groups,
            (2, 8, 4, False),
            "runtime.micro_batches=4 can't cut a BatchNorm group: 4 processes share each group of "
            "bn_groups=2; use runtime.micro_batches=1, or 1 or 2 processes",
        ),
        (
            check_groups,
            (1, 2, 1, True),
            "runtime.compile=true can't compile what processes exchange in a layer: 2 processes "
            "share each group of bn_groups=1; use runtime.compile=false, or 1 process",
        ),
        (
            check_groups,
            (8, 2, 3, False),
            "runtime.micro_batches=3 can't share the 4 BatchNorm groups of a process; use 1, 2 "
            "or 4",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_those_that_would(
    rule: Callable[..., object], numbers: tuple[int, ...], sentence: str
) -> None:
    check_batch(256, 8)
    check_groups(8, 4, 2, True)
    check_groups(1, 5, 1, False)
    check_groups(2, 8, 1, False)
    with pytest.raises(ConfigError) as error:
        rule(*numbers)
    assert str(error.value) == sentence
