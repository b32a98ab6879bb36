"""The second view of an image may have a recipe of its own, as in BYOL and MoCo v3."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from moco_dist.config.recipe import PretrainConfig, ViewsConfig
from moco_dist.config.yaml_files import changed_keys, from_dict, load, to_dict, to_yaml
from moco_dist.data.datasets import Images
from moco_dist.data.view_source import Maker
from moco_dist.errors import ConfigError
from moco_dist.method import views
from moco_dist.report import encoder as report
from tests.test_one_run_any_machine import assert_same, distance, one
from tests.test_trainer import build
from tests.test_views import make_images

BYOL = ViewsConfig(size=24, blur=1.0, saturation=0.2)
SECOND = dataclasses.replace(BYOL, blur=0.1, solarize=0.2, scale_min=0.4)


def test_the_second_recipe_is_the_first_with_the_keys_that_are_given(tmp_path: Path) -> None:
    file = tmp_path / "byol.yaml"
    file.write_text("views_2: {blur: 0.1, solarize: 0.2}\nviews:\n  blur: 1.0\n")
    config = load(PretrainConfig, [str(file), "views.hue=0.2", "views.size=24"])
    expected = dataclasses.replace(config.views, blur=0.1, solarize=0.2)
    assert (config.views.blur, config.views.hue, config.views_2) == (1.0, 0.2, expected)
    assert config.view_recipes == [config.views, expected]
    words = ["views_2.solarize=0.2", "views_2={blur: 0.1}", "views.blur=1", "views.hue=0.2"]
    assert load(PretrainConfig, [*words, "views.size=24"]) == config
    # What a run keeps is the whole of it, and read back it is the same.
    assert from_dict(PretrainConfig, to_dict(config)) == config
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert load(PretrainConfig, [str(tmp_path / "run.yaml")]) == config
    # null takes it back, and is what a configuration has that says nothing.
    plain = load(PretrainConfig, [str(file), "views_2=null", "views.hue=0.2", "views.size=24"])
    assert plain == dataclasses.replace(config, views_2=None)
    assert plain.view_recipes == [plain.views]
    (tmp_path / "plain.yaml").write_text(to_yaml(plain))
    assert load(PretrainConfig, [str(tmp_path / "run.yaml"), str(tmp_path / "plain.yaml")]) == plain
    assert load(PretrainConfig, ["views_2=null", "views_2.blur=0.3"]).view_recipes[1].blur == 0.3


def test_a_run_is_resumed_with_the_same_second_recipe_alone() -> None:
    plain, config = load(PretrainConfig, []), load(PretrainConfig, ["views_2.blur=0.1"])
    old = to_dict(plain)
    assert changed_keys(old, plain) == changed_keys(to_dict(config), config) == []
    del old["views_2"]  # of a version that had none
    assert changed_keys(old, plain) == []
    assert "views_2.blur: None -> 0.1" in changed_keys(old, config)
    assert "views_2.blur: 0.1 -> None" in changed_keys(to_dict(config), plain)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            "views_2.blur=1 moco.negatives=bank moco.keys=gradient",
            "views_2 is for the second view of an image, and moco.negatives=bank has one",
        ),
        ("views_2.size=48", "views_2.size=48 is not views.size=32, which both views share"),
        ("views_2.mean=[0.5,0.5,0.5]", "is not views.mean=[0.4914, 0.4822, 0.4465], which"),
        ("views_2.blur=7", "views_2.blur=7.0 is out of range; it must lie between 0 and 1"),
        ("views_2=7", "views_2=7: views_2=7 is not a group of keys, or null"),
        ("views_2.blurr=1", "there is no key 'views_2.blurr'; did you mean 'views_2.blur'?"),
    ],
)
def test_a_second_recipe_that_can_not_be_is_one_sentence(words: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(PretrainConfig, words.split())
    assert sentence in str(error.value)


@pytest.mark.parametrize("order", [(0, 1), (1, 0, 0, 1), (1,), (0, 0)])
def test_views_of_a_batch_with_two_recipes_are_those_made_one_by_one(order: list[int]) -> None:
    maker = Maker([BYOL, SECOND], 3, torch.float64, cut=False)
    images = make_images(len(order) * 9, 24, 28)
    wanted = [(torch.arange(9) + 5 * place, view) for place, view in enumerate(order)]
    found = maker.of_step(images, wanted, 7)
    for (samples, view), part, made in zip(wanted, images.split(9), found, strict=True):
        recipe = (BYOL, SECOND)[view]
        alone = views.make(part, recipe, 3, 7, samples, view, torch.float64)
        torch.testing.assert_close(made, alone, rtol=0, atol=1e-12)
        other = views.make(part, (SECOND, BYOL)[view], 3, 7, samples, view, torch.float64)
        assert not torch.allclose(made, other)
    # One recipe for both is what it was: a single pass.
    once = Maker([BYOL], 3, torch.float64, cut=False).of_step(images, wanted, 7)
    twice = Maker([BYOL, BYOL], 3, torch.float64, cut=False).of_step(images, wanted, 7)
    torch.testing.assert_close(once, twice, rtol=0, atol=1e-12)


def test_queries_and_keys_of_a_step_have_their_recipes() -> None:
    trainer = build("views.blur=1", "views_2.blur=0", "views_2.solarize=1", "views_2.jitter=0")
    rows = trainer.plan.step(0)
    (keys,), (queries,) = (
        [piece() for piece in part[0]] for part in trainer.contrast.make_views(rows)
    )
    config = trainer.config
    samples = rows.samples[rows.query_rows], rows.samples[rows.key_rows[0]]
    for view, (made, mine) in enumerate(zip((queries, keys), samples, strict=True)):
        recipe = config.view_recipes[view]
        pixels = trainer.splits.train.squares(mine)
        expected = views.make(pixels, recipe, config.seed, rows.epoch, mine, view)
        torch.testing.assert_close(made, expected)
        pictured = trainer.views(mine, rows.epoch, view)
        torch.testing.assert_close(pictured, expected)


def test_a_run_with_two_recipes_is_one_run_on_any_machine(tmp_path: Path) -> None:
    recipe = ["views_2.solarize=0.5", "views_2.blur=0.1", "views_2.scale_min=0.5"]
    recipe += ["moco.symmetric=true"]
    straight = one(tmp_path / "one", 1, *recipe, until=12)
    assert_same(one(tmp_path / "two", 2, *recipe, "runtime.micro_batches=2", until=12), straight)
    plain = one(tmp_path / "plain", 1, "moco.symmetric=true", until=12)
    assert distance(plain["state"], straight["state"]) > 1e-3


def test_a_report_draws_both_recipes() -> None:
    white = Images(
        torch.full((4, 3, 32, 32), 255, dtype=torch.uint8), torch.zeros(4).long(), ("a",)
    )
    plain = ViewsConfig(jitter=0.0)
    first, second = report.pairs(white, [plain, dataclasses.replace(plain, solarize=1.0)])
    assert all(tile.pixels.min() >= 254 for tile in first)
    assert all(tile.pixels.max() <= 1 for tile in second)
