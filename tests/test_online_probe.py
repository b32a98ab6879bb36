"""The linear classifier at each kNN evaluation: what it finds, and that no run notices it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.encoders import features
from moco_dist.errors import ConfigError
from moco_dist.pretrain import loop, state
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import session
from tests import processes
from tests.test_knn import Sizes
from tests.test_launch import python
from tests.test_trainer import TINY, build

WATCHED = ["monitor.linear=true", "precision=fp64"]


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 2e-4), (torch.float32, 2e-3)])
def test_it_is_the_logistic_regression_of_scikit_learn(
    dtype: torch.dtype, off: float, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:  # of 170 rows, the last of which is shorter
        monkeypatch.setattr(features, "QUERIES", 1)
        monkeypatch.setattr(features, "BANK", 64 * 170)
    x, y = load_digits(return_X_y=True)
    # With noise no line separates the classes, as with the features of an encoder.
    x = x + np.random.default_rng(0).normal(scale=12, size=x.shape)
    x[:, 0], x[:, 1] = 3.3, 1000 + 7 * x[:, 1]  # a constant, and one that is far from 0
    learnt, asked, known, wanted = x[::2], x[1::2], y[::2], y[1::2]
    oracle = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10, max_iter=10_000))
    oracle.fit(learnt, known)
    bank = torch.tensor(learnt, dtype=dtype)
    pauses: list[None] = []
    logits = features.linear_logits(
        *(torch.tensor(asked, dtype=dtype), bank, torch.tensor(known), 10),
        lambda: pauses.append(None),
    )
    found, expected = logits.softmax(1).numpy(), oracle.predict_proba(asked)
    assert logits.dtype == dtype
    assert np.abs(found - expected).max() < off
    assert log_loss(wanted, found) == pytest.approx(log_loss(wanted, expected), abs=off / 10)
    assert (found.argmax(1) == wanted).mean() == oracle.score(asked, wanted)
    assert len(pauses) == features._ROUNDS


def test_a_feature_that_differs_by_rounding_alone_tells_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    labels = (bank[:, 0] > 0).long()
    queries = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    found = []
    for noise in (0, 1e-15):
        constant = torch.ones(60, 1, dtype=torch.float64) + noise * labels[:, None]
        parts = torch.cat([bank, constant], 1), torch.cat([queries, constant[:20]], 1)
        found.append(features.linear_logits(parts[1], parts[0], labels, 2))
    assert (found[0] - found[1]).abs().max() < 1e-10


def test_it_needs_neither_all_logits_nor_another_copy_of_the_bank() -> None:
    bank, classes = torch.randn(4000, 16), 200
    labels = torch.randint(0, classes, (4000,))
    with pytest.MonkeyPatch.context() as patch, Sizes() as made:
        patch.setattr(features, "BANK", 20)  # pieces of 102 rows
        features.linear_logits(bank[:50].clone(), bank, labels, classes)
    made.found.pop(bank.untyped_storage().data_ptr(), None)  # seen by its pieces
    assert made.above(bank.nbytes // 2) == 0


def seen(*overrides: str) -> tuple[dict[str, float], Tensor]:
    """Return the accuracies after eight steps, and the logits of the validation images."""
    trainer, found = build(*WATCHED, *overrides), []
    for _ in range(8):
        trainer.train_step()
    original = features.linear_logits

    def watched(*arguments: Any) -> Tensor:
        found.append(original(*arguments))
        return found[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "linear_logits", watched)
        accuracies = trainer.accuracies()
    top1 = (found[0].argmax(1) == trainer.splits.validation.labels).double().mean()
    assert accuracies["online/top1"] == pytest.approx(float(top1))
    return accuracies, found[0]


def test_it_is_the_same_on_any_machine() -> None:
    words = ["bn_groups=4", "batch_size=32", "optim.lr=0.01", "data.validation=0.4"]
    alone, logits = processes.run(seen, 1, *words)[0]
    first, second = processes.run(seen, 2, *words, "runtime.micro_batches=2")
    assert logits.std() > 0.1
    for accuracies, others in (first, second):
        assert accuracies == pytest.approx(alone, abs=1e-10)
        assert (others - logits).abs().max() < 1e-10
    assert first[1].equal(second[1])


def test_the_run_does_not_notice_it() -> None:
    states = []
    for word in ("false", "true"):
        trainer = build(f"monitor.linear={word}")
        losses = []
        for _ in range(3):
            losses.append(trainer.train_step()[0])
            found = trainer.accuracies()
        assert ("online/top1" in found) == (word == "true")
        states.append([*losses, *trainer.moco.state_dict().values(), torch.get_rng_state()])
        model, training = state.tensors(trainer.moco, trainer.optimizer)
        assert not [name for name in (*model, *training) if "online" in name]
    assert all(a.equal(b) for a, b in zip(*states, strict=True))


def test_it_is_of_the_backbone_whatever_knn_is_of() -> None:
    of_backbone, of_head = (
        build("monitor.linear=true", "data.validation=0.4", f"knn.features={each}").accuracies()
        for each in ("backbone", "head")
    )
    assert of_backbone["online/top1"] == of_head["online/top1"]


def test_images_without_a_label_are_left_out() -> None:
    config = load(PretrainConfig, [*TINY, *WATCHED, "data.validation=0.4"])
    splits = datasets.load(config.data)
    assert isinstance(splits.train, datasets.Images)
    known = torch.arange(len(splits.train)) % 3 > 0
    labels = torch.where(known, splits.train.labels, -1)
    some = dataclasses.replace(splits.train, labels=labels)
    found = [
        Trainer(config, session.join(config), dataclasses.replace(splits, train=train)).accuracies()
        for train in (some, splits.train[known])
    ]
    assert found[0] == found[1]


def steps(folder: Path, until: int, *more: str) -> dict[str, float]:
    config = load(PretrainConfig, [*TINY, *WATCHED, f"output={folder}", *more])
    opened = session.start(config)
    trainer = Trainer(config, opened.accelerator, datasets.load(config.data), opened.resumed)
    while trainer.step < until:
        trainer.train_step(RunHooks(trainer, opened))
    loop.save(trainer, opened, wait=True)
    found = trainer.accuracies()
    opened.close()
    return found


def test_it_is_resumed_bit_for_bit_also_from_the_checkpoint_of_an_earlier_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions saved a classifier that learned in each step, with these tensors."""
    straight = steps(tmp_path / "straight", 9)
    steps(tmp_path / "resumed", 4)
    assert steps(tmp_path / "resumed", 9) == straight
    now = state.tensors

    def then(*parts: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model, training = now(*parts)
        old = {"online.weight": torch.ones(4, 32), "online.steps": torch.ones(())}
        return model, training | old

    with monkeypatch.context() as patch:
        patch.setattr(state, "tensors", then)
        steps(tmp_path / "old", 4)
    assert steps(tmp_path / "old", 9) == straight


def test_a_run_logs_it_and_tables_show_it(tmp_path: Path) -> None:
    run = [*TINY, "monitor.linear=true", f"output={tmp_path}", "name=on", "epochs=2"]
    done = python("pretrain", *run, "knn.every_epochs=1", "tracking.wandb=disabled")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "on/metrics.jsonl").read_text().splitlines()]
    both = [line for line in lines if "knn/top1" in line]
    assert len(both) == 2
    last = both[-1]["online/top1"]
    *_, banner = done.stdout.split("kNN ", 1)
    assert "every 1 epoch, with a linear classifier (online/top1)" in " ".join(banner.split())
    assert f"linear {100 * last:4.1f}%" in done.stdout
    closing = done.stdout[done.stdout.rindex("after step") :]
    assert f"online/top1 {last:.4g}" in " ".join(closing.split())
    assert json.loads((tmp_path / "on/DONE").read_text())["online/top1"] == last
    told = python("report", str(tmp_path / "on"), "--text").stdout.splitlines()
    columns, cells = ([part.strip() for part in line.split("  ") if part] for line in told[:2])
    names = columns[-len(cells) :]
    assert dict(zip(names, cells, strict=True))["online %"] == f"{100 * last:.2f}"
    assert any(line.startswith("Online top-1, last") for line in told)


def test_without_labels_or_evaluations_it_is_refused() -> None:
    config = load(PretrainConfig, [*TINY, "monitor.linear=true"])
    splits = datasets.load(config.data)
    bare = dataclasses.replace(splits, validation=splits.validation[torch.arange(0)])
    with pytest.raises(ConfigError, match="needs labels and validation images"):
        Trainer(config, session.join(config), bare)
    with pytest.raises(ConfigError, match=r"knn\.every_epochs=0 is never"):
        load(PretrainConfig, ["monitor.linear=true", "knn.every_epochs=0"])
