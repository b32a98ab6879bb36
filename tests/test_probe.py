"""The probe reads the right encoder, leaves it alone, and counts each image once."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from moco_dist import checkpoint, data, linear_probe, probe, runtime, saving
from moco_dist.config import PretrainConfig, ProbeConfig
from moco_dist.config_files import load
from moco_dist.errors import ConfigError, DataError, MissingError
from moco_dist.trainer import Trainer
from tests import processes

DATA = ["data.shapes_train=150", "data.shapes_test=37", "data.size=16", "views.size=16"]
PRETRAIN = [
    *("batch_size=16", "bn_groups=8", "encoder.width=4", "encoder.dim=8", "moco.queue_size=32"),
    *DATA,
    "runtime.device=cpu",
]
PROBE = [*DATA, "batch_size=32", "epochs=3", "optim.lr=1", "runtime.device=cpu", "precision=fp64"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps."""
    output = tmp_path_factory.mktemp("runs")
    config = load(PretrainConfig, [*PRETRAIN, f"output={output}", "name=tiny"])
    session = runtime.start(config)
    trainer = Trainer(config, session, data.load(config.data))
    for _ in range(5):
        trainer.train_step()
    trainer.save(wait=True)
    session.close()
    return output / "tiny"


def run(pretrained: str, output: str, *overrides: str) -> dict[str, Any]:
    """Probe in this process (one of several, maybe) and return the results."""
    probe.run(load(ProbeConfig, [*PROBE, f"encoder={pretrained}", f"output={output}", *overrides]))
    results: dict[str, Any] = json.loads((Path(output) / "tiny-probe" / "DONE").read_text())
    return results


def prepared(pretrained: Path, output: Path, *overrides: str) -> linear_probe.LinearProbe:
    arguments = [*PROBE, f"encoder={pretrained}", f"output={output}", "name=prepared", *overrides]
    config = load(ProbeConfig, arguments)
    encoder, theirs, _ = checkpoint.load_encoder(checkpoint.find(pretrained))
    session = runtime.start(config)
    return linear_probe.LinearProbe(config, session, data.load(config.data), encoder, theirs)


@pytest.mark.parametrize("augment", ["true", "false"])
def test_any_number_of_processes_gives_the_same_probe(
    pretrained: Path, tmp_path: Path, augment: str
) -> None:
    results = {}
    for world_size in (1, 2, 4):
        output = tmp_path / str(world_size)
        arguments = (str(pretrained), str(output), f"augment={augment}")
        results[world_size] = processes.run(run, world_size, *arguments)[0]
    for world_size in (2, 4):
        for name in ("probe", "control"):
            for part in ("validation", "test"):
                for metric, value in results[world_size][name][part].items():
                    assert abs(value - results[1][name][part][metric]) < 1e-10, (name, part, metric)


def test_figures_are_those_of_a_plain_loop_over_the_images(
    pretrained: Path, tmp_path: Path
) -> None:
    trial = prepared(pretrained, tmp_path)
    for _ in range(3):
        trial.train_step()
    images = trial.parts["test"]
    assert len(images) == 37
    head = trial.heads.heads["probe"]
    encoder, _, _ = checkpoint.load_encoder(checkpoint.find(pretrained))
    encoder = encoder.double()
    loss, top1, top5 = 0.0, 0, 0
    mean = torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.2023, 0.1994, 0.2010], dtype=torch.float64)[:, None, None]
    assert isinstance(images, data.Images)
    for pixels, label in zip(images.pixels, images.labels, strict=True):
        view = (pixels.double() / 255 - mean) / std
        scores = head(encoder.backbone(view[None]))[0].tolist()
        ranking = sorted(range(10), key=lambda c: -scores[c])
        shifted = [score - max(scores) for score in scores]
        loss += math.log(sum(map(math.exp, shifted))) - shifted[label]
        top1 += ranking[0] == label
        top5 += int(label) in ranking[:5]
    figures = trial.evaluate("probe", "test")
    assert figures["loss"] == pytest.approx(loss / 37, abs=1e-9)
    assert figures["top1"] == pytest.approx(top1 / 37)
    assert figures["top5"] == pytest.approx(top5 / 37)


def test_the_encoder_is_the_one_on_disk_and_does_not_move(pretrained: Path, tmp_path: Path) -> None:
    trial = prepared(pretrained, tmp_path, "augment=true", "precision=fp32")
    on_disk = load_file(checkpoint.find(pretrained).path / "model.safetensors")
    for _ in range(3):
        trial.train_step()
    trial.check_frozen()
    for name, tensor in trial.encoders["probe"].state_dict().items():
        assert tensor.equal(on_disk[f"query_encoder.{name}"]), name
    with torch.no_grad():
        trial.encoders["probe"].get_buffer("backbone.bn1.running_mean")[0] += 1e-7
    with pytest.raises(AssertionError, match="the probe encoder moved"):
        trial.check_frozen()


def test_the_control_is_another_encoder_and_the_heads_do_not_touch_each_other(
    pretrained: Path, tmp_path: Path
) -> None:
    both = prepared(pretrained, tmp_path)
    alone = prepared(pretrained, tmp_path, "control=false", "name=alone")
    weights = [each.backbone.conv1.weight for each in both.encoders.values()]
    assert not weights[0].equal(weights[1])
    for _ in range(4):
        both.train_step()
        alone.train_step()
    a, b = both.heads.heads["probe"].weight, alone.heads.heads["probe"].weight
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_separable_features_are_classified_perfectly(pretrained: Path, tmp_path: Path) -> None:
    trial = prepared(pretrained, tmp_path, "augment=false", "epochs=20")
    for part, images in trial.parts.items():
        noise = torch.randn(len(images), 32, generator=torch.Generator().manual_seed(1)).double()
        trial.features["probe", part] = 5 * F.one_hot(images.labels, 32).double() + 0.1 * noise
    while trial.step < trial.total_steps:
        trial.train_step()
    assert trial.evaluate("probe", "test")["top1"] == 1
    assert trial.knn_top1("probe", "test") == 1


def test_an_interrupted_probe_gives_the_same_bits(pretrained: Path, tmp_path: Path) -> None:
    run(str(pretrained), str(tmp_path / "straight"))
    arguments = [*PROBE, f"encoder={pretrained}", f"output={tmp_path / 'parts'}"]
    probe.run(load(ProbeConfig, [*arguments, "stop_at_step=6"]))
    probe.run(load(ProbeConfig, arguments))
    found = [checkpoint.find(tmp_path / run / "tiny-probe") for run in ("straight", "parts")]
    assert found[0].step == found[1].step == 12
    for name, tensor in found[0].model.items():
        assert tensor.equal(found[1].model[name]), name


def test_its_checkpoint_is_the_trained_classifier(pretrained: Path, tmp_path: Path) -> None:
    run(str(pretrained), str(tmp_path))
    found = checkpoint.find(tmp_path / "tiny-probe")
    assert found.model["heads.probe.weight"].shape == (10, 32)
    assert found.state["classes"] == list(data.load(load(ProbeConfig, PROBE).data).train.classes)
    with pytest.raises(DataError, match="not a checkpoint of a pretraining, it holds heads"):
        checkpoint.load_encoder(found)


def refusal(*arguments: str, kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind) as error:
        probe.run(load(ProbeConfig, [*PROBE, *arguments]))
    return str(error.value)


def test_bad_inputs_have_their_sentences(pretrained: Path, tmp_path: Path) -> None:
    output = f"output={tmp_path / 'runs'}"
    assert refusal(output) == (
        "encoder is empty; give encoder=runs/NAME, a run directory or a checkpoint folder"
    )
    assert refusal(output, f"encoder={tmp_path}/none", kind=MissingError) == (
        f"{tmp_path}/none: no such checkpoint or run directory; give a run that has been pretrained"
    )
    assert refusal(output, f"encoder={pretrained}", "top_k=11") == (
        "top_k=11 is more than the 10 classes of shapes; use 10 or less"
    )
    root = tmp_path / "flat"
    root.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(root / f"{i}.png")
    flat = [
        "data.name=folder",
        f"data.root={root}",
        f"data.cache={tmp_path / 'cache'}",
        "name=flat",
    ]
    assert refusal(output, f"encoder={pretrained}", *flat, kind=DataError) == (
        f"data.name=folder at data.root={root} has no labels, and a probe needs them; "
        "sort the images into one folder for each class"
    )


def test_a_probe_is_not_resumed_for_another_encoder(pretrained: Path, tmp_path: Path) -> None:
    run(str(pretrained), str(tmp_path))
    shutil.copytree(pretrained, tmp_path / "other" / "tiny")
    found = checkpoint.find(tmp_path / "other" / "tiny")
    found.model["query_encoder.backbone.conv1.weight"] += 1
    saving.write(tmp_path / "other" / "tiny", 6, found.model, found.optimizer, found.state)
    message = refusal(f"encoder={tmp_path / 'other' / 'tiny'}", f"output={tmp_path}")
    assert "is the probe of another encoder or of other images (encoder " in message
    assert message.endswith("give name=... for a new probe")
