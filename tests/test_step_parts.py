"""The step of several processes as graphs, which are recorded here, has the eager step's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.distributed import comms
from moco_dist.errors import NumbersError
from moco_dist.pretrain import loop
from moco_dist.pretrain.device_clock import DeviceClock
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.step_graph import Stepper
from moco_dist.pretrain.step_parts import Parts
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import session
from tests import processes
from tests.recorded_graph import recording
from tests.test_mechanisms import BANK, SIMCLR, V3
from tests.test_one_run_any_machine import SMALL

# Numbers that an operation on a CPU reads are those of the captured step in every later one.
CONSTANT = ["optim.schedule=constant", "optim.lr=0.125", "tracking.wandb=disabled"]
SYMMETRIC = ["moco.symmetric=true", "runtime.micro_batches=2"]
KINDS = {
    "queue": ["tracking.health_every_steps=3"],
    "symmetric": SYMMETRIC,
    "SimCLR": [*SIMCLR, "runtime.micro_batches=2"],
    "bank": BANK,
    "v3": V3,
    "bf16": ["runtime.gradients=bf16", "precision=fp32"],
}
STEPS, EAGER, BAD = 16, 5, 9


def captured(trainer: Trainer, hooks: RunHooks) -> Parts:
    """Return the parts of the step, with all memory as before: a GPU does nothing in a capture."""
    clock = DeviceClock(trainer)
    parts = Parts(trainer, hooks, clock)
    clock.set()
    buffers = [each for state in trainer.optimizer.state.values() for each in state.values()]
    tensors = [*trainer.moco.state_dict().values(), *buffers, clock.step, clock.remembered]
    kept = [each.clone() for each in tensors]
    assert parts.capture() == ""
    with torch.no_grad():
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)
    return parts


def trained(words: list[str], by_parts: bool, wrong: bool) -> tuple[list[float], dict[str, Any]]:
    """Return the losses and the state after some steps, of which one is first refused."""
    config = load(PretrainConfig, [*SMALL, *CONSTANT, *words])
    trainer = Trainer(config, session.join(config), datasets.load(config.data))
    hooks = loop.run_hooks(trainer)
    take, losses = Stepper(trainer, hooks), []
    while trainer.step < STEPS:
        if by_parts and trainer.step == EAGER:
            take.parts = captured(trainer, hooks)
            assert len(take.parts.acts) > 10
            if wrong:
                assert take.parts.expected is not None
                take.parts.expected *= 1.03
        if trainer.step == BAD:
            weight = next(trainer.moco.query_encoder.parameters())[0, 0].detach()
            kept = weight.clone()
            weight.fill_(torch.inf)
            with pytest.raises(NumbersError, match=f"not finite in step {BAD} "):
                take._by_parts() or trainer.train_step(hooks)
            weight.copy_(kept)
        loss, _ = take._by_parts() or trainer.train_step(hooks)
        losses.append(float(comms.mean(loss)))
    assert (take.parts is not None) == (by_parts and not wrong)
    state = {name: value.clone() for name, value in trainer.moco.state_dict().items()}
    for number, buffers in enumerate(trainer.optimizer.state.values()):
        state |= {f"{name} {number}": value.clone() for name, value in buffers.items()}
    return losses, state


def both(words: list[str], wrong: bool) -> list[tuple[list[float], dict[str, Any]]]:
    """Train eagerly, and by parts."""
    with recording():
        return [trained(words, by_parts, wrong) for by_parts in (False, True)]


@pytest.mark.parametrize(("kind", "wrong"), [*((kind, False) for kind in KINDS), ("queue", True)])
def test_a_step_by_parts_has_the_bits_of_the_eager_step(kind: str, wrong: bool) -> None:
    """Also if its gradients are 3% off the eager ones, after which steps are eager."""
    for (losses, state), (by_parts, other) in processes.run(both, 2, KINDS[kind], wrong):
        assert by_parts == losses
        assert len(set(losses)) == STEPS
        assert torch.tensor(losses).isfinite().all()
        assert all(other[name].equal(value) for name, value in state.items())
