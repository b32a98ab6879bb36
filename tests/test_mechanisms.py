"""The other mechanisms of figure 2: their formulas, their gradients, and one run on any machine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.distributed import comms
from moco_dist.errors import ConfigError
from moco_dist.method import pairs
from moco_dist.method.bank import Bank
from moco_dist.method.batch_norm import batch_norms
from moco_dist.method.plan import Plan
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.trainer import Trainer
from tests import processes
from tests.test_bench import received
from tests.test_moco import unit
from tests.test_one_run_any_machine import assert_same, distance, one
from tests.test_trainer import build

ONE_WAY = ["moco.negatives=batch", "moco.keys=gradient"]
SIMCLR = [*ONE_WAY, "moco.symmetric=true"]
V3 = [
    *("moco.negatives=batch", "moco.symmetric=true", "optim.name=lars"),
    *("encoder.head=mlp_bn", "encoder.predictor=true", "encoder.head_width=24"),
]
# A variance of four vectors may be almost 0, and rounding then grows tenfold in each step.
CALM = {"v3": ["batch_size=64", "bn_groups=4", "optim.lr=0.01"]}
BANK = ["moco.negatives=bank", "moco.keys=gradient", "moco.bank_draws=50"]
CMC = [*BANK, "encoder.halves=lab", "views.grayscale=0"]
KINDS = {"one_way": ONE_WAY, "simclr": SIMCLR, "v3": V3, "bank": BANK, "cmc": CMC}
EXACT = "precision=fp64"


def nt_xent_by_hand(first: Tensor, second: Tensor, temperature: float) -> float:
    """Equation 1 of Chen et al. 2020 with Python's own sums, the mean over all 2 B rows."""
    vectors, rows = [*first.tolist(), *second.tolist()], len(first)
    losses = []
    for i, one_vector in enumerate(vectors):
        dots = [math.fsum(a * b for a, b in zip(one_vector, v, strict=True)) for v in vectors]
        partner = (i + rows) % (2 * rows)
        others = [math.exp(dot / temperature) for j, dot in enumerate(dots) if j != i]
        losses.append(math.log(math.fsum(others)) - dots[partner] / temperature)
    return math.fsum(losses) / len(losses)


def everyone(plan: Plan) -> tuple[Tensor, pairs.Everyone]:
    """Return the places of this process's vectors in a batch, and what joins those of all."""
    rows = plan.step(0)

    def joined(x: Tensor) -> Tensor:
        first, second = comms.all_gather(x).unbind(1)
        return torch.cat([first, second[rows.unshuffle[0]]])

    return torch.stack([rows.query_rows, rows.key_rows[0]], 1), joined


def shares(name: str, temperature: float) -> tuple[float, Tensor, Tensor, Tensor]:
    """Return loss, gradients and places of this process, and the logits of its first row."""
    plan = Plan(
        num_samples=8, batch_size=8, seed=3, rank=comms.rank(), world_size=comms.world_size()
    )
    first, second = unit(8, 5, 1), unit(8, 5, 2)
    places, joined = everyone(plan)
    mine = torch.stack([first[places[:, 0]], second[places[:, 1]]], 1)
    share = getattr(pairs, name)(mine, places, joined(mine), joined, temperature)
    return float(comms.mean(share.loss)), share.gradient, places, share.logits


def plain(name: str, first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """The same losses on one process, by cross_entropy: gradients are those of the sum of views."""
    rows = torch.arange(len(first))
    if name == "one_way":
        return F.cross_entropy(first @ second.T / temperature, rows)
    both = torch.cat([first, second])
    logits = (both @ both.T / temperature).fill_diagonal_(-torch.inf)
    return 2 * F.cross_entropy(logits, torch.cat([rows + len(first), rows]))


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", ["nt_xent", "one_way"])
def test_a_process_has_its_share_of_the_gradient_of_the_whole_loss(
    name: str, world_size: int
) -> None:
    first, second = unit(8, 5, 1).requires_grad_(), unit(8, 5, 2).requires_grad_()
    loss = plain(name, first, second, 0.3)
    loss.backward()
    for found, gradient, places, _ in processes.run(shares, world_size, name, 0.3):
        assert found == pytest.approx(loss.item() / (2 if name == "nt_xent" else 1), abs=1e-14)
        for view, points in enumerate((first, second)):
            assert points.grad is not None
            torch.testing.assert_close(
                gradient[:, view], points.grad[places[:, view]], rtol=0, atol=1e-14
            )


def test_nt_xent_is_the_formula_of_the_paper() -> None:
    by_hand = nt_xent_by_hand(unit(8, 5, 1), unit(8, 5, 2), 0.07)
    assert shares("nt_xent", 0.07)[0] == pytest.approx(by_hand, abs=1e-12)


def test_nt_xent_of_equal_views_of_orthogonal_images_has_its_closed_value() -> None:
    points, temperature = torch.eye(6, dtype=torch.float64), 0.5
    places = torch.arange(6)[:, None].expand(6, 2)
    mine = torch.stack([points, points], 1)

    def joined(x: Tensor) -> Tensor:
        return torch.cat(x.unbind(1))

    found = pairs.nt_xent(mine, places, joined(mine), joined, temperature)
    closed = math.log(math.exp(1 / temperature) + 10) - 1 / temperature
    assert float(found.loss) == pytest.approx(closed, abs=1e-14)
    # Positive first; itself and the positive's own column don't count a second time.
    assert found.logits.shape == (12, 13)
    assert found.logits[:, 1:].isinf().sum(1).tolist() == [2] * 12


def trained(trainer: Trainer, steps: int) -> list[Tensor]:
    for _ in range(steps):
        trainer.train_step()
    return [p.detach().clone() for p in trainer.moco.query_encoder.parameters()]


def by_autograd(trainer: Trainer, steps: int) -> list[Tensor]:
    """Train with plain losses over whole batches, by autograd alone, without memory or pieces."""
    config, encoder = trainer.config, trainer.moco.query_encoder.train()
    for step in range(steps):
        rows = trainer.plan.step(step)
        epoch = step // trainer.steps_per_epoch
        first = encoder(trainer.views(rows.samples, epoch, 0))
        second = encoder(trainer.views(rows.samples[rows.key_rows[0]], epoch, 1))
        name = "nt_xent" if config.moco.symmetric else "one_way"
        plain(name, first, second[rows.unshuffle[0]], config.moco.temperature).backward()
        trainer.update_query_encoder()
        trainer.step += 1
    return [p.detach().clone() for p in encoder.parameters()]


@pytest.mark.parametrize("kind", ["one_way", "simclr"])
def test_steps_with_gradients_on_both_sides_are_those_of_a_plain_loss(kind: str) -> None:
    ours = trained(build(EXACT, *KINDS[kind]), 8)
    theirs = by_autograd(build(EXACT, *KINDS[kind]), 8)
    assert max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) < 1e-10


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_keys_of_the_batch_are_classes_of_a_cross_entropy(micro_batches: int) -> None:
    micro = f"runtime.micro_batches={micro_batches}"
    trainer = build(EXACT, "moco.negatives=batch", micro)
    trained(trainer, 2)
    rows, network = trainer.plan.step(2), build(EXACT, "moco.negatives=batch").moco
    network.load_state_dict(trainer.moco.state_dict())
    network.train()
    with torch.no_grad():
        queries = network.query_encoder(trainer.views(rows.samples, 0, 0))
        keys = network.key_encoder(trainer.views(rows.samples[rows.key_rows[0]], 0, 1))
    logits = queries @ keys[rows.unshuffle[0]].T / 0.1
    loss, found = trainer.train_step()
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, torch.arange(16))), abs=1e-12)
    assert sum(len(each) for each in found) == 16


def test_with_a_momentum_of_0_the_first_loss_is_that_with_gradients() -> None:
    first, second = (
        float(build(EXACT, *each, "moco.momentum=0").train_step()[0])
        for each in (["moco.negatives=batch"], ONE_WAY)
    )
    assert first == pytest.approx(second, abs=1e-12)


def test_a_bank_of_all_images_gives_a_cross_entropy_over_the_images() -> None:
    trainer = build(EXACT, *BANK, "moco.bank_draws=0")
    trained(trainer, 3)
    rows, vectors = trainer.plan.step(3), trainer.moco.bank.vectors.clone()
    network = build(EXACT, *BANK).moco
    network.load_state_dict(trainer.moco.state_dict())
    queries = network.train().query_encoder(trainer.views(rows.samples, 0, 0))
    expected = F.cross_entropy(queries @ vectors.T / 0.1, rows.samples)
    assert float(trainer.train_step()[0]) == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("momentum", [0.5, 0.0])
def test_a_bank_is_a_moving_average_of_each_images_queries(momentum: float) -> None:
    trainer = build(EXACT, *BANK, f"moco.bank_momentum={momentum}", "moco.bank_start=random")
    rows_of = {i: v for i, v in enumerate(trainer.moco.bank.vectors.tolist())}
    seen: list[Tensor] = []
    remember = trainer.moco.remember
    trainer.moco.remember = lambda q, s: (seen.append(q), remember(q, s))  # type: ignore
    for step in range(2 * trainer.steps_per_epoch):
        trainer.train_step()
        for sample, query in zip(
            trainer.plan.step(step).samples.tolist(), seen[-1].tolist(), strict=True
        ):
            old = rows_of[sample]
            mixed = [momentum * a + (1 - momentum) * b for a, b in zip(old, query, strict=True)]
            length = math.sqrt(math.fsum(a * a for a in mixed))
            rows_of[sample] = [a / length for a in mixed]
    expected = torch.tensor([rows_of[i] for i in range(len(rows_of))], dtype=torch.float64)
    assert (trainer.moco.bank.vectors - expected).abs().max() < 1e-14


def test_a_bank_draws_all_images_equally_often_and_never_counts_the_own_one() -> None:
    bank = Bank(images=90, dim=4, seed=5, draws=1000, momentum=0.5)
    drawn = torch.stack([bank.drawn(step) for step in range(90)])
    counts = drawn.flatten().bincount(minlength=90)
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert 89 - 5 * math.sqrt(178) < chi_square < 89 + 5 * math.sqrt(178)  # mean and 5 deviations
    assert not drawn[0].equal(drawn[1])
    samples = torch.tensor([7, 3, 55])
    negatives, own = bank.negatives(0, samples)
    assert negatives.equal(bank.vectors[drawn[0]])
    hits = drawn[0] == samples[:, None]
    assert own.equal(torch.where(hits.any(0), hits.int().argmax(0), -1))


def test_a_new_bank_holds_unit_vectors_in_all_directions() -> None:
    vectors = Bank(images=20_000, dim=6, seed=1, draws=0, momentum=0.5).vectors.double()
    assert (vectors.norm(dim=1) - 1).abs().max() < 1e-6
    assert vectors.mean(0).norm() < 0.03
    assert (vectors.T @ vectors / 20_000 - torch.eye(6) / 6).abs().max() < 0.01


def test_a_bank_can_begin_with_the_new_encoders_vectors() -> None:
    trainer = build(EXACT, *BANK, "moco.bank_momentum=0", "optim.lr=1e-30")
    trainer.train_step()
    encoder = build(EXACT, *BANK).moco.query_encoder.train()
    images = len(trainer.splits.train)
    found = trainer.moco.bank.vectors[:images]
    with torch.no_grad():
        first = encoder(trainer.views(torch.arange(16), 0, 0))
        last = encoder(trainer.views(torch.arange(images - 16, images), 0, 0))
    kept = torch.isin(torch.arange(images), trainer.plan.step(0).samples, invert=True)
    for rows, expected in ((slice(0, 16), first), (slice(images - 16, images), last)):
        here = kept[rows]
        assert here.any()
        torch.testing.assert_close(found[rows][here], expected[here], rtol=0, atol=1e-12)


def test_the_pass_that_fills_a_bank_leaves_no_trace_in_the_statistics() -> None:
    filled, drawn = (build(EXACT, *BANK, f"moco.bank_start={how}") for how in ("pass", "random"))
    for trainer in (filled, drawn):
        trainer.train_step()
    found, expected = (batch_norms(each.moco.query_encoder)[-1] for each in (filled, drawn))
    assert found.group_mean.equal(expected.group_mean)
    assert found.group_var.equal(expected.group_var)


STEPS = 20


def account(folder: Path, world_size: int, kind: str, *more: str, until: int = STEPS) -> Any:
    return one(folder, world_size, *KINDS[kind], *CALM.get(kind, []), *more, until=until)


@pytest.mark.parametrize("kind", KINDS)
def test_one_run_on_any_machine(kind: str, tmp_path: Path) -> None:
    straight = account(tmp_path / "1", 1, kind)
    assert straight["losses"].std() > 0.01
    assert_same(account(tmp_path / "4", 4, kind), straight)
    assert_same(account(tmp_path / "2x2", 2, kind, "runtime.micro_batches=2"), straight)
    moved, micro = tmp_path / "moved", ["runtime.micro_batches=4"]
    for world_size, more, until in ((4, [], 7), (1, micro, 13), (2, [], STEPS)):
        last = account(moved, world_size, kind, *more, until=until)
    assert_same(last, straight)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_in_mid_epoch_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    straight = account(tmp_path / "straight", 2, kind)
    account(tmp_path / "resumed", 2, kind, until=9)
    resumed = account(tmp_path / "resumed", 2, kind)
    assert resumed["losses"].equal(straight["losses"][9:])
    assert distance(resumed["state"], straight["state"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_long_run_on_any_machine(kind: str, tmp_path: Path) -> None:
    size = ["batch_size=128", "bn_groups=8"] if kind in CALM else []
    straight = account(tmp_path / "1", 1, kind, *size, until=50)
    for world_size, micro in ((2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8), (2, 2)):
        folder = tmp_path / f"{world_size}x{micro}"
        words = [*size, f"runtime.micro_batches={micro}"]
        assert_same(account(folder, world_size, kind, *words, until=50), straight)


def traffic(kind: list[str]) -> tuple[float, int, int]:
    """Return per step: bytes received, bytes sent in gathers, and bytes reckoned for gradients."""
    size = ["encoder.width=16", "encoder.dim=64", "batch_size=64", "tracking.health_every_steps=0"]
    trainer = build(*size, *kind)
    hooks = RunHooks(trainer)
    for _ in range(3):
        trainer.train_step(hooks)
    comms.all_gather(torch.zeros(1))
    before = received()
    comms.all_gather(torch.zeros(1))
    counted = comms.sent_bytes
    for _ in range(4):
        trainer.train_step(hooks)
    counted = (comms.sent_bytes - counted) // 4
    each = (received() - before) / 4
    comms.all_gather(torch.zeros(1))
    return each, counted, comms.all_reduce_bytes(sum(p.nbytes for p in hooks.parameters))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", ["simclr", "v3", "bank", "cmc"])
def test_a_step_sends_the_bytes_of_its_formula(kind: str, world_size: int) -> None:
    local, dim, note = 64 // world_size, 64, 5 * 8
    share = {  # float32 of each process to each other one
        "simclr": 2 * local * (dim + 1) * 4 + note,
        "v3": 2 * local * dim * 4 + note,
        "bank": local * dim * 4 + note,
        "cmc": 2 * local * dim * 4 + note,
    }[kind]
    for got, sent, gradients in processes.run(traffic, world_size, KINDS[kind]):
        assert sent == (world_size - 1) * share
        assert got == pytest.approx(sent + gradients, rel=0.01)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["moco.keys=gradient"], "the keys of other steps can't have a gradient"),
        (["moco.negatives=bank"], "moco.negatives=bank needs moco.keys=gradient"),
        ([*SIMCLR, "encoder.predictor=true"], "encoder.predictor=true needs keys that have none"),
        ([*BANK, "moco.symmetric=true"], "needs two views of an image"),
        ([*BANK, "moco.bank_momentum=1"], "moco.bank_momentum=1.0 is out of range"),
        (["encoder.halves=lab"], "which moco.negatives=queue has not; use moco.negatives=bank"),
        ([*SIMCLR, "encoder.halves=lab"], "which moco.negatives=batch has not"),
        ([*BANK, "encoder.halves=lab"], "views.grayscale=0.2 takes from a view; use"),
        ([*CMC, "encoder.width=9"], "not encoder.channels=3 encoder.width=9; use .*width=10"),
        ([*CMC, "encoder.channels=1"], "not encoder.channels=1 .* use encoder.channels=3"),
        ([*CMC, "encoder.predictor=true"], "encoder.predictor=true needs keys that have none"),
    ],
)
def test_what_cannot_be_combined_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load(PretrainConfig, words)


def test_health_names_only_what_a_mechanism_has() -> None:
    for kind, words in KINDS.items():
        trainer = build(*words)
        hooks = RunHooks(trainer)
        trainer.train_step(hooks)
        assert not any(name.startswith("queue/") for name in hooks.health), kind
        assert ("health/ema_distance" in hooks.health) == (kind == "v3")
        assert {"health/alignment", "health/rankme", "health/uniformity"} <= hooks.health.keys()
        assert trainer.config.moco.candidates(16, 90) == {
            "simclr": 31,
            "bank": 51,
            "cmc": 51,
        }.get(kind, 16)
