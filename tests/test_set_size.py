"""Advice that depends on the number of training images."""

from __future__ import annotations

from pathlib import Path

import pytest

from moco_dist.config.moco import SHARE
from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.doctor import checks
from moco_dist.method.plan import Plan
from moco_dist.pretrain.set_size import few_images
from tests.faults.jobs import TINY, Job


@pytest.mark.parametrize(
    ("images", "batch", "queue"),
    [
        (10_000, 256, 2048),
        (60_000, 256, 16_384),
        (1_281_167, 256, 65_536),
        (500, 64, 128),
        (500, 256, 256),
        (3, 2, 2),
    ],
)
def test_a_queue_fits_the_images_and_holds_a_step(images: int, batch: int, queue: int) -> None:
    config = load(PretrainConfig, [f"batch_size={batch}", "bn_groups=1", "moco.queue_size=99999"])
    assert config.moco.fitting_queue(batch, images) == queue
    sentence = config.moco.too_long(batch, images)
    assert (sentence == "") == (images > 99999)
    assert not sentence or sentence.endswith(f"; use moco.queue_size={queue} or so")
    symmetric = load(
        PretrainConfig,
        [f"batch_size={batch}", "bn_groups=1", "moco.queue_size=99999", "moco.symmetric=true"],
    )
    assert symmetric.moco.fitting_queue(batch, images) == max(queue, 2 * batch)


@pytest.mark.parametrize("batch", [96, 512])
def test_a_queue_that_holds_a_step_and_not_the_images_is_never_advised(batch: int) -> None:
    config = load(PretrainConfig, [f"batch_size={batch}", "moco.queue_size=4096"])
    assert config.moco.too_long(batch, 90).endswith("(masked); lower it and batch_size")


@pytest.mark.parametrize(("share", "expected"), [(SHARE, 1 / 32), (1.0, 1 / 2)])
def test_the_share_of_own_keys_is_the_one_that_is_stated(share: float, expected: float) -> None:
    """Counted in the orders of a run's own epochs."""
    images, batch, epochs = 3200, 32, 12
    plan = Plan(images, batch, 0, 0, 1)
    order = [plan.step(step, 1).samples.tolist() for step in range(epochs * images // batch)]
    keys, met, seen = list[int](), 0, 0
    for number, samples in enumerate(order):
        if number >= images // batch:
            queue = set(keys[-int(share * images) :])
            met += sum(sample in queue for sample in samples)
            seen += batch
        keys += samples
    assert met / seen == pytest.approx(expected, rel=0.1)


def test_few_images_are_told_what_to_expect(tmp_path: Path) -> None:
    config = load(PretrainConfig, ["batch_size=64"])
    assert few_images(config, 1000) == ""
    assert few_images(config, 999).startswith("999 training images are few: with 15 steps an epoch")
    assert few_images(config, 64).startswith(
        "64 training images are few: with 1 step an epoch, giv"
    )
    assert few_images(config, 999) in {finding.found for finding in checks.batch(config, 999)}
    with Job(tmp_path, *TINY, "stop_at_step=1") as job:
        assert job.wait(60) == [0], job.text()
    text = " ".join(job.text().split())
    assert "expect 45 training images are few: with 5 steps an epoch" in text
