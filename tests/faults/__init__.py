"""Faults planted for real in real processes: `python -m tests.faults` prints what came of them."""

from __future__ import annotations

from tests.faults import kills

FAULTS = [*kills.FAULTS]
