"""One run, interrupted and resumed on other numbers of processes, again and again."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from moco_dist.encoders import load
from tests.faults.jobs import STEPS, TERM, TINY, Job, account, metrics, undisturbed
from tests.faults.table import Fault, Outcome

TOLERANCE = 1e-10
# Four rows in a BatchNorm group: statistics of two would blow up differences of rounding.
EXACT = [*TINY, "precision=fp64", "batch_size=16", "data.shapes_train=100", "moco.queue_size=40"]


def changing(folder: Path, times: int, random: Random) -> Outcome:
    """Interrupt a run `times` times and resume it on 1, 2 or 4 processes; compare in float64."""
    with Job(folder / "reference", *EXACT) as job:
        assert job.wait(120) == [0], job.text()
        expected = tensors(job.run)
    counts = interrupt(folder / "run", times, random, [1, 2, 4])
    state = tensors(folder / "run" / "run")
    largest = 0.0
    for name, tensor in expected.items():
        difference = float((tensor.double() - state[name].double()).abs().max())
        assert difference <= TOLERANCE, f"{name} differs by {difference}"
        largest = max(largest, difference)
    steps = [line["step"] for line in metrics(folder / "run" / "run") if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1)), f"steps lost or done twice: {steps}"
    text = f"on {', '.join(map(str, counts))} processes; differences to 1 process {largest:.1e}"
    return Outcome(times, f"{text}, statistics, momentum and queue included", 0)


def same(folder: Path, times: int, random: Random) -> Outcome:
    """Interrupt a run of two processes `times` times; it must be the undisturbed one to the bit."""
    with undisturbed(folder / "reference", *TINY, processes=2) as expected:
        interrupt(folder / "run", times, random, [2], TINY)
        assert account(folder / "run" / "run") == expected, "the resumed run is another one"
    return Outcome(times, "losses, queue and state bit-equal", 0)


def interrupt(
    output: Path, times: int, random: Random, counts: list[int], arguments: list[str] = EXACT
) -> list[int]:
    """Run to the end with `times` stops at random steps; return the numbers of processes."""
    stops = sorted(random.sample(range(2, STEPS - 1), times))
    used: list[int] = []
    for stop in [*stops, 0]:
        used.append(random.choice([n for n in counts if n not in used[-1:]] or counts))
        with Job(output, *arguments, processes=used[-1]) as job:
            if stop:
                job.until_step(stop - 1)
                job.send(TERM)
            states = set(job.wait(120))
            assert states == ({75} if stop else {0}), f"{states}\n{job.text()}"
    return used


def tensors(run: Path) -> dict[str, Tensor]:
    """Return all numbers of the last checkpoint: both files, and the losses."""
    found = load.checkpoint_of(run)
    losses: list[Any] = [line["train/loss"] for line in metrics(run) if "train/loss" in line]
    return found.model | found.optimizer | {"losses": torch.tensor(losses, dtype=torch.float64)}


FAULTS = [
    Fault("stopped and resumed on other numbers of processes", 2, 10, changing),
    Fault("stopped and resumed on the same number", 2, 10, same),
]
