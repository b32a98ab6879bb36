"""A BatchNorm group that lies on several processes is one BatchNorm over all of its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_dist.config.encoder import EncoderConfig
from moco_dist.distributed import comms
from moco_dist.errors import ConfigError
from moco_dist.method import batch_norm
from moco_dist.method.batch_norm import GroupedBatchNorm
from moco_dist.method.encoder import build_encoder
from moco_dist.method.plan import group_share
from tests import processes
from tests.test_trainer import build

CHANNELS = 5


def drawn(*size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 + 2 * torch.randn(*size, dtype=torch.float64, generator=generator)


def norm_of(module: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Return the module in float64, with weights that are not those of a new one."""
    module.double()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = drawn(CHANNELS, seed=seed)
    return module


def mine(whole: Tensor) -> Tensor:
    part = whole.chunk(comms.world_size())[comms.rank()]
    return part.contiguous(memory_format=torch.channels_last)


def passes(batch: int, groups: int) -> dict[str, Any]:
    """Return what a layer makes of this process's rows in a pass with gradients and one without."""
    share = group_share(batch, groups, comms.world_size())
    norm = norm_of(GroupedBatchNorm(CHANNELS, *share))
    x, dy = (mine(drawn(batch, CHANNELS, 3, 2, seed=seed)) for seed in (10, 11))
    y = norm(x.requires_grad_())
    y.backward(dy)
    with torch.no_grad():
        key = norm(mine(drawn(batch, CHANNELS, 3, 2, seed=12)))
    assert x.grad is not None
    found = {"y": y, "key": key, "dx": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    statistics = batch_norm.group_statistics(norm)
    norm.eval()
    batch_norm.average_statistics(norm)
    with torch.no_grad():
        found["evaluated"] = norm(x)
    return {k: v.detach() for k, v in (found | statistics).items() if v is not None}


@pytest.mark.parametrize(("groups", "worlds"), [(1, (2, 4, 8)), (2, (4, 8))])
def test_a_group_on_several_processes_is_one_batch_norm_over_all_of_its_rows(
    groups: int, worlds: tuple[int, ...]
) -> None:
    batch = 8
    norm = norm_of(nn.BatchNorm2d(CHANNELS))
    x, dy, others = (drawn(batch, CHANNELS, 3, 2, seed=seed) for seed in (10, 11, 12))
    x.requires_grad_()
    means, variances = torch.zeros(groups, CHANNELS).double(), torch.ones(groups, CHANNELS).double()

    def normalized(whole: Tensor) -> Tensor:
        parts = zip(whole.chunk(groups), means, variances, strict=True)
        return torch.cat([F.batch_norm(a, b, c, norm.weight, norm.bias, True) for a, b, c in parts])

    y = normalized(x)
    y.backward(dy)
    expected = {"y": y, "key": normalized(others), "dx": x.grad}
    affine = norm.weight, norm.bias
    expected["evaluated"] = F.batch_norm(x, means.mean(0), variances.mean(0), *affine)
    for world in worlds:
        accounts = processes.run(passes, world, batch, groups)
        for name, whole in expected.items():
            found = torch.cat([account[name] for account in accounts])
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-12)
        for name, parameter in (("weight", norm.weight), ("bias", norm.bias)):
            total = sum(account[name] for account in accounts)
            torch.testing.assert_close(total, parameter.grad, rtol=0, atol=1e-12)
        for account in accounts:  # every process has those of all groups
            statistics = account["0.group_mean"], account["0.group_var"]
            torch.testing.assert_close(statistics, (means, variances), rtol=0, atol=1e-12)
            assert statistics[0].equal(accounts[0]["0.group_mean"])


def refusal(*more: str) -> tuple[str, int]:
    """Return what a run that can't begin says, and its exit status."""
    with pytest.raises(ConfigError) as error:
        build("bn_groups=1", *more)
    return str(error.value), error.value.exit_status


@pytest.mark.parametrize("setting", ["runtime.compile=true", "runtime.micro_batches=2"])
def test_what_can_not_be_done_with_such_groups_is_refused_at_the_start(setting: str) -> None:
    for sentence, status in processes.run(refusal, 2, setting):
        assert sentence.startswith(f"{setting} can't ")
        assert "2 processes share each group of bn_groups=1; use " in sentence
        assert status == 78


def restored(statistics: dict[str, Tensor], groups: int) -> tuple[Any, ...]:
    """Return the statistics' shapes, this process's own, and all, once they are restored."""
    share = group_share(16, groups, comms.world_size())
    encoder = build_encoder(EncoderConfig(width=2, dim=4), 0, *share).double()
    batch_norm.restore_group_statistics(encoder, statistics)
    own = batch_norm.batch_norms(encoder)[3].group_var
    shapes = batch_norm.statistics_shapes(encoder, groups)
    return shapes, own, batch_norm.group_statistics(encoder)


@pytest.mark.parametrize(("groups", "world"), [(2, 1), (2, 4), (1, 2), (4, 2)])
def test_statistics_go_to_the_processes_of_their_group_and_back(groups: int, world: int) -> None:
    encoder = build_encoder(EncoderConfig(width=2, dim=4), 0, 8, groups).double()
    for seed, norm in enumerate(batch_norm.batch_norms(encoder)):
        norm.group_mean.copy_(drawn(*norm.group_mean.shape, seed=seed))
        norm.group_var.copy_(drawn(*norm.group_var.shape, seed=100 + seed))
    statistics = batch_norm.group_statistics(encoder)
    for rank, (shapes, own, again) in enumerate(processes.run(restored, world, statistics, groups)):
        assert shapes == {name: each.shape for name, each in statistics.items()}
        assert again.keys() == statistics.keys()
        assert all(again[name].equal(statistics[name]) for name in again)
        first = rank * groups // world
        assert own.equal(statistics["3.group_var"][first : first + max(1, groups // world)])
