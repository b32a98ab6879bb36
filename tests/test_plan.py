"""Each step's rows: every sample once, shared out evenly, keys mixed over the BatchNorm groups."""

from __future__ import annotations

import dataclasses
import math

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


def test_an_epoch_takes_no_sample_twice_and_leaves_out_others_each_time() -> None:
    left_out = []
    for epoch in range(3):
        first = epoch * PLAN.steps_per_epoch
        taken = torch.cat([PLAN.step(first + i).samples for i in range(PLAN.steps_per_epoch)])
        assert len(taken) == 1000 // 64 * 64 == len(taken.unique())
        left_out.append(set(range(1000)) - set(taken.tolist()))
        assert len(left_out[-1]) == 1000 % 64
    assert left_out[0] != left_out[1] != left_out[2]


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


def test_a_key_meets_its_own_querys_group_as_often_as_chance_has_it() -> None:
    groups, size, steps = 8, 64, 400
    rows = torch.arange(size)
    share = []
    for step in range(steps):
        key_rows = PLAN.step(step).key_rows[0]
        share.append((key_rows // (size // groups) == rows // (size // groups)).double().mean())
    # Rows of one permutation aren't independent: take the error from the steps themselves.
    shares = torch.stack(share)
    error = float(shares.std()) / math.sqrt(steps)
    assert error < 0.005
    assert abs(float(shares.mean()) - 1 / groups) < 4 * error


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
    _, notes = comms.all_gather_with_note(keys, torch.tensor([rank, -(2**62)]))
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


def test_more_samples_in_a_batch_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        Plan(num_samples=100, batch_size=128, seed=0)
    assert str(error.value) == (
        "batch_size=128 is more than the 100 training images; use batch_size=100 or less"
    )


def test_numbers_that_do_not_divide_are_refused_with_those_that_would() -> None:
    check_batch(256, 8)
    check_groups(8, 4, 2)
    with pytest.raises(ConfigError) as error:
        check_batch(250, 8)
    assert str(error.value) == (
        "batch_size=250 can't be split over 8 processes; use a multiple of 8, as 248 or 256"
    )
    with pytest.raises(ConfigError) as error:
        check_groups(8, 3, 1)
    assert str(error.value) == (
        "bn_groups=8 can't be shared by 3 processes; the number of processes may be 1, 2, 4 or 8, "
        "or set bn_groups to a multiple of 3"
    )
    with pytest.raises(ConfigError) as error:
        check_groups(8, 2, 3)
    assert str(error.value) == (
        "runtime.micro_batches=3 can't share the 4 BatchNorm groups of a process; use 1, 2 or 4"
    )
