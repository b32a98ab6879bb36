"""What all processes agree on in each step: where they are, and whether to stop or to save.

Each sends a note along with its keys, in the gather that every step has anyway, and reads all notes
before the step has changed anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moco_dist.encoder import batch_norms
from moco_dist.errors import PeerError


@dataclass(frozen=True)
class Agreement:
    """What the notes of one step come to: the greatest request to stop, and whether to save."""

    stop: int
    save: bool


def note(step: int, samples: Tensor, stop: int, save: bool, alone: bool) -> Tensor:
    """Return this process's note, int64 (5,): step, number of samples, requests, and checksum.

    Where there are others to compare it with it is made on the device of `samples`, without a copy
    that would wait for the device. A process `alone` keeps it on the CPU, with the checksum 0.
    """
    known = step, len(samples), stop, int(save)
    if alone:
        return torch.tensor([*known, 0])
    places = torch.arange(1, len(samples) + 1, device=samples.device)
    checksum = (places * samples).sum()
    return torch.stack([*(samples.new_full((), value) for value in known), checksum])


def agree(notes: Tensor) -> Agreement:
    """Return what `notes`, int64 (processes, 5), come to; PeerError if a process is elsewhere."""
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


class Undo:
    """The BatchNorm statistics of encoders before a step, which a forward pass changes.

    It moves them into one tensor, of which the layers then hold views: one copy keeps them all.
    """

    @torch.no_grad()
    def __init__(self, *encoders: nn.Module) -> None:
        norms = [norm for encoder in encoders for norm in batch_norms(encoder)]
        owned = [(norm, name) for norm in norms for name in ("group_mean", "group_var")]
        each = [getattr(norm, name).flatten() for norm, name in owned]
        # A backbone without BatchNorm has none.
        self._live = torch.cat(each) if each else torch.empty(0)
        self._kept = self._live.clone()
        offset = 0
        for norm, name in owned:
            old = getattr(norm, name)
            setattr(norm, name, self._live[offset : offset + old.numel()].view_as(old))
            offset += old.numel()

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the statistics as they are."""
        self._kept.copy_(self._live)

    @torch.no_grad()
    def restore(self) -> None:
        """Put back the statistics as `keep` saw them."""
        self._live.copy_(self._kept)


def norms(parameters: Sequence[nn.Parameter], *others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Euclidean norm of all gradients, and of all `others`; float () each.

    After the gradients have been averaged they are the same on all processes.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    each = torch.stack(torch._foreach_norm([*gradients, *others]))
    return each[: len(gradients)].norm(), each[len(gradients) :].norm()
