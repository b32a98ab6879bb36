"""The linear probe that learns along the way: what it learns, and that nothing else notices it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.errors import ConfigError
from moco_dist.method.online_probe import OnlineProbe
from moco_dist.pretrain import loop
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import session
from tests import processes
from tests.test_launch import python
from tests.test_mechanisms import KINDS
from tests.test_trainer import TINY, build

WATCHED = ["monitor.linear=true", "precision=fp64"]


def test_it_is_logistic_regression_by_sgd_on_standardised_features() -> None:
    torch.manual_seed(0)
    probe, plain = OnlineProbe(6, 3).double(), nn.Linear(6, 3).double()
    nn.init.zeros_(plain.weight)
    nn.init.zeros_(plain.bias)
    optimizer = torch.optim.SGD(plain.parameters(), 0.7, 0.9)
    mean, var = torch.zeros(6).double(), torch.zeros(6).double()
    for step in range(12):
        features, labels = 3 + 5 * torch.randn(8, 6).double(), torch.randint(0, 3, (8,))
        labels[0] = -1  # unknown
        probe.learn(features, labels, 0.7)
        # The mean of all batches so far, as long as they are fewer than a hundred.
        mean = (step * mean + features.mean(0)) / (step + 1)
        var = (step * var + features.var(0, correction=0)) / (step + 1)
        points = (features - mean) / (var + 1e-5).sqrt() / 6**0.5
        optimizer.zero_grad()
        F.cross_entropy(plain(points), labels, ignore_index=-1).backward()
        optimizer.step()
    torch.testing.assert_close(probe.weight, plain.weight.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(probe.bias, plain.bias.detach(), rtol=0, atol=1e-12)
    right = (plain(points).argmax(1) == labels).sum()
    assert int(probe.right(features, labels)) == int(right)


def test_a_bad_step_changes_nothing() -> None:
    probe = OnlineProbe(4, 2)
    probe.learn(torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 1, 0]), 0.5)
    before = {name: value.clone() for name, value in probe.state_dict().items()}
    bad = torch.full((6, 4), torch.nan)
    probe.learn(bad, torch.zeros(6, dtype=torch.int64), 0.5, torch.tensor(False))
    assert all(value.equal(before[name]) for name, value in probe.state_dict().items())
    probe.learn(torch.randn(6, 4), torch.zeros(6, dtype=torch.int64), 0.5, torch.tensor(True))
    assert not probe.weight.equal(before["weight"])


def watched(*overrides: str) -> tuple[dict[str, Tensor], float | None]:
    trainer = build(*WATCHED, *overrides)
    for _ in range(8):
        trainer.train_step()
    trainer.knn_top1()
    assert trainer.online is not None
    return {k: v.clone() for k, v in trainer.online.state_dict().items()}, trainer.online_top1


@pytest.mark.parametrize("kind", ["queue", *KINDS])
def test_it_is_the_same_on_any_machine(kind: str) -> None:
    words = [*KINDS.get(kind, []), "bn_groups=4", "batch_size=32", "optim.lr=0.01"]
    alone, accuracy = processes.run(watched, 1, *words)[0]
    several = processes.run(watched, 2, *words, "runtime.micro_batches=2")
    for state, found in several:
        assert found == pytest.approx(accuracy, abs=1e-10)
        for name, value in state.items():
            assert (value - alone[name]).abs().max() < 1e-10, name
    assert alone["weight"].abs().max() > 0
    assert all(a.equal(b) for a, b in zip(*(state.values() for state, _ in several), strict=True))


def test_the_encoder_does_not_notice_it() -> None:
    states = []
    for words in (["monitor.linear=false"], ["monitor.linear=true"]):
        trainer = build(*words)
        losses = [trainer.train_step()[0] for _ in range(4)]
        states.append([*losses, *trainer.moco.state_dict().values()])
    assert all(a.equal(b) for a, b in zip(*states, strict=True))


def steps(folder: Path, until: int, *more: str) -> Any:
    config = load(PretrainConfig, [*TINY, *WATCHED, f"output={folder}", *more])
    opened = session.start(config)
    trainer = Trainer(config, opened.accelerator, datasets.load(config.data), opened.resumed)
    while trainer.step < until:
        trainer.train_step(loop.run_hooks(trainer, opened))
    loop.save(trainer, opened, wait=True)
    opened.close()
    return {} if trainer.online is None else trainer.online.state_dict()


def test_it_is_resumed_bit_for_bit_left_out_and_begun_later(tmp_path: Path) -> None:
    straight = steps(tmp_path / "straight", 9)
    steps(tmp_path / "resumed", 4)
    resumed = steps(tmp_path / "resumed", 9)
    assert all(value.equal(resumed[name]) for name, value in straight.items())
    steps(tmp_path / "later", 4, "monitor.linear=false")
    later = steps(tmp_path / "later", 9)
    assert float(later["steps"]) == 5
    assert steps(tmp_path / "later", 10, "monitor.linear=false") == {}


def test_a_run_logs_it_with_knn(tmp_path: Path) -> None:
    run = [*TINY, "monitor.linear=true", f"output={tmp_path}", "name=on", "epochs=2"]
    more = ["knn.every_epochs=1", "knn.features=head", "tracking.wandb=disabled"]
    done = python("pretrain", *run, *more)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()
    both = [line for line in lines if '"knn/top1"' in line]
    assert len(both) == 2
    assert all('"online/top1"' in line for line in both)
    assert "linear" in done.stderr + done.stdout


def test_without_labels_or_evaluations_it_is_refused() -> None:
    config = load(PretrainConfig, [*TINY, "monitor.linear=true"])
    splits = datasets.load(config.data)
    bare = dataclasses.replace(splits, validation=splits.validation[torch.arange(0)])
    with pytest.raises(ConfigError, match="needs labels and validation images"):
        Trainer(config, session.join(config), bare)
    with pytest.raises(ConfigError, match=r"knn\.every_epochs=0 is never"):
        load(PretrainConfig, ["monitor.linear=true", "knn.every_epochs=0"])
