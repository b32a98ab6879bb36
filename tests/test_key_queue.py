"""The queue holds the newest keys, whatever the batch size."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from moco_dist.method.key_queue import KeyQueue
from moco_dist.method.loss import owners


@pytest.mark.parametrize("batches", [[4] * 9, [3, 5, 8, 1, 7, 2, 8, 8, 3], [8], [1, 1]])
def test_queue_holds_what_a_deque_holds(batches: list[int]) -> None:
    queue, reference = KeyQueue(size=8, dim=2), deque[tuple[float, int]](maxlen=8)
    number = 0
    for size in batches:
        values = torch.arange(number, number + size)
        queue.enqueue(torch.stack([values.float(), -values.float()], dim=1), values * 10)
        reference.extend((float(v), int(v) * 10) for v in values)
        number += size
        keys, samples = queue.negatives()
        assert queue.filled == len(reference) == len(keys)
        assert sorted(zip(keys[:, 0].tolist(), samples.tolist(), strict=True)) == sorted(reference)
        assert (keys[:, 1] == -keys[:, 0]).all()


def test_unfilled_slots_are_not_given_out() -> None:
    queue = KeyQueue(size=100, dim=4)
    assert len(queue.negatives()[0]) == 0
    queue.enqueue(torch.ones(3, 4), torch.arange(3))
    assert queue.negatives()[0].equal(torch.ones(3, 4))


def test_more_keys_than_slots_are_refused() -> None:
    with pytest.raises(AssertionError, match="9 keys don't fit into a queue of 8"):
        KeyQueue(size=8, dim=2).enqueue(torch.zeros(9, 2), torch.zeros(9, dtype=torch.int64))


def test_a_restored_queue_goes_on_where_it_stood() -> None:
    straight, restored = KeyQueue(5, 1), KeyQueue(5, 1)
    batches = [torch.arange(i, i + 3.0)[:, None] for i in range(0, 21, 3)]
    for number, batch in enumerate(batches):
        straight.enqueue(batch, batch[:, 0].long())
        if number == 3:
            restored.load_state_dict(straight.state_dict())
            restored.enqueued = straight.enqueued
        elif number > 3:
            restored.enqueue(batch, batch[:, 0].long())
    assert restored.keys.equal(straight.keys)
    assert restored.samples.equal(straight.samples)


@pytest.mark.parametrize("enqueued", [0, 5, 40])
def test_owners_are_the_rows_with_the_slots_samples(enqueued: int) -> None:
    queue = KeyQueue(16, 2)
    samples = torch.arange(enqueued) * 7 % 11  # each sample has several slots
    for part in samples.split(8):
        queue.enqueue(torch.zeros(len(part), 2), part)
    batch = [9, 3, 20, 0, 5]
    expected = [batch.index(s) if s in batch else -1 for s in queue.negatives()[1].tolist()]
    assert owners(queue.samples[: queue.filled], torch.tensor(batch)).tolist() == expected
    assert enqueued < 40 or len(set(expected)) == 5  # rows that have slots, and none
