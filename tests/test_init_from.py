"""A pretraining starts with the weights that it is given, all of them, and says which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.errors import ConfigError, DataError, MissingError
from moco_dist.method import batch_norm
from moco_dist.pretrain import loop, run
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import session as runs_session

ARGUMENTS = [
    *("data.shapes_train=40", "data.shapes_test=10", "data.size=16", "views.size=16"),
    *("batch_size=8", "bn_groups=2", "moco.queue_size=8", "encoder.dim=8", "name=started"),
    *("encoder.stem=imagenet", "runtime.device=cpu"),
]


def started(output: Path, source: Path | str, *more: str, steps: int = 0) -> Trainer:
    start = [f"init_from={source}"] if source else []
    arguments = [*ARGUMENTS, f"output={output}", *start, *more]
    config = load(PretrainConfig, arguments)
    session = runs_session.start(config)
    trainer = run.build(config, session)
    if steps:
        while trainer.step < steps:
            trainer.train_step()
        loop.save(trainer, session, wait=True)
    session.close()
    return trainer


@pytest.fixture
def theirs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = torchvision.models.resnet18().state_dict()
    for name, tensor in tensors.items():
        if "running" in name or ("bn" in name and name.endswith("bias")):
            tensor.uniform_(1, 2)
    return tensors


@pytest.mark.parametrize("form", ["wrapped", "without counters"])
def test_the_backbone_is_the_files_and_the_head_is_new(
    tmp_path: Path, theirs: dict[str, torch.Tensor], form: str
) -> None:
    path, saved = tmp_path / "resnet.pth", theirs
    if form == "wrapped":
        torch.save({"state_dict": {f"module.{k}": v for k, v in saved.items()}}, path)
    else:
        saved = {k: v for k, v in theirs.items() if not k.endswith("num_batches_tracked")}
        torch.save(saved, path)
    trainer = started(tmp_path, path)
    for encoder in (trainer.moco.query_encoder, trainer.moco.key_encoder):
        batch_norm.average_statistics(encoder)  # what an evaluation before the first step does
        ours = encoder.backbone.state_dict()
        assert all(ours[k].equal(v) for k, v in saved.items() if not k.startswith("fc."))
    listed = json.loads((tmp_path / "started" / "init_from.json").read_text())
    assert listed["left"] == ["fc.bias", "fc.weight"]
    assert len(listed["taken"]) == len(saved) - 2


def test_what_does_not_fit_is_named(tmp_path: Path, theirs: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "resnet.pth"
    torch.save(theirs, path)
    own = "this run's encoder, resnet34, width 32, cifar stem"
    fix = "encoder.backbone=resnet18 encoder.width=64 encoder.stem=imagenet"
    other = ["encoder.stem=cifar", "encoder.backbone=resnet34", "encoder.width=32"]
    with pytest.raises(DataError, match=f": is not {own}; give {fix}, or an init_from= that fits$"):
        started(tmp_path, path, *other)
    with pytest.raises(DataError, match=r"; give encoder\.stem=imagenet, or an init_from="):
        started(tmp_path, path, "encoder.stem=cifar")
    del theirs["layer4.1.conv2.weight"]
    torch.save(theirs, path)
    with pytest.raises(DataError, match=r"layer4\.1\.conv2\.weight is missing"):
        started(tmp_path, path)
    with pytest.raises(MissingError, match="no such file or folder"):
        started(tmp_path, tmp_path / "none.pth")


def test_another_number_of_heads_is_named(tmp_path: Path) -> None:
    import timm

    model: Any = timm.create_model("test_vit", num_classes=0, img_size=16, patch_size=8)
    torch.nn.init.ones_(model.norm.bias)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    name, options = "encoder.backbone=timm/test_vit", "img_size=16,patch_size=8"
    transformer = [name, f"encoder.options=[{options}]"]
    first = started(tmp_path, tmp_path / "vit.pth", *transformer, "name=first", steps=1)
    more = [name, f"encoder.options=[{options},num_heads=4]"]
    with pytest.raises(DataError, match=rf"num_heads=4; give encoder.options=\[{options}\], or an"):
        started(tmp_path, tmp_path / "first", *more)
    second = started(tmp_path, tmp_path / "first", *transformer, "seed=5")
    ours, theirs = (each.moco.query_encoder.backbone.state_dict() for each in (second, first))
    assert all(ours[key].equal(value) for key, value in theirs.items())


def test_a_resumed_run_does_not_read_it_again_and_keeps_its_name(
    tmp_path: Path, theirs: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "resnet.pth"
    torch.save(theirs, path)
    trainer = started(tmp_path, path, steps=1)
    weight = trainer.moco.query_encoder.backbone.conv1.weight.detach().clone()
    path.unlink()
    again = started(tmp_path, path)
    assert again.step == 1
    assert again.moco.query_encoder.backbone.conv1.weight.equal(weight)
    with pytest.raises(ConfigError, match="init_from: /"):
        started(tmp_path, "")


def test_one_run_starts_from_another(tmp_path: Path) -> None:
    first = started(tmp_path, "", "name=first", steps=1)
    second = started(tmp_path, tmp_path / "first", "seed=5")
    before, after = (each.moco.query_encoder.state_dict() for each in (first, second))
    for name, tensor in before.items():
        assert after[name].equal(tensor) == name.startswith("backbone."), name
