"""A model with a parameter that no feature depends on trains alike on any machine, and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from moco_dist import notebook
from moco_dist.config.probe import ProbeConfig
from moco_dist.config.yaml_files import load
from moco_dist.runs import checkpoint
from tests import processes
from tests.test_one_run_any_machine import assert_same, train

VIT = ["encoder.backbone=timm/idle_vit", "encoder.stem=imagenet", "encoder.width=64"]
IDLE = "backbone.mask_token"


class IdleVisionTransformer(VisionTransformer):
    """A Vision Transformer with the mask of a pretraining that it doesn't have."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.mask_token = nn.Parameter(torch.full((1, 1, self.embed_dim), 0.5))


@register_model
def idle_vit(pretrained: bool = False, **options: Any) -> nn.Module:
    own = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    known = ("num_classes", "in_chans", "dynamic_img_size")
    return IdleVisionTransformer(**own, **{k: v for k, v in options.items() if k in known})


def run(folder: Path, world_size: int, *overrides: str, until: int = 5) -> dict[str, Any]:
    given = (str(folder), [*VIT, *overrides], until)
    account: dict[str, Any] = processes.run(of_idle, world_size, *given)[0]
    return account


def of_idle(folder: str, overrides: list[str], until: int) -> dict[str, Any]:
    """Train in another process, which has the model since it imports this file."""
    return train(folder, overrides, until)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, 1)


def test_a_pretraining_goes_on_on_two_processes_as_on_one(
    pretrained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, whole = pretrained
    assert (whole["state"][f"query_encoder.{IDLE}"] == 0.5).all()
    run(tmp_path, 1, until=3)
    assert_same(run(tmp_path, 2), whole)


def test_a_fine_tuning_resumes(pretrained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    small = ["data.size=16", "data.shapes_train=40", "data.shapes_test=20", "views.size=16"]
    small += [f"output={tmp_path}", f"encoder={pretrained[0]}/pretrain", "runtime.device=cpu"]
    small += ["protocol=finetune", "batch_size=16", "epochs=1", "control=false", "augment=false"]
    for name, stops in (("whole", [0]), ("resumed", [1, 0])):
        for stop in stops:
            arguments = [*small, f"name={name}", f"stop_at_step={stop}"]
            notebook.run_probe(load(ProbeConfig, arguments))
    whole, resumed = (checkpoint.newest(tmp_path / name) for name in ("whole", "resumed"))
    assert whole is not None
    assert resumed is not None
    assert whole.model.keys() == resumed.model.keys()
    for name, tensor in whole.model.items():
        assert tensor.equal(resumed.model[name]), name
