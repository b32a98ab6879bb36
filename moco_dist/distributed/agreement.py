"""What all processes agree on in each step: where they are, and whether to stop or to save.

Each sends a note with its keys, in the gather of every step, and reads all notes before the step
has changed anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moco_dist.errors import PeerError


class Agreement(NamedTuple):
    """What the processes agree on in a step: the greatest request to stop, and whether to save."""

    stop: int
    save: bool


def note(step: int, samples: Tensor, stop: int, save: bool, alone: bool) -> Tensor:
    """Return this process's note, int64 (5,): step, number of samples, requests, and checksum.

    It is on the device of `samples`, made without a copy that would wait for the device. A process
    `alone` keeps it on the CPU, with the checksum 0.
    """
    known = step, len(samples), stop, int(save)
    if alone:
        return torch.tensor([*known, 0])
    places = torch.arange(1, len(samples) + 1, device=samples.device)
    checksum = (places * samples).sum()
    return torch.stack([*(samples.new_full((), value) for value in known), checksum])


def agree(notes: Tensor) -> Agreement:
    """Return what `notes`, int64 (processes, 5), agree on; PeerError if their steps differ."""
    rows = notes.tolist()
    for rank, row in enumerate(rows):
        for place, what in ((0, "step"), (1, "a batch of"), (4, "samples with checksum")):
            if row[place] != rows[0][place]:
                raise PeerError(
                    f"process {rank} is at {what} {row[place]} and process 0 at {what} "
                    f"{rows[0][place]}, in step {rows[0][0]}; nothing was changed by it: start "
                    "all processes with the same command, files and versions"
                ).on_all()
    return Agreement(max(row[2] for row in rows), any(row[3] for row in rows))
