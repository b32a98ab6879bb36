"""One encoder under every name that it can have: five readers, one answer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moco_dist
from moco_dist.config.encoder import EncoderConfig
from moco_dist.config.recipe import DataConfig, PretrainConfig, ViewsConfig
from moco_dist.config.yaml_files import to_dict
from moco_dist.data import datasets
from moco_dist.encoders import load
from moco_dist.errors import DataError, UserError
from moco_dist.export import run as export_run
from moco_dist.method import batch_norm, views
from moco_dist.method.encoder import build_encoder
from moco_dist.method.moco import MoCo
from moco_dist.report import encoder as report_encoder
from moco_dist.runs import saving
from tests.probes import prepared
from tests.test_foreign_input import Planted
from tests.test_init_from import started

SIZE = 32
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
VIEWS = ViewsConfig(size=SIZE, mean=IMAGENET["mean"], std=IMAGENET["std"])
DATA = DataConfig(shapes_train=20, shapes_test=20, size=SIZE)


def trained(**layers: nn.Module) -> Any:
    """torchvision's ResNet-18 with other layers, norms and statistics as training leaves them."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    for name, layer in layers.items():
        setattr(model, name, layer)
    for name, tensor in model.state_dict().items():
        if "bn" in name or "downsample.1" in name:
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return model.eval()


def features(model: Any, images: Tensor) -> Tensor:
    """The independent oracle: torchvision's own forward pass, up to its classifier."""
    whole = nn.Sequential(*list(model.children())[:-1], nn.Flatten())
    with torch.no_grad():
        found: Tensor = whole.eval()(images)
    return found


def written_run(run: Path, model: Any) -> Path:
    """A run directory whose query encoder has the weights of a model of torchvision."""
    config = PretrainConfig(encoder=EncoderConfig(stem="imagenet", dim=8), views=VIEWS, data=DATA)
    network = MoCo(build_encoder(config.encoder, seed=1), 40, 8)
    network.query_encoder.backbone.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    )
    state = {"config": to_dict(config), "epoch": 1.0, "enqueued": 0, "data": "0", "run_id": "a"}
    saving.write(run, 7, network.state_dict(), {}, state)
    saving.write_encoder(run, 7, network.state_dict(), to_dict(config))
    return run


def lightning(path: Path, **parts: nn.Module | Tensor) -> Path:
    """What Lightning saves: the state dict of a module among records of the training."""
    tensors: dict[str, Any] = {}
    for name, part in parts.items():
        inner = part.state_dict().items() if isinstance(part, nn.Module) else [("", part)]
        tensors |= {f"{name}.{key}".strip("."): each for key, each in inner}
    around = {"epoch": 9, "pytorch-lightning_version": "2.5.0", "loops": {"fit_loop": {}}}
    around |= {"callbacks": {"ModelCheckpoint": {"best_model_path": "x"}}, "lr_schedulers": []}
    torch.save(around | {"state_dict": tensors}, path)
    return path


def of_lightly(path: Path, model: Any, **more: Tensor) -> Path:
    """As its MoCo example builds it: the layers in a Sequential, by number."""
    query, key = (nn.Sequential(*list(each.children())[:-1]) for each in (model, trained()))
    head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))
    parts = {"projection_head": head, "projection_head_momentum": head, "backbone_momentum": key}
    return lightning(path, backbone=query, **parts, **more)


def of_solo_learn(path: Path, model: Any, **more: Tensor) -> Path:
    """As its mocov2plus builds it: torchvision's names, and a classifier that is trained along."""
    query, key = copy.deepcopy(model), trained()
    query.fc = key.fc = nn.Identity()
    parts = {"projector": nn.Linear(512, 8), "momentum_projector": nn.Linear(512, 8)}
    parts |= {"classifier": nn.Linear(512, 10), "momentum_backbone": key, "backbone": query}
    more |= {"queue": torch.zeros(2, 8, 16), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    return lightning(path, **parts, **more)


def of_the_original(path: Path, model: Any) -> Path:
    tensors = model.state_dict() | {"fc.weight": torch.zeros(8, 512), "fc.bias": torch.zeros(8)}
    named = {f"module.encoder_q.{k}": v for k, v in tensors.items()}
    torch.save({"epoch": 9, "arch": "resnet18", "state_dict": named}, path)
    return path


def ways(folder: Path, model: Any) -> dict[str, Path]:
    """Every way to name the encoder, written to files."""
    run = written_run(folder / "run", model)
    found = {
        "run directory": run,
        "checkpoint folder": run / "checkpoints/step_00000007",
        "encoder alone": run / "encoder",
    }
    for target in ("torchvision", "timm", "huggingface", "moco", "detectron2", "onnx"):
        found[f"export for {target}"] = export_run.export(run, target)
    torch.save(model.state_dict(), folder / "resnet18.pth")
    save_file(model.state_dict(), folder / "resnet18.safetensors")
    found |= {f"state dict {end}": folder / f"resnet18{end}" for end in (".pth", ".safetensors")}
    found["original .pth.tar"] = of_the_original(folder / "moco_v1.pth.tar", model)
    found["lightly .ckpt"] = of_lightly(folder / "lightly.ckpt", model)
    found["solo-learn .ckpt"] = of_solo_learn(folder / "solo.ckpt", model)
    return found


# What a reader makes of the images that it takes, and those images.
Answer = tuple[Tensor, Tensor]


def pixels_of(images: datasets.AnyImages) -> Tensor:
    assert isinstance(images, datasets.Images)
    return views.center(images.pixels, VIEWS)


def by_probe(path: Path, folder: Path) -> Answer:
    arguments = [f"views.{key}={value}".replace(" ", "") for key, value in IMAGENET.items()]
    arguments += ["data.shapes_train=20", "data.shapes_test=20", f"data.size={SIZE}"]
    arguments += [f"views.size={SIZE}", "batch_size=10", "control=false", "precision=fp32"]
    trial = prepared(path, folder, *arguments, "augment=false")
    return trial.features["test"][0], pixels_of(trial.parts["test"])


def by_export(path: Path, folder: Path) -> Answer:
    exported = export_run.export(path, "torchvision", folder / "export")
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    model.load_state_dict(load_file(exported / "model.safetensors"))
    images = pixels_of(datasets.load(DATA).test)
    return features(model.eval(), images), images


def by_report(path: Path, folder: Path) -> Answer:
    """A report shows the principal components of the features."""
    components = report_encoder.look(path, DATA).components
    return torch.from_numpy(components), pixels_of(report_encoder.held_out(DATA)[1])


def by_load_encoder(path: Path, folder: Path) -> Answer:
    encoder, test = moco_dist.load_encoder(path), datasets.load(DATA).test
    assert (encoder.view.mean, encoder.view.std) == (VIEWS.mean, VIEWS.std)
    encoder.view, encoder.resize = VIEWS, SIZE  # a state dict doesn't tell the size
    assert isinstance(test, datasets.Images)
    return encoder(test.pixels), pixels_of(test)


def by_init_from(path: Path, folder: Path) -> Answer:
    encoder = started(folder, path).moco.query_encoder
    batch_norm.average_statistics(encoder)
    images = pixels_of(datasets.load(DATA).test)
    with torch.no_grad():
        return encoder.backbone.eval()(images), images


READERS = {
    "probe": by_probe,
    "export": by_export,
    "report": by_report,
    "load_encoder": by_load_encoder,
    "init_from": by_init_from,
}


def answers(path: Path, folder: Path, model: Any) -> Iterator[str]:
    """Yield for each reader "ok" if it has the model's features, or else why not."""
    for name, read in READERS.items():
        (folder / name).mkdir(parents=True)
        try:
            found, images = read(path, folder / name)
        except UserError as error:
            yield str(error)
            continue
        expected = features(model, images)
        if name == "report":
            unit = nn.functional.normalize(expected.double(), dim=1)
            expected = torch.from_numpy(report_encoder.principal(unit)[0])
        worst = float((found - expected).abs().max() / expected.abs().max().clamp(min=1))
        yield "ok" if worst < 1e-5 else f"differs by {worst:.1e}"


@pytest.mark.slow
def test_ten_ways_to_name_an_encoder_and_five_readers_have_one_answer(tmp_path: Path) -> None:
    model = trained()
    rows = {}
    for number, (way, path) in enumerate(ways(tmp_path / "files", model).items()):
        rows[way] = list(answers(path, tmp_path / f"{number}", model))
    print(f"\n{'':24}" + "".join(f"{name:>14}" for name in READERS))
    for way, cells in rows.items():
        words = (cell if cell.startswith(("ok", "differs")) else "refused" for cell in cells)
        print(f"{way:22}" + "".join(f"{word:>14}" for word in words))
    for target in ("detectron2", "onnx"):
        cells = rows.pop(f"export for {target}")
        folder = tmp_path / "files/run/export" / target
        assert cells == [
            f"{folder}: an export for {target} can't be read back; give its run, or an "
            "export for torchvision, timm, huggingface or moco"
        ] * len(READERS)
    assert len(rows) == 12
    assert {cell for cells in rows.values() for cell in cells} == {"ok"}, rows


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as error:
        load.find(path)
    return str(error.value)


def test_a_lightning_checkpoint_is_read_by_known_names_alone(tmp_path: Path) -> None:
    model, path = trained(), tmp_path / "last.ckpt"
    found = load.find(of_lightly(path, model, **{"decoder.weight": torch.ones(1)}))
    assert found.place == (
        f"{path} (resnet18, width 64, imagenet stem, by its tensors, layers by number, in "
        "state_dict, behind 'backbone.'; not used: backbone_momentum, decoder, projection_head, "
        "projection_head_momentum; if it is timm's resnetblur18, which has the same tensors, "
        "name it)"
    )
    assert len(found.left) == 120 + 4 + 4 + 1
    one = torch.ones(64, 3, 7, 7)
    message = refusal(of_lightly(path, model, **{"backbone.conv1.weight": one}))
    assert "holds 2 encoders, at backbone.conv1.weight, backbone.7.0.conv1.weight; " in message
    message = refusal(of_lightly(path, model, **{"backbone.bn1.weight": one}))
    assert "holds bn1.weight twice, once as backbone.bn1.weight; remove one" in message
    message = refusal(of_solo_learn(path, model, **{"backbone.layer1.0.bn9.bias": one}))
    assert "layer1.0.bn9.bias is not expected" in message


@pytest.mark.parametrize("save", [of_lightly, of_solo_learn])
def test_the_momentum_encoder_is_the_key_encoder(tmp_path: Path, save: Any) -> None:
    images = torch.randn(2, 3, SIZE, SIZE)
    found = load.find(save(tmp_path / "last.ckpt", trained(conv1=nn.Conv2d(3, 64, 7, 2, 3))), "key")
    expected = features(trained(), images)
    assert float((found.backbone(images) - expected).abs().max()) < 1e-5 * float(expected.max())


def test_the_resnet_of_lightly_itself_gives_its_features(tmp_path: Path) -> None:
    """Its ResNetGenerator: a 3x3 stem, no ReLU or pooling between, and shortcuts by that name."""
    stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model = trained(conv1=stem, maxpool=nn.Identity())
    layers = [model.conv1, model.bn1, model.layer1, model.layer2, model.layer3, model.layer4]
    state = nn.Sequential(*layers).state_dict()
    named = {f"backbone.{k.replace('downsample', 'shortcut')}": v for k, v in state.items()}
    torch.save({"state_dict": named}, tmp_path / "own.ckpt")
    images = torch.randn(3, 3, SIZE, SIZE)
    ours = load.find(tmp_path / "own.ckpt").backbone(images)
    torch.testing.assert_close(ours, features(model, images), rtol=1e-5, atol=1e-5)


def test_an_encoder_that_would_give_other_features_is_refused(tmp_path: Path) -> None:
    model = trained(conv1=nn.Conv2d(3, 64, 3, padding=2, bias=False))
    message = refusal(of_solo_learn(tmp_path / "cifar.ckpt", model))
    assert "solo-learn pads the first convolution of its CIFAR encoders by 2 pixels" in message


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_code_or_takes_an_encoder_without_training(
    tmp_path: Path, reader: str
) -> None:
    read = READERS[reader]
    content = {"state_dict": {}, "hyper_parameters": Planted(tmp_path / "ran")}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(DataError, match="can't be read as tensors alone"):
        read(tmp_path / "a.ckpt", tmp_path)
    assert not (tmp_path / "ran").exists()
    of_lightly(tmp_path / "b.ckpt", torchvision.models.resnet18())
    with pytest.raises(DataError, match="is a random encoder and no trained one"):
        read(tmp_path / "b.ckpt", tmp_path)
