"""Heads that are trained as one batch are those trained alone, and agree with other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from moco_dist.config.optim import OptimConfig
from moco_dist.probe import heads
from tests.probes import prepared, pretrained, tinted

__all__ = ["pretrained"]


def alone(
    features: Tensor, labels: Tensor, batches: Tensor, point: heads.Point, seed: int, encoder: int
) -> nn.Linear:
    """Train one classifier by PyTorch's own layer, loss and optimizer; return it."""
    torch.manual_seed(seed)
    for _ in range(encoder + 1):
        head = nn.Linear(12, 5)
        nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    head = head.double()
    decay = point.weight_decay
    optimizer = torch.optim.SGD(head.parameters(), point.lr, momentum=0.9, weight_decay=decay)
    for step, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = point.lr * (0.1 if step >= 20 else 1.0)
        F.cross_entropy(head(features[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head


def test_a_batched_head_is_the_same_head_trained_alone_by_pytorch() -> None:
    torch.manual_seed(3)
    features, labels = torch.randn(2, 90, 12).double(), torch.randint(0, 5, (90,))
    batches = torch.stack([torch.randperm(90)[:30] for _ in range(80)]).view(2, 40, 30)
    optim = OptimConfig(schedule="step", milestones=[2], lr=1.0)
    points = [heads.Point(lr, decay) for decay in (0.0, 0.01) for lr in (0.03, 3.0)]
    together = heads.Heads(2, [7, 8], 4, 12, 5).double()
    optimizer = heads.HeadOptimizer(together, points, optim)
    for step in range(40):
        batch = batches[:, step]
        heads.losses(together(features[:, batch]), labels[batch]).mean(-1).sum().backward()
        optimizer.step(torch.tensor(optimizer.rates(step, 10, 40), dtype=torch.float64))
    for encoder in (0, 1):
        for place, seed in enumerate((7, 8)):
            for number, point in enumerate(points):
                one = alone(features[encoder], labels, batches[place], point, seed, encoder)
                for theirs, ours in ((one.weight, together.weight), (one.bias, together.bias)):
                    found = ours[encoder, place, number]
                    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_a_probe_of_a_grid_and_seeds_holds_the_probe_of_each_alone(
    pretrained: Path, tmp_path: Path, precision: str
) -> None:
    common = [f"precision={precision}", "label_fraction=0.6", "batch_size=20"]
    grid = ["grid.lr=[0.1,1,3]", "grid.weight_decay=[0,0.01]", "seeds=2"]
    whole = prepared(pretrained, tmp_path, *common, *grid)
    one = prepared(
        pretrained, tmp_path, *common, "optim.lr=3", "optim.weight_decay=0.01", "seed=1", "name=one"
    )
    for _ in range(6):
        losses, alone = whole.train_step(), one.train_step()
    place = whole.points.index(heads.Point(3, 0.01))
    # The control of seed 1 is another random encoder; that of the trained one is the same.
    torch.testing.assert_close(losses[0, 1, place], alone[0, 0, 0], rtol=0, atol=1e-6)
    weights = whole.heads.weight[0, 1, place], one.heads.weight[0, 0, 0]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
    assert not whole.heads.weight[0, 0, place].equal(weights[0])


def test_cached_and_augmented_heads_agree_when_augmentation_is_off(
    pretrained: Path, tmp_path: Path
) -> None:
    off = ["views.scale_min=1", "views.ratio_min=1", "views.ratio_max=1", "views.flip=0"]
    cached, augmented = (
        prepared(pretrained, tmp_path, *off, f"augment={augment}", f"name={augment}")
        for augment in ("false", "true")
    )
    on = prepared(pretrained, tmp_path, "augment=true", "name=on")
    for trial in (cached, augmented, on):
        for _ in range(8):
            trial.train_step()
    weights = [trial.heads.weight for trial in (cached, augmented, on)]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)
    assert (weights[0] - weights[2]).abs().max() > 1e-3


def test_the_probe_agrees_with_logistic_regression_of_scikit_learn(
    pretrained: Path, tmp_path: Path
) -> None:
    """On the same 1000 training and 1000 validation features, with the same weight decay."""
    decay = 0.01
    many = ["batch_size=250", "epochs=250", "augment=false", "control=false"]
    settings = ["optim.lr=0.1", f"optim.weight_decay={decay}"]
    splits = tinted(1000, 1000, 10)
    trial = prepared(pretrained, tmp_path, *many, *settings, splits=splits)
    while trial.step < trial.total_steps:
        trial.train_step()

    def columns(part: str) -> Any:
        # The probe's decay holds for the bias too: a feature of one in place of an intercept.
        return F.pad(trial.features[part][0], (0, 1), value=1.0).numpy()

    theirs = LogisticRegression(C=1 / (decay * 1000), fit_intercept=False, max_iter=5000, tol=1e-8)
    theirs.fit(columns("train"), trial.parts["train"].labels.numpy())
    accuracy = theirs.score(columns("validation"), trial.parts["validation"].labels.numpy())
    figures = trial.evaluate("validation")[0, 0, 0].tolist()
    assert 0.3 < accuracy < 0.95  # neither chance nor too easy
    assert abs(figures[2] - accuracy) < 0.01
    likelihood = theirs.predict_log_proba(columns("validation"))
    labels = trial.parts["validation"].labels.tolist()
    loss = -sum(row[label] for row, label in zip(likelihood, labels, strict=True)) / 1000
    assert figures[0] == pytest.approx(loss, abs=0.01)
