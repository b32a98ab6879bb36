"""The method's arithmetic, against formulas written another way."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from moco_dist.config.encoder import EncoderConfig
from moco_dist.config.moco import MocoConfig
from moco_dist.config.optim import OptimConfig
from moco_dist.method import loss as method_loss
from moco_dist.method import moco, schedule
from moco_dist.method.encoder import build_encoder


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def info_nce_by_hand(
    q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, temperature: float, owners: torch.Tensor
) -> float:
    """Equation 1 of the paper with Python's own sums."""
    losses = []
    for i in range(len(q)):
        positive = (
            sum(a * b for a, b in zip(q[i].tolist(), k[i].tolist(), strict=True)) / temperature
        )
        others = [
            sum(a * b for a, b in zip(q[i].tolist(), queue[j].tolist(), strict=True)) / temperature
            for j in range(len(queue))
            if owners[j] != i
        ]
        losses.append(-math.log(math.exp(positive) / math.fsum(map(math.exp, [positive, *others]))))
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("negatives", [0, 1, 13])
@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_info_nce_is_the_papers_formula(negatives: int, temperature: float) -> None:
    q, k, queue = unit(6, 8, 1), unit(6, 8, 2), unit(max(negatives, 1), 8, 3)[:negatives]
    owners = torch.randint(-1, 6, (negatives,), generator=torch.Generator().manual_seed(4))
    loss, logits = method_loss.info_nce(q, k, queue, temperature, owners)
    assert abs(float(loss) - info_nce_by_hand(q, k, queue, temperature, owners)) < 1e-12
    assert logits.shape == (6, 1 + negatives)
    unmasked, _ = method_loss.info_nce(q, k, queue, temperature)
    nothing = torch.full_like(owners, -1)
    assert abs(float(unmasked) - info_nce_by_hand(q, k, queue, temperature, nothing)) < 1e-12


def test_only_queries_get_a_gradient_and_it_is_finite_with_an_empty_queue() -> None:
    q = unit(4, 8, 1).requires_grad_()
    for negatives in (0, 5):
        q.grad = None
        loss, _ = method_loss.info_nce(q, unit(4, 8, 2), unit(5, 8, 3)[:negatives], 0.1)
        loss.backward()
        assert q.grad is not None
        assert q.grad.isfinite().all()


def test_the_gradient_of_the_queries_is_that_of_differences() -> None:
    k, queue, owners = unit(4, 8, 2), unit(13, 8, 3), torch.arange(13) % 5 - 1

    def loss(q: torch.Tensor) -> torch.Tensor:
        return method_loss.info_nce(q, k, queue, 0.1, owners)[0]

    assert torch.autograd.gradcheck(loss, unit(4, 8, 1).requires_grad_())


def small() -> moco.MoCo:
    return moco.MoCo(build_encoder(EncoderConfig(width=4, dim=8), seed=0), 16, 8).double()


def test_the_key_encoder_starts_as_a_copy_without_gradients() -> None:
    network = small()
    for key, query in zip(
        network.key_encoder.state_dict().items(),
        network.query_encoder.state_dict().items(),
        strict=True,
    ):
        assert key[0] == query[0]
        assert key[1].equal(query[1])
        assert key[1].data_ptr() != query[1].data_ptr()
    assert not any(p.requires_grad for p in network.key_encoder.parameters())
    assert all(p.requires_grad for p in network.query_encoder.parameters())


def test_momentum_update_is_the_closed_form() -> None:
    network, momentum = small(), 0.9
    start = [p.clone() for p in network.key_encoder.parameters()]
    history = []
    for step in range(5):
        with torch.no_grad():
            for number, p in enumerate(network.query_encoder.parameters()):
                p.add_(
                    torch.randn(
                        p.shape, generator=torch.Generator().manual_seed(100 * step + number)
                    )
                )
        history.append([p.detach().clone() for p in network.query_encoder.parameters()])
        network.update_key_encoder(momentum)
    for number, key in enumerate(network.key_encoder.parameters()):
        expected = momentum**5 * start[number]
        for step in range(5):
            expected = expected + (1 - momentum) * momentum ** (4 - step) * history[step][number]
        torch.testing.assert_close(key.detach(), expected, rtol=0, atol=1e-12)


def test_updating_after_the_step_is_updating_before_the_next_forward() -> None:
    # The reference updates at the top of the forward pass; the readable order gives the same keys.
    after, before = small(), small()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    for network, early in ((after, False), (before, True)):
        keys = []
        optimizer = torch.optim.SGD(network.query_encoder.parameters(), lr=0.1)
        network.eval()
        for _ in range(4):
            if early:
                network.update_key_encoder(0.5)
            keys.append(network.key_encoder(x))
            loss = (network.query_encoder(x) - 1).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not early:
                network.update_key_encoder(0.5)
        network.kept = torch.stack(keys)
    torch.testing.assert_close(after.kept, before.kept, rtol=0, atol=1e-13)


def test_cosine_rate_runs_from_the_full_rate_to_nothing() -> None:
    optim = OptimConfig(lr=0.6, schedule="cosine")
    rates = [schedule.learning_rate(optim, step, 10, 100) for step in range(101)]
    assert rates[0] == 0.6
    assert rates[50] == pytest.approx(0.3)
    assert rates[100] == pytest.approx(0)
    assert all(a > b for a, b in itertools.pairwise(rates))
    assert rates[25] == pytest.approx(0.6 * math.cos(math.pi / 8) ** 2)  # the half-angle form


def test_step_rate_falls_at_its_milestones_and_warmup_climbs() -> None:
    optim = OptimConfig(lr=30, schedule="step", milestones=[6, 8])
    rates = [schedule.learning_rate(optim, step, 10, 100) for step in (0, 59, 60, 79, 80, 99)]
    assert rates == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    warm = OptimConfig(lr=1.0, schedule="constant", warmup_epochs=2)
    rates = [schedule.learning_rate(warm, step, 2, 100) for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_key_momentum_is_constant_or_ends_at_one() -> None:
    assert schedule.key_momentum(MocoConfig(momentum=0.99), 70, 100) == 0.99
    rising = MocoConfig(momentum=0.99, momentum_schedule="cosine")
    momenta = [schedule.key_momentum(rising, step, 100) for step in (0, 50, 100)]
    assert momenta == pytest.approx([0.99, 0.995, 1])
