"""A step as graphs, which are recorded here, has the bits of the eager step."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.distributed import comms
from moco_dist.errors import NumbersError
from moco_dist.method import batch_norm
from moco_dist.method.loss import info_nce
from moco_dist.method.moco import MoCo
from moco_dist.pretrain import mechanisms, step_graph
from moco_dist.pretrain.device_clock import DeviceClock
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.step_graph import Stepper
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import session
from moco_dist.runs.record import Metric
from tests import processes
from tests.recorded_graph import recording
from tests.test_mechanisms import BANK, CMC, SIMCLR, V3
from tests.test_one_run_any_machine import SMALL
from tests.test_trainer import build

# Numbers that an operation on a CPU reads are those of the captured step in every later one.
CONSTANT = ["optim.schedule=constant", "optim.lr=0.125", "tracking.wandb=disabled"]
SYMMETRIC = ["moco.symmetric=true", "runtime.micro_batches=2"]
KINDS = {
    "queue": ["tracking.health_every_steps=3"],
    "symmetric": SYMMETRIC,
    "SimCLR": [*SIMCLR, "runtime.micro_batches=2"],
    "bank": BANK,
    "CMC": CMC,
    "v3": V3,
    "bf16": ["runtime.gradients=bf16", "precision=fp32"],
}
STEPS, EAGER, BAD = 16, 5, 9
BUCKET_MB = 0.05


class SetClock(DeviceClock):
    """Has the rows of the step at once, because they are read when a step is recorded."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self.set()


def captured(take: Stepper, fails: bool) -> None:
    """Capture the step, with all memory as before: a GPU does nothing in a capture.

    If it `fails`, the last process has no memory for the loss of its first micro-batch.
    """
    trainer = take.trainer
    buffers = [each for state in trainer.optimizer.state.values() for each in state.values()]
    tensors = [*trainer.moco.state_dict().values(), *buffers, trainer.undo._live]
    kept = [each.clone() for each in tensors]

    def loss(*arguments: Any) -> Any:
        if fails and trainer.clock is take.clock and comms.rank() == comms.world_size() - 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return info_nce(*arguments)

    with (
        mock.patch.object(step_graph, "DeviceClock", SetClock),
        mock.patch.object(mechanisms, "info_nce", loss),
    ):
        take._capture()
    if take.parts:
        assert len(take.parts.graphs.acts) > 10
    if take.captured:
        take.clock.good.fill_(True)
        take.clock.count.zero_()
    take.clock._place = take.clock._epoch = -1
    with torch.no_grad():
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.copy_(value)


def trained(words: list[str], graphs: bool, fault: str) -> tuple[list[float], dict[str, Any]]:
    """Return the losses and the state after some steps, of which one is first refused."""
    config = load(PretrainConfig, [*SMALL, *CONSTANT, *words])
    accelerator = session.join(config)
    if accelerator.ddp_handler:  # this small encoder would be one bucket
        accelerator.ddp_handler.bucket_cap_mb = BUCKET_MB
    trainer = Trainer(config, accelerator, datasets.load(config.data))
    take, losses = Stepper(trainer, RunHooks(trainer)), []
    while trainer.step < STEPS:
        if graphs and trainer.step == EAGER:
            captured(take, fault == "memory")
            if take.parts:
                assert len(take.parts.buckets) > 1
            if fault == "gradients":
                assert take.parts is not None
                assert take.parts.expected is not None
                take.parts.expected *= 1.03
        if trainer.step == BAD:
            *_, encoder = trainer.moco.encoders.values()
            weight = next(encoder.parameters())[0, 0].detach()
            kept = weight.clone()
            weight.fill_(torch.inf)
            with pytest.raises(NumbersError, match=f"not finite in step {BAD} "):
                take().figures()
            weight.copy_(kept)
            if take.captured:
                take.clock.good.fill_(True)  # a run ends there
        losses.append(take().figures()[Metric.LOSS])
    assert (take.parts is not None or take.captured) == (graphs and not fault)
    state = {name: value.clone() for name, value in trainer.moco.state_dict().items()}
    for number, buffers in enumerate(trainer.optimizer.state.values()):
        state |= {f"{name} {number}": value.clone() for name, value in buffers.items()}
    for name, encoder in trainer.moco.encoders.items():
        groups = batch_norm.group_statistics(encoder)
        state |= {f"{name} {key}": value for key, value in groups.items()}
    state["counts"] = torch.tensor([trainer.step, trainer.moco.remembered])
    return losses, state


def both(words: list[str], fault: str) -> list[tuple[list[float], dict[str, Any]]]:
    """Train eagerly, and by graphs; the key encoder moves as on a GPU."""
    move = MoCo.update_key_encoder

    def moved(self: MoCo, momentum: float | Tensor) -> None:
        move(self, torch.as_tensor(momentum, dtype=torch.float64))

    with recording(), mock.patch.object(MoCo, "update_key_encoder", moved):
        return [trained(words, graphs, fault) for graphs in (False, True)]


# What four processes sum has an order.
CASES = [(kind, 4 if kind == "queue" else 2, "") for kind in KINDS]
CASES += [(kind, 1, "") for kind in KINDS][:-1]
CASES += [("queue", 2, "gradients"), ("symmetric", 2, "memory"), ("symmetric", 1, "memory")]


@pytest.mark.parametrize(("kind", "world", "fault"), CASES)
def test_a_step_by_graphs_has_the_bits_of_the_eager_step(kind: str, world: int, fault: str) -> None:
    """Also if its gradients are 3% off, or a capture fails, after which steps are eager."""
    for (losses, state), (by_graphs, other) in processes.run(both, world, KINDS[kind], fault):
        assert by_graphs == losses
        assert len(set(losses)) == STEPS
        assert torch.tensor(losses).isfinite().all()
        assert all(other[name].equal(value) for name, value in state.items())


def test_a_clock_on_the_device_keeps_the_schedule_and_stays_at_its_end() -> None:
    """A bench may take more steps than the run has."""
    words = ["epochs=2", "optim.warmup_epochs=1", "moco.momentum_schedule=cosine"]
    trainer = build(*words)
    clock, last = DeviceClock(trainer), trainer.total_steps - 1
    for step in (last + 1000, last + 1, last, trainer.steps_per_epoch, 1, 0):
        trainer.step = step
        clock.set()
        trainer.step = min(step, last)
        assert float(clock.rate()) == pytest.approx(trainer.clock.rate(), rel=1e-7)
        assert float(clock.momentum()) == pytest.approx(trainer.clock.momentum(), rel=1e-15)
