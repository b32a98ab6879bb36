"""Faults planted for real in real processes: `python -m tests.faults` prints what came of them."""

from __future__ import annotations

from tests.faults import costs, damage, disk, elastic, hostile, kills, locks, lost, stops

FAULTS = [
    *kills.FAULTS,
    *stops.FAULTS,
    *elastic.FAULTS,
    *damage.FAULTS,
    *disk.FAULTS,
    *lost.FAULTS,
    *locks.FAULTS,
    *hostile.FAULTS,
    *costs.FAULTS,
]
