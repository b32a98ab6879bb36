"""A command of moco_dist on the stand-in: `python -m tests.stand_in.command MODULE ARGUMENTS...`.

Where a number that a kernel makes would decide how the command goes on, another one is given here.
KILL_AT=n kills process 1 in step n. HANG_AT=n lets the GPU of process 0 hang from step n on. A line
for each step, with its launches and waits in JSON, is added to STEPS=FILE: for process 0 to FILE0.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import pickle
import runpy
import signal
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moco_dist.data.datasets import Images
from moco_dist.data.streamed_images import StreamedImages
from moco_dist.distributed import agreement, comms
from moco_dist.distributed.agreement import Agreement
from moco_dist.encoders import state_dict
from moco_dist.pretrain.step_graph import Stepper
from moco_dist.probe.frozen import Frozen
from moco_dist.probe.linear_probe import LinearProbe
from tests.stand_in import counters

_turns = itertools.count()


def _gather_objects(value: Any) -> list[Any]:
    """Gather by way of the store: their lengths would be made by a kernel."""
    if comms.world_size() == 1:
        return [value]
    store, turn = dist.distributed_c10d._get_default_store(), next(_turns)
    store.set(f"gather/{turn}/{comms.rank()}", base64.b64encode(pickle.dumps(value)).decode())
    keys = [f"gather/{turn}/{rank}" for rank in range(comms.world_size())]
    return [pickle.loads(base64.b64decode(store.get(key))) for key in keys]


def _eigenvalues(symmetric: Tensor) -> Tensor:
    return symmetric.diagonal().clone()


def _cholesky(symmetric: Tensor) -> SimpleNamespace:
    """Return a factor without NaN, which memory would keep for what is checked later."""
    return SimpleNamespace(L=torch.eye(len(symmetric), dtype=symmetric.dtype))


def _bincount(numbers: Tensor, weights: None = None, minlength: int = 0) -> Tensor:
    """Return zeros on a GPU, where the greatest number would be made up."""
    if numbers.is_cuda:
        return numbers.new_zeros(max(minlength, 1))
    return torch.bincount(numbers, weights, minlength)


def _agree(notes: Tensor) -> Agreement:
    alone = comms.world_size() == 1
    assert (notes.device.type == "cpu") == alone, notes.device
    assert notes.shape == (comms.world_size(), 5), notes.shape
    notes.tolist()  # waits, as the real one does
    return Agreement(stop=0, save=False)


def help_out() -> None:
    """Give the numbers that decide something."""
    torch.linalg.eigvalsh = _eigenvalues
    torch.linalg.cholesky_ex = _cholesky
    Tensor.bincount = _bincount  # type: ignore[assignment,method-assign]
    state_dict.require_trained = lambda *_: None
    for images in (Images, StreamedImages):
        images.labelled = lambda self: self  # type: ignore[method-assign]
    # The number of batches that BatchNorm has seen is read as 1, but for the first time.
    Frozen.check = Frozen.check_modes  # type: ignore[method-assign]
    Stepper._refuse = lambda *_: None  # type: ignore[method-assign]
    comms.gather_objects = _gather_objects
    agreement.agree = _agree
    dist._verify_params_across_processes = lambda *_: None  # type: ignore[attr-defined]


def _in_step(step: int, act: Any) -> None:
    def patched(self: Stepper) -> Any:
        if self.trainer.step == step:
            act()
        return take(self)

    take = Stepper.__call__
    Stepper.__call__ = patched  # type: ignore[method-assign]


def _note_waits(kind: type[Stepper] | type[LinearProbe], name: str, path: str) -> None:
    def patched(self: Any, *arguments: Any) -> Any:
        counters.reset()
        with counters.watched() as waits:
            returned = take(self, *arguments)
        with open(path, "a") as file:
            found = {"waits": waits, "launches": counters.counted()["launches"]}
            file.write(json.dumps(found) + "\n")
        return returned

    take = getattr(kind, name)
    setattr(kind, name, patched)


if __name__ == "__main__":
    help_out()
    rank = os.environ.get("RANK", "0")
    if (step := os.environ.get("KILL_AT")) and rank == "1":
        _in_step(int(step), lambda: os.kill(os.getpid(), signal.SIGKILL))
    if (step := os.environ.get("HANG_AT")) and rank == "0":
        _in_step(int(step), counters.library.fake_hang)
    if path := os.environ.get("STEPS"):
        _note_waits(Stepper, "__call__", f"{path}{rank}")
        _note_waits(LinearProbe, "train_step", f"{path}{rank}")
    sys.argv = sys.argv[1:]
    runpy.run_module(f"moco_dist.{sys.argv[0]}", run_name="__main__", alter_sys=True)
