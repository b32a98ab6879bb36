"""The presets of the mechanisms hold what is published."""

from __future__ import annotations

from pathlib import Path

import pytest

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load

PRESETS = Path(__file__).parent.parent / "configs/pretrain"


@pytest.mark.parametrize(
    ("name", "negatives", "candidates", "optimizer"),
    [
        ("simclr_cifar10", "batch", 1023, "sgd"),
        ("simclr_imagenet", "batch", 8191, "lars"),
        ("instdis_cifar10", "bank", 50_000, "sgd"),
        ("mocov3_cifar10", "batch", 256, "lars"),
        ("mocov3_imagenet", "batch", 4096, "lars"),
        ("mocov3_vit_small", "batch", 4096, "adamw"),
        ("mocov3_vit_base", "batch", 4096, "adamw"),
        ("aidendurrant", "queue", 65_537, "sgd"),
    ],
)
def test_a_preset_compares_with_as_many_as_published(
    name: str, negatives: str, candidates: int, optimizer: str
) -> None:
    config = load(PretrainConfig, [str(PRESETS / f"{name}.yaml")])
    assert config.moco.negatives == negatives
    assert config.moco.candidates(config.batch_size, 50_000) == candidates
    assert config.optim.name == optimizer
    assert not config.moco.unused


@pytest.mark.parametrize(("draws", "words"), [(0, "89 of a"), (4096, "4,096 draws from a")])
def test_a_bank_may_be_smaller_than_its_draws(draws: int, words: str) -> None:
    keys = ["moco.negatives=bank", "moco.keys=gradient", f"moco.bank_draws={draws}"]
    described = load(PretrainConfig, keys).moco.described(64, 90)
    assert described == f"{words} bank's 90 vectors, one for each image"


def test_keys_without_effect_are_named() -> None:
    words = ["moco.negatives=batch", "moco.keys=gradient", "moco.queue_size=900"]
    assert load(PretrainConfig, words).moco.unused == ["moco.queue_size=900"]
