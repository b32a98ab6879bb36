"""One config and one seed are one run: on N processes, in micro-batches, interrupted or not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.distributed import comms, fingerprint
from moco_dist.pretrain import loop
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import session as runs_session
from tests import processes

# float64, BatchNorm in 8 groups, every augmentation, several epochs, a queue that wraps unevenly.
SMALL = [
    *("precision=fp64", "batch_size=32", "bn_groups=8", "epochs=4", "runtime.device=cpu"),
    *(
        "data.name=shapes",
        "data.size=16",
        "data.shapes_train=700",
        "data.shapes_test=20",
        "views.size=16",
    ),
    *(
        "encoder.width=4",
        "encoder.dim=16",
        "encoder.head=mlp",
        "moco.queue_size=100",
        "views.blur=0.5",
    ),
    *("optim.lr=0.1", "moco.momentum=0.9", "tracking.every_steps=1", "checkpoint.every_epochs=0"),
]
STEPS = 50


def train(folder: str, overrides: list[str], until: int, nudge: float = 0) -> dict[str, Any]:
    """Train the run in `folder` on to step `until`; save; return losses and all state.

    `nudge` changes each weight by at most that share of itself before the first step.
    """
    config = load(PretrainConfig, [*SMALL, f"output={folder}", *overrides])
    session = runs_session.start(config)
    splits = datasets.load(config.data)
    trainer = Trainer(config, session.accelerator, splits, session.resumed)
    hooks = RunHooks(trainer, session)
    if nudge:
        for module in trainer.moco.encoders.values():
            draws = torch.Generator().manual_seed(0)
            for parameter in module.parameters():
                share = 2 * torch.rand(parameter.shape, generator=draws, dtype=torch.float64) - 1
                parameter.data *= 1 + nudge * share
    losses, queues = [], []
    while trainer.step < until:
        loss, _ = trainer.train_step(hooks)
        losses.append(float(comms.mean(loss)))
        state = trainer.moco.state_dict()
        memory = [state[name] for name in state if name.startswith(("queue.", "bank."))]
        queues.append(fingerprint.of_tensors(*memory))
    loop.save(trainer, session, wait=True)
    session.close()
    state = {k: v.clone() for k, v in trainer.moco.state_dict().items()}
    for number, buffers in enumerate(trainer.optimizer.state.values()):
        state |= {f"{name} {number}": buffer.clone() for name, buffer in buffers.items()}
    return {"losses": torch.tensor(losses, dtype=torch.float64), "queues": queues, "state": state}


def one(
    folder: Path, world_size: int, *overrides: str, until: int = STEPS, nudge: float = 0
) -> dict[str, Any]:
    """Return rank 0's account of a run, once every rank tells the same of queue and state."""
    accounts = processes.run(train, world_size, str(folder), list(overrides), until, nudge)
    for rank, account in enumerate(accounts):
        assert account["queues"] == accounts[0]["queues"], (
            f"the queue of rank {rank} is another one"
        )
        different = distance(account["state"], accounts[0]["state"])
        assert different == 0, f"the state of rank {rank} differs by {different}"
    first: dict[str, Any] = accounts[0]
    return first


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


class Straight:
    """Uninterrupted runs, each made once: the run of N processes as a function of N."""

    def __init__(self, symmetric: bool, folder: Path) -> None:
        self.symmetric = f"moco.symmetric={symmetric}"
        self.folder = folder
        self.accounts: dict[int, dict[str, Any]] = {}

    def __call__(self, world_size: int) -> dict[str, Any]:
        if world_size not in self.accounts:
            folder = self.folder / str(world_size)
            self.accounts[world_size] = one(folder, world_size, self.symmetric)
        return self.accounts[world_size]


@pytest.fixture(scope="module", params=[False, True], ids=["asymmetric", "symmetric"])
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return Straight(request.param, tmp_path_factory.mktemp("straight"))


def assert_same(
    account: dict[str, Any], reference: dict[str, Any], tolerance: float = 1e-10
) -> None:
    losses = reference["losses"][-len(account["losses"]) :]
    assert (account["losses"] - losses).abs().max() <= tolerance
    assert distance(account["state"], reference["state"]) <= tolerance


def test_the_run_learns_something_worth_comparing(straight: Straight) -> None:
    account = straight(1)
    assert len(account["losses"]) == STEPS
    assert account["losses"][0] == 0  # the queue is empty
    assert account["losses"].std() > 0.1
    assert account["state"]["queue.samples"].min() >= 0


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_any_number_of_processes_gives_the_same_run(straight: Straight, world_size: int) -> None:
    assert_same(straight(world_size), straight(1))


@pytest.mark.parametrize(
    ("world_size", "micro_batches"),
    [(1, 2), pytest.param(1, 4, marks=pytest.mark.slow), (1, 8), (2, 2)],
)
def test_micro_batches_give_the_same_run(
    straight: Straight, tmp_path: Path, world_size: int, micro_batches: int
) -> None:
    micro = f"runtime.micro_batches={micro_batches}"
    assert_same(one(tmp_path, world_size, straight.symmetric, micro), straight(1))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_same_number_of_processes_gives_the_same_bits(
    straight: Straight, tmp_path: Path, world_size: int
) -> None:
    again = one(tmp_path, world_size, straight.symmetric)
    assert again["losses"].equal(straight(world_size)["losses"])
    assert distance(again["state"], straight(world_size)["state"]) == 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_in_mid_epoch_gives_the_same_bits(
    straight: Straight, tmp_path: Path, world_size: int
) -> None:
    one(tmp_path, world_size, straight.symmetric, until=27)
    resumed = one(tmp_path, world_size, straight.symmetric)
    assert len(resumed["losses"]) == STEPS - 27
    assert resumed["losses"].equal(straight(world_size)["losses"][27:])
    assert resumed["queues"] == straight(world_size)["queues"][27:]
    assert distance(resumed["state"], straight(world_size)["state"]) == 0


def test_resumed_on_other_numbers_of_processes_gives_the_same_run(
    straight: Straight, tmp_path: Path
) -> None:
    for world_size, until in ((8, 13), (4, 23), (1, 37), (2, STEPS)):
        account = one(tmp_path, world_size, straight.symmetric, until=until)
    assert_same(account, straight(1))


@pytest.mark.parametrize(("groups", "symmetric", "steps"), [(1, False, 21), (2, True, 9)])
def test_groups_that_span_processes_give_the_same_run(
    tmp_path: Path, groups: int, symmetric: bool, steps: int
) -> None:
    kind = f"bn_groups={groups}", f"moco.symmetric={symmetric}"
    reference = one(tmp_path / "1", 1, *kind, until=steps)
    assert reference["losses"].std() > 0.1
    for world_size in (2, 4):
        straight = one(tmp_path / str(world_size), world_size, *kind, until=steps)
        assert_same(straight, reference)
    cut = steps // 3
    one(tmp_path / "cut", 4, *kind, until=cut)
    shutil.copytree(tmp_path / "cut", tmp_path / "elastic")
    resumed = one(tmp_path / "cut", 4, *kind, until=steps)
    assert resumed["losses"].equal(straight["losses"][cut:])
    assert distance(resumed["state"], straight["state"]) == 0
    for world_size, until in ((1, 2 * cut), (2, steps)):
        account = one(tmp_path / "elastic", world_size, *kind, until=until)
    assert_same(account, reference)
