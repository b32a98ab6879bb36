"""Nothing is ever lost: the quick set of `python -m tests.faults`, each fault a test."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.faults import FAULTS
from tests.faults.table import Fault


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.quick], ids=lambda fault: fault.name)
def test_nothing_is_lost(fault: Fault, tmp_path: Path) -> None:
    outcome = fault.plant(tmp_path, fault.quick, Random(f"0 {fault.name}"))
    assert outcome.tried > 0 or outcome.outcome.startswith("not tried, mount needs root")
