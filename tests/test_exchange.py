"""The exchange of rows between processes, against one process that has all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moco_dist.distributed import comms
from tests import processes


def exchanged(cases: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    mine = []
    for rows, places in cases:
        each = len(rows) // comms.world_size()
        mine.append(comms.all_to_all_rows(rows[comms.rank() * each :][:each], places))
    return mine


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_row_comes_to_its_place(world: int) -> None:
    orders = [torch.randperm(24, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    cases, expected = [], []
    for dtype in (torch.uint8, torch.float64):
        rows = torch.arange(24 * 6).reshape(24, 2, 3).to(dtype)
        for order in [*orders, torch.arange(24), torch.arange(24).flip(0)]:
            places = torch.empty_like(order)
            places[order] = torch.arange(24)  # row order[p] is at place p
            cases.append((rows, places))
            expected.append(rows[order])
    found = processes.run(exchanged, world, cases)
    for number, rows in enumerate(expected):
        joined = torch.cat([each[number] for each in found])
        assert joined.dtype == rows.dtype
        assert joined.equal(rows)


def gathered(parts: list[Tensor]) -> list[Tensor]:
    mine = []
    for whole in parts:
        each = len(whole) // comms.world_size()
        mine.append(comms.all_gather(whole[comms.rank() * each :][:each]))
    return mine


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_gather_has_the_bits_of_all_in_the_order_of_ranks(world: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 3, 5, generator=generator, dtype=torch.float64)
    parts = [rows, rows.float(), rows.bfloat16(), rows.mul(100).to(torch.uint8), rows.long()]
    parts += [rows[:, 0, 0], rows.transpose(1, 2)]  # the last is not contiguous
    for mine in processes.run(gathered, world, parts):
        for found, expected in zip(mine, parts, strict=True):
            assert found.dtype == expected.dtype
            assert found.equal(expected)
