"""LARS is its published formula, AdamW is PyTorch's, and both are one run on any machine."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moco_dist.config.optim import OptimConfig
from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.errors import ConfigError
from moco_dist.method import optimizers
from moco_dist.method.schedule import learning_rate
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import checkpoint, session
from tests import processes
from tests.test_one_run_any_machine import SMALL, assert_same, distance, one

Numbers = list[float]


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """A convolution in channels_last, two matrices, one of which is zero, and a vector."""
    torch.manual_seed(seed)
    found = [torch.randn(shape, dtype=dtype) for shape in ((4, 3, 2, 2), (5, 3), (2, 3), (6,))]
    found[0] = found[0].contiguous(memory_format=torch.channels_last)
    found[2].zero_()
    return [nn.Parameter(each) for each in found]


def lars_by_hand(
    p: Numbers, g: Numbers, mu: Numbers, lr: float, config: OptimConfig, vector: bool
) -> tuple[Numbers, Numbers]:
    """One step of one parameter (moco-v3, moco/optimizer.py) with Python's own sums."""
    if not vector:
        g = [a + config.weight_decay * b for a, b in zip(g, p, strict=True)]
        size, slope = (math.sqrt(math.fsum(x * x for x in each)) for each in (p, g))
        factor = config.trust * size / slope if size > 0 and slope > 0 else 1.0
        if config.trust_clip and size > 0 and slope > 0:  # solo-learn, solo/utils/lars.py
            factor = min(factor / lr, 1.0)
        g = [factor * a for a in g]
    mu = [config.momentum * a + b for a, b in zip(mu, g, strict=True)]
    ahead = [a + config.momentum * b for a, b in zip(g, mu, strict=True)]
    used = ahead if config.nesterov else mu
    return [a - lr * b for a, b in zip(p, used, strict=True)], mu


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nesterov": True, "trust": 0.01},
        {"trust": 0.3, "trust_clip": True},
        {"trust": 0.3, "trust_clip": True, "momentum": 0.0},
    ],
)
def test_lars_is_a_loop_of_scalars(settings: dict[str, Any]) -> None:
    config = OptimConfig(name="lars", lr=0.5, weight_decay=0.1, **settings)
    parameters = drawn(0)
    optimizer = optimizers.build(config, parameters)
    by_hand = [p.detach().flatten().tolist() for p in parameters]
    momenta = [[0.0] * len(each) for each in by_hand]
    for step in range(6):
        lr = 0.5 / (step + 1)
        optimizer.param_groups[0]["lr"] = lr if step % 2 else torch.tensor(lr, dtype=torch.float64)
        for number, parameter in enumerate(parameters):
            torch.manual_seed(100 * step + number)
            size = [0.2, 20.0, 1.0, 1.0][number]
            gradient = size * torch.randn_like(parameter)
            parameter.grad = gradient * (step != 3 or number != 1)  # a gradient of zeros, too
            given = parameter.grad.flatten().tolist(), momenta[number]
            by_hand[number], momenta[number] = lars_by_hand(
                by_hand[number], *given, lr, config, parameter.ndim == 1
            )
        optimizer.step()
        optimizer.zero_grad()
    for parameter, expected in zip(parameters, by_hand, strict=True):
        found = parameter.detach().flatten()
        torch.testing.assert_close(
            found, torch.tensor(expected, dtype=found.dtype), rtol=0, atol=1e-12
        )


def test_sgd_and_adamw_are_pytorchs() -> None:
    for config, oracle in (
        (
            OptimConfig(nesterov=True, weight_decay=0.1),
            lambda ps: torch.optim.SGD(ps, 0.03, 0.9, weight_decay=0.1, nesterov=True),
        ),
        (
            OptimConfig(name="adamw", weight_decay=0.1),
            lambda ps: torch.optim.AdamW(ps, 0.03, weight_decay=0.1),
        ),
    ):
        ours, theirs = drawn(0), drawn(0)
        ours.append(nn.Parameter(torch.ones(2), requires_grad=False))  # and what is frozen stays
        pair = optimizers.build(config, ours), oracle(theirs)
        for step in range(5):
            for number, (a, b) in enumerate(zip(ours[:-1], theirs, strict=True)):
                torch.manual_seed(100 * step + number)
                a.grad = torch.randn_like(b)
                b.grad = a.grad.clone()
            for each in pair:
                each.step()
        torch.testing.assert_close(ours[:-1], theirs, rtol=0, atol=1e-13)
        assert ours[-1].equal(torch.ones(2))


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_a_step_with_a_bad_number_changes_nothing(name: Any) -> None:
    """As the captured step tells it: by `found_inf` on the device."""
    parameters = drawn(0, torch.float32)
    optimizer = optimizers.build(OptimConfig(name=name), parameters)

    def step(bad: bool) -> None:
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, math.nan if bad else 0.5)
        optimizer.found_inf = torch.tensor(float(bad))  # type: ignore[attr-defined]
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
        optimizer.step()

    def state() -> list[Tensor]:
        kept = [t.clone() for each in optimizer.state.values() for t in each.values()]
        return [p.detach().clone() for p in parameters] + kept

    step(bad=False)
    before = state()
    step(bad=True)
    assert all(a.equal(b) for a, b in zip(state(), before, strict=True))
    step(bad=False)
    assert not any(a.equal(b) for a, b in zip(state(), before, strict=True))


def test_the_norms_of_lars_do_not_depend_on_the_number_of_threads() -> None:
    torch.manual_seed(0)
    shapes = (512, 256, 3, 3), (2048, 512), (1, 197, 384)
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    found = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(optimizers._norms(tensors))
    finally:
        torch.set_num_threads(1)
    assert all(each.equal(found[0]) for each in found)
    exact = torch.stack([each.double().norm() for each in tensors])
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-6, atol=0)


RECIPES = {
    "lars": ["optim.name=lars", "optim.lr=5", "optim.weight_decay=1e-4"],
    "adamw": ["optim.name=adamw", "optim.lr=0.003", "optim.weight_decay=0.1"],
}
EPOCHS = ["optim.warmup_epochs=0.5", "optim.schedule=cosine_after_warmup", "bn_groups=4"]
STEPS = 20


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_by_another_optimizer_is_one_run_on_any_machine(name: str, tmp_path: Path) -> None:
    recipe = [*RECIPES[name], *EPOCHS]
    straight = one(tmp_path / "one", 1, *recipe, until=STEPS)
    several = one(tmp_path / "two", 2, *recipe, "runtime.micro_batches=2", until=STEPS)
    assert_same(several, straight)
    # Resumed in mid-epoch: with the same bits, and on another number of processes.
    one(tmp_path / "resumed", 1, *recipe, until=9)
    saved = checkpoint.newest(tmp_path / "resumed" / "pretrain")
    assert saved is not None
    kinds = {name.partition(".")[0] for name in saved.optimizer}
    assert kinds == {"statistics"} | {"lars": {"momentum"}, "adamw": {"first", "second"}}[name]
    shutil.copytree(tmp_path / "resumed", tmp_path / "elastic")
    again = one(tmp_path / "resumed", 1, *recipe, until=STEPS)
    assert again["losses"].equal(straight["losses"][9:])
    assert distance(again["state"], straight["state"]) == 0
    one(tmp_path / "elastic", 2, *recipe, until=14)
    assert_same(one(tmp_path / "elastic", 1, *recipe, until=STEPS), straight)


def steps(plain: bool) -> list[Tensor]:
    """Train some steps by AdamW, or by PyTorch's own as it stands in its documentation."""
    config = load(PretrainConfig, [*SMALL, *RECIPES["adamw"], "optim.schedule=constant"])
    trainer = Trainer(config, session.join(config), datasets.load(config.data))
    if plain:
        parameters = trainer.moco.query_encoder.parameters()
        trainer.optimizer = torch.optim.AdamW(parameters, lr=0.003, weight_decay=0.1)
    for _ in range(6):
        trainer.train_step()
    return [p.detach().clone() for p in trainer.moco.query_encoder.parameters()]


def test_adamw_on_two_processes_is_pytorchs_on_one() -> None:
    (expected,) = processes.run(steps, 1, True)
    for found in processes.run(steps, 2, False):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_cosine_after_the_warmup_is_pytorchs_from_there_on() -> None:
    optim = OptimConfig(
        schedule="cosine_after_warmup", lr=0.6, lr_min=0.001, warmup_epochs=3, name="lars"
    )
    parameter = nn.Parameter(torch.zeros(()))
    theirs = torch.optim.SGD([parameter], lr=0.6)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 100 - 30, eta_min=0.001)
    rates = [learning_rate(optim, step, 10, 100) for step in range(100)]
    assert rates[:30] == pytest.approx([0.6 * (step + 1) / 31 for step in range(30)])
    for rate in rates[30:]:
        assert rate == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        theirs.step()
        cosine.step()
    # Without a warm-up it is the plain cosine, to the bit.
    plain, after = (
        [learning_rate(OptimConfig(schedule=kind), step, 10, 100) for step in range(100)]
        for kind in ("cosine", "cosine_after_warmup")
    )
    assert plain == after


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["optim.trust=0.02"], "optim.trust=0.02 has no effect with optim.name=sgd"),
        (["optim.name=adamw", "optim.momentum=0.8"], "optim.momentum=0.8 has no effect with"),
        (["optim.name=lars", "optim.trust=0"], "optim.trust=0.0 is not above 0"),
        (["optim.nesterov=true", "optim.momentum=0"], "optim.nesterov=true needs a momentum"),
        (["optim.lr_min=1"], "optim.lr_min=1.0 is above optim.lr=0.03"),
        (["optim.schedule=constant", "optim.lr_min=0.01"], "has no effect with optim.schedule="),
    ],
)
def test_a_setting_that_does_nothing_is_one_sentence(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(PretrainConfig, words)


def test_a_probe_is_trained_by_sgd_alone() -> None:
    with pytest.raises(ConfigError, match=r"optim\.name=lars .* is for pretraining only"):
        load(ProbeConfig, ["encoder=runs/x", "optim.name=lars"])
