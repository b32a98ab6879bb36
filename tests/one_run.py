"""One run on several machines against itself on one process: the table of docs/one_run.md.

  python -m tests.one_run [float64] [float32]

Each row is 50 steps of the small run of `test_one_run_any_machine.py` in real processes. Figures
are the largest differences from one process with whole batches: of the loss of a step, absolute,
and of the state after the last one (both encoders, queue, optimizer, statistics), as a share of
the largest number of the same tensor.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.test_one_run_any_machine import STEPS, one

Account = dict[str, Any]

# Steps of the first column of losses.
FIRST = 4

KINDS = f"loss of {FIRST} steps", f"of {STEPS}", "state"
PRECISIONS = {"float64": "precision=fp64", "float32": "precision=fp32"}


def straight(processes: int, micro_batches: int = 1) -> Callable[[Path, str], Account]:
    """Return a run from the first step to the last."""
    micro = f"runtime.micro_batches={micro_batches}"
    return lambda folder, precision: one(folder, processes, precision, micro)


def nudged(folder: Path, precision: str) -> Account:
    """Return a run on one process whose first weights are off by what float32 rounds away."""
    return one(folder, 1, precision, nudge=2**-24)


def stopped(*legs: tuple[int, int]) -> Callable[[Path, str], Account]:
    """Return a run in legs, each on so many processes until so many steps are done."""

    def run(folder: Path, precision: str) -> Account:
        losses = []
        for processes, until in legs:
            account = one(folder, processes, precision, until=until)
            losses.append(account["losses"])
        return account | {"losses": torch.cat(losses)}

    return run


ROWS: dict[str, Callable[[Path, str], Account]] = {
    "1 process again": straight(1),
    "2 processes": straight(2),
    "4 processes": straight(4),
    "8 processes": straight(8),
    "1 process, 2 micro-batches": straight(1, 2),
    "1 process, 8 micro-batches": straight(1, 8),
    "2 processes, 2 micro-batches": straight(2, 2),
    "1 process, stopped after step 27": stopped((1, 27), (1, STEPS)),
    "8, 4, 1, 2 processes, stopped after steps 13, 23, 37": stopped(
        (8, 13), (4, 23), (1, 37), (2, STEPS)
    ),
    "1 process, first weights changed by 6e-8 of themselves": nudged,
}


def differences(account: Account, reference: Account) -> list[float]:
    """Return the largest differences of the first losses, of all losses, and of the state."""
    losses = (account["losses"] - reference["losses"]).abs()
    state = [
        float((account["state"][name].double() - tensor.double()).abs().max())
        / max(float(tensor.double().abs().max()), 1e-30)
        for name, tensor in reference["state"].items()
    ]
    return [float(losses[:FIRST].max()), float(losses.max()), max(state)]


def main(names: list[str]) -> None:
    """Print the table for the precisions that are named, or for all."""
    precisions = {name: PRECISIONS[name] for name in names or PRECISIONS}
    heads = [f"{name}, {what}" for name in precisions for what in KINDS]
    print("| Against 1 process | " + " | ".join(heads) + " |")
    print("| --- |" + " --- |" * len(heads))
    with tempfile.TemporaryDirectory() as folder:
        references = {
            name: straight(1)(Path(folder, name, "reference"), precision)
            for name, precision in precisions.items()
        }
        for number, (row, run) in enumerate(ROWS.items()):
            cells = []
            for name, precision in precisions.items():
                account = run(Path(folder, name, str(number)), precision)
                cells += [_figure(each) for each in differences(account, references[name])]
            print(f"| {row} | " + " | ".join(cells) + " |", flush=True)
    for name, account in references.items():
        first, last = account["losses"][1], account["losses"][-1]
        print(f"{name}: the loss goes from {first:.3f} at the second step to {last:.3f}")


def _figure(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"


if __name__ == "__main__":
    main(sys.argv[1:])
