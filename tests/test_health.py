"""Figures of health are those of their papers, on any number of processes, and change nothing."""

from __future__ import annotations

import itertools
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from torch import Tensor

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.pretrain import figures, loop
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.step_graph import Stepper
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import session as runs_session
from tests import processes
from tests.test_one_run_any_machine import SMALL, distance, train
from tests.test_trainer import build


def sphere(rows: int, dim: int, seed: int, spread: float = 1.0) -> Tensor:
    random = np.random.default_rng(seed)
    points = random.normal(size=(rows, dim)) * spread + random.normal(size=dim)
    return torch.from_numpy(points / np.linalg.norm(points, axis=1, keepdims=True))


SHAPES = [(40, 8), (8, 40), (257, 64), (2, 3)]


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_figures_of_points_are_those_of_their_papers(rows: int, dim: int, spread: float) -> None:
    queries, keys = sphere(rows, dim, 1, spread), sphere(rows, dim, 2, spread)
    q, k = queries.numpy(), keys.numpy()
    aligned = np.mean([np.linalg.norm(a - b) ** 2 for a, b in zip(q, k, strict=True)])
    assert float(figures.alignment(queries, keys)) == pytest.approx(aligned, abs=1e-12)
    uniform = np.log(np.mean(np.exp(-2 * pdist(q, "sqeuclidean"))))
    assert float(figures.uniformity(queries)) == pytest.approx(uniform, abs=1e-12)
    singular = np.linalg.svd(q, compute_uv=False)
    p = singular / np.sum(singular) + 1e-7
    assert float(figures.rankme(queries)) == pytest.approx(np.prod(p**-p), rel=1e-6)
    std = np.mean(np.std(q, axis=0, ddof=1)) * dim**0.5
    assert float(figures.feature_std(queries)) == pytest.approx(std, abs=1e-12)


def test_figures_have_their_ends_where_the_docstrings_say() -> None:
    one = sphere(1, 16, 0).repeat(500, 1)
    assert float(figures.uniformity(one)) == pytest.approx(0, abs=1e-12)
    assert float(figures.feature_std(one)) == pytest.approx(0, abs=1e-12)
    assert float(figures.rankme(one)) == pytest.approx(1, abs=1e-4)
    assert float(figures.alignment(one, one)) == 0
    even = torch.eye(64, dtype=torch.float64)
    assert float(figures.rankme(even)) == pytest.approx(64, rel=1e-4)
    points = torch.from_numpy(np.random.default_rng(0).normal(size=(4000, 64)))
    points /= points.norm(dim=1, keepdim=True)
    assert float(figures.feature_std(points)) == pytest.approx(1, abs=0.01)
    assert float(figures.uniformity(points)) == pytest.approx(-3.9, abs=0.1)


@pytest.mark.parametrize(("size", "keys_per_step"), [(40, 16), (32, 16), (50, 50), (7, 3)])
def test_the_age_of_the_queue_is_that_of_its_keys_counted_one_by_one(
    size: int, keys_per_step: int
) -> None:
    queue: deque[int] = deque(maxlen=size)
    for step in range(12):
        ages = [step - written for written in queue]
        age = sum(ages) / len(ages) if ages else 0
        assert figures.age_steps(len(queue), keys_per_step) == pytest.approx(age)
        queue.extend([step] * keys_per_step)


def test_own_images_are_counted_one_by_one() -> None:
    random = np.random.default_rng(0)
    samples = random.permutation(50)[:16]
    older = random.integers(0, 50, size=120)
    hits = [sum(s == o for o in older) for s in samples]
    found = figures.own_images(torch.from_numpy(samples), torch.from_numpy(older))
    assert float(found) == pytest.approx(np.mean(hits))


def followed(folder: str, overrides: list[str], until: int) -> list[dict[str, Any]]:
    config = load(PretrainConfig, [*SMALL, f"output={folder}", *overrides])
    session = runs_session.start(config)
    trainer = Trainer(config, session.accelerator, datasets.load(config.data))
    hooks = RunHooks(trainer, session)
    take = Stepper(trainer, hooks)
    steps = []
    while trainer.step < until:
        samples = trainer.plan.step(trainer.step).samples
        older = trainer.moco.queue.negatives()[1].clone()
        taken = take()
        network = trainer.moco
        key, query = (
            np.concatenate([p.detach().numpy().ravel() for p in encoder.parameters()])
            for encoder in (network.key_encoder, network.query_encoder)
        )
        own = (samples[:, None] == older).sum(1).double().mean()
        apart = np.linalg.norm(key - query) / np.linalg.norm(query)
        logged = loop.figures_of(trainer, trainer.step, taken, hooks.health, 1.0)
        steps.append({"health": hooks.health, "logged": logged, "own": own, "apart": apart})
    session.close()
    return steps


@pytest.mark.parametrize("symmetric", ["false", "true"])
def test_every_number_of_processes_measures_the_same_and_what_is_so(
    tmp_path: Path, symmetric: str
) -> None:
    common = ["tracking.health_every_steps=2", f"moco.symmetric={symmetric}"]
    common += ["runtime.micro_batches=2", "data.shapes_train=120"]
    accounts = {n: processes.run(followed, n, str(tmp_path / str(n)), common, 7) for n in (1, 2, 4)}
    alone = accounts[1][0]
    names = {"alignment", "uniformity", "feature_std", "ema_distance", "rankme"}
    for number, step in enumerate(alone, start=1):
        if number != 1 and number % 2:
            assert not step["health"]
            continue
        measured = step["health"]
        expected = {f"health/{name}" for name in names} | {"queue/own_images", "queue/age_steps"}
        assert measured.keys() == expected - ({"health/rankme"} if number == 1 else set())
        assert measured["queue/own_images"] == pytest.approx(step["own"])
        assert measured["health/ema_distance"] == pytest.approx(step["apart"], rel=1e-9)
        if symmetric == "false":  # |q - k|^2 = 2 - 2 qk for unit vectors
            positive = step["logged"]["similarity/positive"]
            assert measured["health/alignment"] == pytest.approx(2 - 2 * positive, abs=1e-9)
    assert max(step["own"] for step in alone) > 0
    for ranks in accounts.values():
        for steps, number in itertools.product(ranks, range(7)):
            assert steps[number]["health"] == ranks[0][number]["health"]
            for name, value in alone[number]["health"].items():
                assert steps[number]["health"][name] == pytest.approx(value, abs=1e-9), name


def test_a_solver_that_fails_costs_its_figure_and_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    points, network = sphere(16, 8, 0), build().moco
    network.queue.enqueue(points.float(), torch.arange(16))
    arguments = network, points.float(), [points.float()], torch.arange(16)
    whole = figures.health(*arguments)
    assert whole["health/rankme"] > 1

    def fails(_: Tensor) -> Tensor:
        text = "cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"
        raise torch.linalg.LinAlgError(text)  # type: ignore[attr-defined]

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    found = figures.health(*arguments)
    assert found == {name: value for name, value in whole.items() if name != "health/rankme"}
    assert "health/rankme can't be computed (cusolver error" in caplog.text


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_has_the_same_bits_with_health_on_and_off(tmp_path: Path, world_size: int) -> None:
    on, off = (
        processes.run(
            train,
            world_size,
            str(tmp_path / f"{every}"),
            [f"tracking.health_every_steps={every}"],
            8,
        )[0]
        for every in (1, 0)
    )
    assert on["losses"].equal(off["losses"])
    assert on["queues"] == off["queues"]
    assert distance(on["state"], off["state"]) == 0
