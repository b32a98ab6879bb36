"""Launches, waits, memsets and CPU time of a step: `python -m tests.stand_in.measure CONFIG ...`.

Runs in a process with the stand-in; `stand_in.measured` starts one.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections import Counter
from typing import Any

import torch
from accelerate.state import AcceleratorState

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.step_graph import Stepper
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import session
from tests.stand_in import command, counters

SMALL = [
    *("data.name=shapes", "data.shapes_train=4000", "data.shapes_test=50", "runtime.device=cuda"),
    "tracking.wandb=disabled",
]
STEPS = 5


def built(words: list[str]) -> Trainer:
    """Return a trainer with a full queue; `words` are a configuration file and overrides."""
    AcceleratorState._reset_state()
    config = load(PretrainConfig, [words[0], *SMALL, *words[1:]])
    accelerator = session.join(config)
    trainer = Trainer(config, accelerator, datasets.load(config.data, config.encoder.channels))
    trainer.moco.fill_up(len(trainer.splits.train))
    return trainer


def measure(words: list[str], captured: bool = False) -> dict[str, Any]:
    """Return what a step with a full queue takes, as medians of some steps.

    `words` are a configuration file and overrides. `launches` are all that is put on a stream;
    `waits` the synchronisations, with `where` they come from; `cpu_ms` is process time; `held` the
    memory that PyTorch holds, as a share of what it held after three eager steps. `captured` counts
    a step that is repeated as a CUDA graph, as `runtime.cuda_graph` says.
    """
    trainer = built(words)
    trainer.step = 1  # the first one measures health
    hooks = RunHooks(trainer)
    stepper = Stepper(trainer, hooks)

    def step() -> None:
        if captured:
            stepper()
        else:
            trainer.train_step(hooks)

    held = []
    for _ in range(5):
        step()
        held.append(torch.cuda.memory_reserved())
    assert stepper.captured == captured, "the step was not captured"
    found, times = [], []
    for _ in range(STEPS):
        counters.reset()
        began = time.process_time()
        step()
        times.append(1e3 * (time.process_time() - began))
        found.append(counters.counted())
    with counters.watched() as where:
        step()
    middle = {name: int(statistics.median(each[name] for each in found)) for name in found[0]}
    others = {"where": where, "step": trainer.step, "held": held[-1] / held[2]}
    return middle | {"cpu_ms": statistics.median(times)} | others


def table(words: list[str], found: dict[str, Any]) -> str:
    """Return a line of figures and the places of the waits."""
    names = ("launches", "memsets", "waits", "h2d", "nccl", "cpu_ms")
    head = ", ".join(f"{name} {found[name]:.4g}" for name in names)
    where = Counter(found["where"]).most_common()
    return "\n".join([f"{' '.join(words)}: {head}", *(f"  {n} {place}" for place, n in where)])


if __name__ == "__main__":
    command.help_out()
    if sys.argv[1].startswith("["):
        requests, captured = (json.loads(argument) for argument in sys.argv[1:])
        print(json.dumps([measure(words, captured) for words in requests]), flush=True)
    else:
        print(table(sys.argv[1:], measure(sys.argv[1:])), flush=True)
    os._exit(0)
