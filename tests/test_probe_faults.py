"""Faults that make a probe lie, each planted on purpose, are caught with a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from moco_dist.config.encoder import EncoderConfig
from moco_dist.config.probe import ProbeConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.data.shapes import CLASSES
from moco_dist.encoders.load import checkpoint_of, find
from moco_dist.encoders.state_dict import require_trained
from moco_dist.errors import ConfigError, DataError, NumbersError, UserError
from moco_dist.method.encoder import build_encoder
from moco_dist.probe import overlap
from moco_dist.probe.label_fraction import draw, require_classes
from moco_dist.probe.results import measure
from moco_dist.probe.run import find_overlaps
from moco_dist.runs import saving
from tests.probes import prepared, pretrained, results, run, tinted

__all__ = ["pretrained"]

# Enough images to tell a few points from chance.
MANY = ["augment=false", "batch_size=150"]
TINY = EncoderConfig(width=4)


@pytest.fixture(scope="module")
def many() -> datasets.Splits:
    return tinted(1350, 600, 600)


def tensors(pretrained: Path) -> dict[str, Tensor]:
    """Return the state dict of the pretrained backbone."""
    state: dict[str, Tensor] = find(pretrained).backbone.state_dict()
    return state


def measured(encoder: Path, output: Path, splits: datasets.Splits) -> dict[str, Any]:
    """Return the results of a whole probe."""
    trial = prepared(encoder, output, *MANY, "epochs=20", "optim.lr=0.3", splits=splits)
    while trial.step < trial.total_steps:
        trial.train_step()
        if trial.step % trial.steps_per_epoch == 0:
            trial.note_best()
    return measure(trial, [])


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        find(path)
    return str(error.value)


def test_missing_and_renamed_tensors_of_a_run_are_named(pretrained: Path, tmp_path: Path) -> None:
    found = checkpoint_of(pretrained)
    model = dict(found.model)
    model["query_encoder.backbone.layer3.norm"] = model.pop(
        "query_encoder.backbone.layer3.0.bn1.bias"
    )
    del model["query_encoder.backbone.layer1.0.conv1.weight"]
    path = saving.write(tmp_path, 5, model, found.optimizer, found.state)
    message = refusal(path)
    for fault in (
        "backbone.layer1.0.conv1.weight is missing",
        "backbone.layer3.0.bn1.bias is missing",
        "backbone.layer3.norm is not expected",
    ):
        assert fault in message
    assert message.startswith(f"{path}: holds another architecture than its configuration says")


def test_missing_and_renamed_tensors_of_a_file_are_named(pretrained: Path, tmp_path: Path) -> None:
    good = tensors(pretrained)
    path = tmp_path / "encoder.safetensors"
    save_file({k: v for k, v in good.items() if k != "layer2.0.bn2.weight"}, path)
    assert "layer2.0.bn2.weight is missing" in refusal(path)
    save_file({**good, "layer2.0.bn9.weight": torch.ones(3)}, path)
    assert "layer2.0.bn9.weight is not expected" in refusal(path)
    save_file({f"net.{k}": v for k, v in good.items()}, path)
    message = refusal(path)
    assert "has no conv1.weight as a torchvision ResNet has, it holds net." in message
    assert "take 'net.' from its names: nothing is renamed here" in message
    save_file({k: v for k, v in good.items() if not k.startswith("layer1.1.")}, path)
    assert "layer1.1.conv1.weight is missing; layer1.1.bn1.weight is missing" in refusal(path)
    save_file({**good, "conv1.weight": torch.ones(4, 3, 5, 5)}, path)
    assert "its first convolution is (4, 3, 5, 5), and its other tensors are" in refusal(path)


def test_a_backbone_without_batchnorm_is_told_from_a_random_one() -> None:
    pytest.importorskip("timm")
    config = EncoderConfig(backbone="timm/test_vit", stem="imagenet")
    backbone = build_encoder(config, seed=5).backbone
    with pytest.raises(DataError, match=r"normalisation layers .* are 1 and the biases 0"):
        require_trained(backbone, "it")
    nn.init.constant_(backbone.get_parameter("blocks.0.norm1.bias"), 1e-6)
    require_trained(backbone, "it")
    require_trained(nn.Conv2d(3, 3, 1), "what has no such layers")


def test_an_encoder_without_training_is_no_trained_one(pretrained: Path, tmp_path: Path) -> None:
    path = tmp_path / "encoder.safetensors"
    save_file(build_encoder(TINY, seed=5).backbone.state_dict(), path)
    assert refusal(path).startswith(
        f"{path}: is a random encoder and no trained one: the weights of all its 20 normalisation "
        "layers (bn1.weight and so on) are 1 and the biases 0, as before the first step"
    )
    found = checkpoint_of(pretrained)
    first = saving.write(tmp_path, 0, found.model, found.optimizer, found.state)
    assert "is the state before the first step, a random encoder" in refusal(first)
    broken = tensors(pretrained) | {"bn1.bias": torch.full((4,), torch.nan)}
    save_file(broken, path)
    assert refusal(path) == f"{path}: bn1.bias is not finite; use another checkpoint"


def test_a_random_encoder_passed_off_as_trained_is_not_better_than_the_control(
    tmp_path: Path, many: datasets.Splits
) -> None:
    """Its BatchNorm has been changed in disguise, so that only the figures can tell."""
    path = tmp_path / "encoder.safetensors"
    random = build_encoder(TINY, seed=5).backbone
    with torch.no_grad():
        for name, parameter in random.named_parameters():
            if "bn" in name:
                parameter.add_(1e-4)
    save_file(random.state_dict(), path)
    verdict = measured(path, tmp_path, many)["verdict"]
    assert verdict.startswith(
        "The trained encoder is NOT better than a random one by more than the intervals: test "
    )
    assert "it may itself be random" in verdict


@pytest.mark.parametrize("arguments", [["augment=true"], ["protocol=finetune", "augment=false"]])
def test_batchnorm_in_training_mode_is_named(
    pretrained: Path, tmp_path: Path, arguments: list[str]
) -> None:
    trial = prepared(pretrained, tmp_path, *arguments, "optim.lr=0.1")
    trial.train_step()
    trial.backbones["probe"].get_submodule("layer2.0.bn1").train()
    with pytest.raises(UserError, match=r"^the probe encoder's layer2\.0\.bn1 is in training mode"):
        trial.train_step()


@pytest.mark.parametrize("plain", [True, False])
def test_batchnorm_that_was_in_training_mode_meanwhile_is_named(
    pretrained: Path, tmp_path: Path, plain: bool
) -> None:
    trial = prepared(pretrained, tmp_path)
    norm = trial.backbones["control"].get_submodule("layer1.0.bn1")
    norm.train()
    kept = norm.__class__
    if plain:  # PyTorch's own layer updates its running statistics at once
        norm.__class__ = nn.BatchNorm2d
    trial.backbones["control"](torch.rand(16, 3, 16, 16).double())
    norm.__class__ = kept
    norm.eval()
    which = "running_mean" if plain else "group_mean"
    with pytest.raises(UserError, match=rf"^the control encoder's layer1\.0\.bn1\.{which} changed"):
        trial.save(wait=True)


def save_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a file of tensors in any memory format."""
    safetensors.save_file({name: each.contiguous() for name, each in tensors.items()}, path)


def shuffled(images: datasets.AnyImages, seed: int) -> datasets.AnyImages:
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return dataclasses.replace(images, labels=images.labels[order])


def test_shuffled_labels_are_told_from_a_bad_encoder(
    pretrained: Path, tmp_path: Path, many: datasets.Splits
) -> None:
    fault = dataclasses.replace(
        many, train=shuffled(many.train, 1), validation=shuffled(many.validation, 2)
    )
    content = measured(pretrained, tmp_path, fault)
    assert content["verdict"].startswith("Nothing was learned: test top-1 is ")
    assert "check that the labels belong to the images (shuffled?)" in content["verdict"]
    # The heads memorise what they can.
    assert content["encoders"]["probe"]["train_top1"] > 0.12


def test_shuffled_test_labels_are_told_by_the_validation_images(
    pretrained: Path, tmp_path: Path, many: datasets.Splits
) -> None:
    fault = dataclasses.replace(many, validation=many.train, test=shuffled(many.test, 3))
    (sentence,) = measured(pretrained, tmp_path, fault)["faults"]
    assert sentence.endswith("the test labels don't belong to the test images.")


def test_test_images_among_the_training_images_are_counted_and_named(
    pretrained: Path, tmp_path: Path, many: datasets.Splits
) -> None:
    train, test = many.train, many.test
    assert isinstance(train, datasets.Images)
    assert isinstance(test, datasets.Images)
    pixels = train.pixels.clone()
    pixels[[7, 40, 900]] = test.pixels[[3, 3, 55]]
    fault = dataclasses.replace(many, train=dataclasses.replace(train, pixels=pixels))
    found = {each.part: each for each in find_overlaps(fault)}
    assert found["test"].pairs == [(3, 7), (55, 900)]
    assert found["validation"].sentence() == ""
    sentence = found["test"].sentence()
    assert sentence.startswith(
        "2 of 600 test images are also training images, to the last pixel (test 3 = training 7, "
        "55 = training 900), which inflates test accuracy"
    )
    trial = prepared(pretrained, tmp_path, *MANY, splits=fault)
    content = measure(trial, list(found.values()))
    assert sentence in content["faults"]
    assert content["overlap"]["test"] == {
        "images": 2,
        "pairs": [(3, 7), (55, 900)],
        "files": [],
    }
    pixels[41] = pixels[42]
    one = dataclasses.replace(train, pixels=pixels)
    assert overlap.find(train, one[torch.tensor([1])], "test").pairs == [(0, 1)]


def test_a_class_without_images_is_named(many: datasets.Splits) -> None:
    train = many.train
    assert isinstance(train, datasets.Images)
    ghost = dataclasses.replace(train, classes=(*train.classes, "ghost"))
    with pytest.raises(DataError) as error:
        require_classes(ghost)
    assert str(error.value).startswith(
        f"1 of the {len(CLASSES) + 1} classes have no training images: 'ghost'; "
    )
    without = train[(train.labels != 4).nonzero().flatten()]
    with pytest.raises(DataError, match=f"no training images: '{CLASSES[4]}'"):
        require_classes(without)
    beyond = dataclasses.replace(train, labels=train.labels + 1)
    with pytest.raises(DataError, match="labels up to 10, but there are 10 classes"):
        require_classes(beyond)
    require_classes(train)


def test_a_class_that_the_label_fraction_can_not_fill_is_named(many: datasets.Splits) -> None:
    train = many.train
    kept = torch.ones(len(train), dtype=torch.bool)
    kept[(train.labels == 2).nonzero().flatten()[3:]] = False
    few = train[kept.nonzero().flatten()]
    with pytest.raises(DataError, match=f"class '{CLASSES[2]}' has 3 training images; use "):
        draw(few, 0.1, seed=0)
    with pytest.raises(ConfigError, match=r"=0\.0001 of 1350 images is less than one for each of"):
        draw(train, 0.0001, seed=0)


def test_what_can_not_be_chosen_fairly_is_refused(pretrained: Path, tmp_path: Path) -> None:
    def message(*arguments: str) -> str:
        with pytest.raises(ConfigError) as error:
            load(ProbeConfig, list(arguments))
        return str(error.value)

    assert message("grid.lr=[1,2]", "data.validation=0").startswith(
        "data.validation=0 leaves no images for choosing from the grid, and the test images "
        "must not be used for that"
    )
    assert "protocol=finetune trains one" in message("protocol=finetune", "seeds=2")
    assert "grid.lr=[1.0, 0.0] has a rate that is not above 0" in message("grid.lr=[1,0]")
    assert message("label_fraction=1.5").startswith("label_fraction=1.5 is out of range")
    fault = ["data.validation=0", "data.name=folder"]
    assert load(ProbeConfig, [*fault, "grid.lr=[2]"]).grid.lr == [2.0]
    # A share of 150 images that is none of them.
    none = ["augment=false", "data.validation=0.003"]
    for choice in ("grid.lr=[0.1,1]", "grid.around=[1,2]", "grid.weight_decay=[0,1]"):
        with pytest.raises(DataError) as error:
            run(pretrained, tmp_path, *none, choice)
        assert str(error.value) == (
            "data.validation=0.003 holds none of 150 out, so no images can choose among the 2 "
            "settings of the grid; give data.validation=0.1"
        )
    assert set(run(pretrained, tmp_path, *none, "grid.lr=[1]")["probe"]) == {"test"}


def test_a_bad_step_that_is_found_later_has_changed_nothing(
    pretrained: Path, tmp_path: Path
) -> None:
    arguments = ["grid.lr=[0.1,1]", "grid.weight_decay=[0,0.01]", "augment=false", "epochs=9"]
    at_once, late = (prepared(pretrained, tmp_path / name, *arguments) for name in ("a", "b"))
    late.settles = True  # as on a GPU
    bad, errors = 7, []
    for trial in (at_once, late):
        while trial.step < bad:
            trial.train_step()
        later = trial.plans[0].step(bad, key_views=0).samples[0]
        trial.features["train"][1, later] = torch.nan
    good = {name: tensor.clone() for name, tensor in at_once.tensors()[0].items()}
    with pytest.raises(NumbersError) as error:
        at_once.train_step()
    errors.append(error.value)
    for _ in range(3):
        late.train_step()
    with pytest.raises(NumbersError) as error:
        late.settle()
    errors.append(error.value)
    assert str(errors[0]) == str(errors[1])
    assert f"not finite in step {bad} (control with lr 0.1 " in str(errors[0])
    assert errors[0].details == errors[1].details
    assert at_once.step == late.step == bad
    for ours, theirs in zip(at_once.tensors(), late.tensors(), strict=True):
        for name, tensor in ours.items():
            assert tensor.equal(theirs[name]), name
            assert tensor.equal(good.get(name, tensor)), name
    late.save(wait=True)  # what a run does next


def test_a_grid_point_that_diverges_ends_the_run_by_name(pretrained: Path, tmp_path: Path) -> None:
    # A step multiplies the weights by 1 - 10 x 10, with momentum.
    arguments = ["grid.lr=[0.1,10]", "optim.weight_decay=10", "epochs=200", "augment=false"]
    with pytest.raises(UserError) as error:
        run(pretrained, tmp_path, *arguments, "checkpoint.every_epochs=0")
    assert "not finite in step " in str(error.value)
    assert "with lr 10 and weight decay 10); the step was discarded" in str(error.value)
    assert not (tmp_path / "tiny-probe" / "DONE").exists()
    with pytest.raises(FileNotFoundError):
        results(tmp_path / "tiny-probe")
