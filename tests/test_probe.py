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

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.data.shapes import CLASSES
from moco_dist.encoders.load import checkpoint_of, find
from moco_dist.errors import ConfigError, DataError, MissingError, UserError
from moco_dist.probe import figures
from moco_dist.probe import run as probe_run
from moco_dist.runs import saving
from tests import processes
from tests.probes import PROBE, prepared, pretrained, results, run

__all__ = ["pretrained"]

PROTOCOLS = {
    "cached": ["augment=false", "grid.lr=[0.1,1]", "grid.weight_decay=[0,0.001]", "seeds=2"],
    "augmented": ["augment=true", "grid.lr=[0.1,1]", "seeds=2", "label_fraction=0.5"],
    "finetune": ["protocol=finetune", "optim.lr=0.1", "encoder_lr=0.01"],
}


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the numbers and texts of nested lists and dicts by their place."""
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for key, each in pairs for k, v in leaves(each, f"{path}/{key}").items()}
    return {path: tree}


def outcome(pretrained: str, output: str, *overrides: str) -> tuple[dict[str, Any], Any]:
    """Return the leaves of results.json and the tensors of the last checkpoint."""
    run(pretrained, output, *overrides)
    directory = Path(output) / "tiny-probe"
    return leaves(results(directory)), checkpoint_of(directory).model


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_any_number_of_processes_gives_the_same_probe(
    pretrained: Path, tmp_path: Path, protocol: str
) -> None:
    """37 test images, 15 validation images and a cached batch of 31 don't split evenly."""
    cached = protocol == "cached"
    arguments = [*PROTOCOLS[protocol], f"batch_size={31 if cached else 30}", "epochs=2"]
    found = {
        n: processes.run(outcome, n, str(pretrained), str(tmp_path / str(n)), *arguments)[0]
        for n in (1, 2, 3)
    }
    for n in (2, 3):
        assert found[n][0].keys() == found[1][0].keys()
        for key, value in found[1][0].items():
            other = found[n][0][key]
            if isinstance(value, float):
                assert abs(other - value) < 1e-10, (n, key)
            else:
                assert other == value, (n, key)
        assert found[n][1].keys() == found[1][1].keys()
        for name, tensor in found[1][1].items():
            # On cached features every process computes the same bits.
            tolerance = 0 if cached else 1e-10
            torch.testing.assert_close(
                found[n][1][name], tensor, rtol=0, atol=tolerance, msg=f"{n} {name}"
            )


def test_figures_are_those_of_a_plain_loop_over_the_images(
    pretrained: Path, tmp_path: Path
) -> None:
    trial = prepared(pretrained, tmp_path, "grid.lr=[0.1,1]", "seeds=2")
    for _ in range(3):
        trial.train_step()
    images = trial.parts["test"]
    assert len(images) == 37
    weight, bias = trial.heads.weight[0, 1, 1].detach(), trial.heads.bias[0, 1, 1].detach()
    backbone = find(pretrained).backbone.double()
    loss, squares, top1, top5 = 0.0, 0.0, 0, 0
    confusion = [[0] * 10 for _ in range(10)]
    mean = torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.2023, 0.1994, 0.2010], dtype=torch.float64)[:, None, None]
    assert isinstance(images, datasets.Images)
    for pixels, label in zip(images.pixels, images.labels, strict=True):
        view = (pixels.double() / 255 - mean) / std
        features = backbone(view[None])[0]
        scores = [float((row * features).sum() + b) for row, b in zip(weight, bias, strict=True)]
        ranking = sorted(range(10), key=lambda c: -scores[c])
        shifted = [score - max(scores) for score in scores]
        loss += math.log(sum(map(math.exp, shifted))) - shifted[label]
        top1 += ranking[0] == int(label)
        top5 += int(label) in ranking[:5]
        squares += (math.log(sum(map(math.exp, shifted))) - shifted[label]) ** 2
        confusion[int(label)][ranking[0]] += 1
    expected = [loss / 37, squares / 37, top1 / 37, top5 / 37]
    assert trial.evaluate("test")[0, 1, 1].tolist() == pytest.approx(expected, abs=1e-9)
    assert figures.confusion(trial, "probe", "test", 1)[1].tolist() == confusion


def test_the_encoder_is_the_one_on_disk_and_does_not_move(pretrained: Path, tmp_path: Path) -> None:
    trial = prepared(pretrained, tmp_path, "augment=true", "precision=fp32")
    on_disk = load_file(checkpoint_of(pretrained).path / "model.safetensors")
    for _ in range(3):
        trial.train_step()
    trial.frozen.check()
    for name, tensor in trial.backbones["probe"].state_dict().items():
        assert tensor.equal(on_disk[f"query_encoder.backbone.{name}"]), name
    with torch.no_grad():
        trial.backbones["probe"].get_parameter("layer1.0.conv1.weight")[0] += 1e-7
    with pytest.raises(UserError, match=r"the probe encoder's layer1\.0\.conv1\.weight changed"):
        trial.frozen.check()


def test_the_control_is_another_encoder_and_the_heads_do_not_touch_each_other(
    pretrained: Path, tmp_path: Path
) -> None:
    both = prepared(pretrained, tmp_path)
    alone = prepared(pretrained, tmp_path, "control=false", "name=alone")
    weights = [each.conv1.weight for each in both.backbones.values()]
    assert not weights[0].equal(weights[1])
    for _ in range(4):
        both.train_step()
        alone.train_step()
    a, b = both.heads.weight[0], alone.heads.weight[0]
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_separable_features_are_classified_perfectly(pretrained: Path, tmp_path: Path) -> None:
    trial = prepared(pretrained, tmp_path, "augment=false", "epochs=20")
    for part, images in trial.parts.items():
        noise = torch.randn(len(images), 32, generator=torch.Generator().manual_seed(1)).double()
        trial.features[part][0] = 5 * F.one_hot(images.labels, 32).double() + 0.1 * noise
    while trial.step < trial.total_steps:
        trial.train_step()
    assert trial.evaluate("test")[0, 0, 0, 2] == 1
    assert figures.knn_top1(trial, "probe", "test") == 1


def in_parts(pretrained: str, output: str, *overrides: str) -> tuple[dict[str, Any], Any]:
    """Stop in the middle of an epoch, and resume."""
    arguments = [*PROBE, f"encoder={pretrained}", f"output={output}", *overrides]
    probe_run.run(load(ProbeConfig, [*arguments, "stop_at_step=5"]))
    assert not (Path(output) / "tiny-probe" / "results.json").exists()
    return outcome(pretrained, output, *overrides)


@pytest.mark.parametrize(("protocol", "count"), [("cached", 1), ("augmented", 1), ("finetune", 3)])
def test_an_interrupted_probe_gives_the_same_bits(
    pretrained: Path, tmp_path: Path, protocol: str, count: int
) -> None:
    arguments = [*PROTOCOLS[protocol], "batch_size=30"]
    straight, parts = (
        processes.run(each, count, str(pretrained), str(tmp_path / each.__name__), *arguments)[0]
        for each in (outcome, in_parts)
    )
    assert straight[0] == parts[0]
    assert straight[1].keys() == parts[1].keys()
    for name, tensor in straight[1].items():
        assert tensor.equal(parts[1][name]), name


def test_a_finished_probe_that_is_run_again_loses_nothing(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, folder = ["augment=false"], tmp_path / "tiny-probe"
    run(pretrained, tmp_path, *quick)

    def kept() -> list[tuple[bytes, int]]:
        paths = [folder / name for name in ("DONE", "results.json", "config.yaml")]
        return [(path.read_bytes(), path.stat().st_ino) for path in paths]

    first = kept()
    for others in ([], ["epochs=2"], ["stop_at_step=3"], ["knn.every_epochs=7"]):
        run(pretrained, tmp_path, *quick, *others)
        assert kept() == first, others
    # With another kNN, or without its results, it is measured again.
    (folder / "results.json").unlink()
    run(pretrained, tmp_path, *quick)
    assert [content for content, _ in kept()] == [content for content, _ in first]
    with monkeypatch.context() as patch:

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(probe_run, "conclude", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(pretrained, tmp_path, *quick, "knn.k=1")
    assert (folder / "results.json").read_bytes() == first[1][0]
    done, before = run(pretrained, tmp_path, *quick, "knn.k=1"), json.loads(first[0][0])

    def figures_of(content: dict[str, Any], name: str) -> list[Any]:
        places = [(each, part) for each in ("probe", "control") for part in ("validation", "test")]
        return [content[each][part][name] for each, part in places]

    assert figures_of(done, "top1") == figures_of(before, "top1")
    assert figures_of(done, "knn_top1") != figures_of(before, "knn_top1")
    written = results(folder)["encoders"]
    assert figures_of(written, "knn_top1") == figures_of(done, "knn_top1")


def test_its_checkpoint_is_the_trained_classifier(pretrained: Path, tmp_path: Path) -> None:
    run(pretrained, tmp_path)
    found = checkpoint_of(tmp_path / "tiny-probe")
    assert found.model["heads.weight"].shape == (2, 1, 1, 10, 32)
    assert found.state["classes"] == list(CLASSES)
    with pytest.raises(DataError, match="not a checkpoint of a pretraining, it holds best"):
        find(tmp_path / "tiny-probe")


def refusal(*arguments: str, kind: type[Exception] = ConfigError) -> str:
    with pytest.raises(kind) as error:
        probe_run.run(load(ProbeConfig, [*PROBE, *arguments]))
    return str(error.value)


def test_bad_inputs_have_their_sentences(pretrained: Path, tmp_path: Path) -> None:
    output = f"output={tmp_path / 'runs'}"
    assert refusal(output) == (
        "encoder is empty; give encoder=runs/NAME, a run directory, a checkpoint folder, or a file "
        "with a state dict"
    )
    assert refusal(output, f"encoder={tmp_path}/none", kind=MissingError) == (
        f"{tmp_path}/none: no such file or folder; give a run that has been pretrained, "
        "a checkpoint folder, an export, or a file with a state dict"
    )
    assert refusal(output, f"encoder={pretrained}", "top_k=11") == (
        "top_k=11 is more than the 10 classes of shapes; use 10 or less"
    )
    root = tmp_path / "flat"
    root.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(root / f"{i}.png")
    flat = ["data.name=folder", f"data.root={root}", f"data.cache={tmp_path}/cache", "name=flat"]
    assert refusal(output, f"encoder={pretrained}", *flat, kind=DataError) == (
        f"data.name=folder at data.root={root} has no labels, and a probe needs them; "
        "sort the images into one folder per class"
    )


def test_a_probe_is_not_resumed_for_another_encoder(pretrained: Path, tmp_path: Path) -> None:
    run(pretrained, tmp_path)
    other = tmp_path / "other" / "tiny"
    shutil.copytree(pretrained, other)
    found = checkpoint_of(other)
    found.model["query_encoder.backbone.conv1.weight"] += 1
    saving.write(other, 6, found.model, found.optimizer, found.state)
    message = refusal(f"encoder={other}", f"output={tmp_path}")
    assert "is the probe of another encoder or of other images (encoder " in message
    assert message.endswith("give a new probe another name=...")
