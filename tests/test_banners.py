"""What commands print before they begin says one image, two images."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.doctor import run as doctor
from moco_dist.errors import ConfigError, FaultsError
from moco_dist.pretrain import run as pretrain
from moco_dist.probe import run as probe
from tests.probes import PRETRAIN, PROBE

NOUNS = "images|classes|groups|batches|epochs|steps|seeds|settings|encoders|threads|machines|keys"
WRONG = rf"(?<![\d.,])1 (?:[\w-]+ )?(?:[\w]+-)?(?:{NOUNS})\b|\((?:s|es)\)"


def test_nouns_agree_with_their_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 150 images without 15 for validation are a batch of 134 and one image.
    words = [*PRETRAIN, f"output={tmp_path}", "name=one", "bn_groups=1", "batch_size=134"]
    words += ["moco.queue_size=134", "epochs=1", "tracking.wandb=disabled", "knn.every_epochs=1"]
    words += ["optim.milestones=[9]"]
    pretrain.run(load(PretrainConfig, words))
    measure = [*PROBE, f"output={tmp_path}", "name=measure", f"encoder={tmp_path}/one", "epochs=1"]
    measure += ["augment=false", "control=false", "grid.around=[]", "tracking.wandb=disabled"]
    measure += ["optim.milestones=[9]"]
    probe.run(load(ProbeConfig, measure))
    doctor.examine(load(PretrainConfig, words))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    text = "\n".join(lines)
    for sentence in (
        *("1 an epoch (1 image left over, others each epoch), 1 in 1 epoch", "every 1 epoch"),
        *("134 = 1 x 134, 1 BatchNorm group of 134, 1 micro-batch", "full after 1 step;"),
        *("with 1 step an epoch", "1 encoder x 1 seed x 1 setting", "on 1 machine"),
        *("135 training and 15 validation images", "linear probe after 1 epoch"),
    ):
        assert sentence in text, text
    assert [line for line in lines if re.search(WRONG, line)] == []
    assert len(re.findall(r"no effect (?:warn )?optim.milestones=\[9\]\n", text)) == 3


def test_the_doctor_names_what_is_missing_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*PRETRAIN, f"output={tmp_path}", "data.name=folder", "tracking.wandb=disabled"]
    with pytest.raises(FaultsError) as raised:
        doctor.examine(load(PretrainConfig, words))
    assert "1. data: no such folder; give the folder of the images as data.root=DIR" in str(
        raised.value
    )
    with pytest.raises(FaultsError, match=r"1\. data: .*nowhere: no such folder"):
        doctor.examine(load(PretrainConfig, [*words, "data.root=nowhere"]))


def test_a_backbone_with_options_is_named_and_its_mistakes_are_found_before_the_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = [*PRETRAIN, f"output={tmp_path}", "name=vit", "tracking.wandb=disabled", "epochs=1"]
    words += ["encoder.backbone=timm/test_vit", "encoder.stem=imagenet", "encoder.width=64"]
    options = "encoder.options=[patch_size=8,depth=1]"
    for mistake, sentence in (
        ("encoder.options=[depht=1]", "depht=1: timm/test_vit has no option depht; did you mean d"),
        ("views.size=20", r"takes no views of 20 pixels \(Input height \(20\) should be divisible"),
    ):
        nowhere = [*words, mistake, "data.name=folder", f"data.root={tmp_path}/none"]
        with pytest.raises(ConfigError, match=sentence):
            pretrain.run(load(PretrainConfig, nowhere))
        with pytest.raises(FaultsError, match=sentence):
            doctor.examine(load(PretrainConfig, nowhere))
    pretrain.run(load(PretrainConfig, [*words, options, "encoder.positions=sincos"]))
    assert (
        "timm/test_vit with patch_size=8, depth=1, sincos positions, linear head to 8"
        in " ".join(capsys.readouterr().out.split())
    )
    assert (
        "made for 160 pixels, and interpolated for views of 16; encoder.options=[img_"
        in caplog.text
    )
    measure = [*PROBE, f"output={tmp_path}", f"encoder={tmp_path}/vit", "tracking.wandb=disabled"]
    with pytest.raises(ConfigError, match="depth=1, sincos positions takes no views of 20 pixels"):
        probe.run(load(ProbeConfig, [*measure, "views.size=20"]))
