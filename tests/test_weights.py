"""Weights as libraries and training scripts save them: four readers, the library's own features."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    TimmWrapperConfig,
    TimmWrapperModel,
)

import moco_dist
from moco_dist.config.encoder import BACKBONES, EncoderConfig
from moco_dist.data import datasets
from moco_dist.encoders import layouts, state_dict
from moco_dist.encoders.load import find
from moco_dist.errors import DataError, UserError
from moco_dist.export.run import export
from moco_dist.method import batch_norm, views
from tests.probes import prepared
from tests.test_encoder_reader import DATA, IMAGENET, SIZE, VIEWS, features
from tests.test_init_from import started

R18: dict[str, Any] = {
    "hidden_sizes": [64, 128, 256, 512],
    "depths": [2, 2, 2, 2],
    "layer_type": "basic",
}


@dataclass(frozen=True)
class Kind:
    """Weights in a file or folder, and the features that their own library computes."""

    path: Path
    oracle: Callable[[Tensor], Tensor]
    backbone: str = "resnet18"
    # Whether the reader must be told the architecture.
    named: bool = False
    # What timm was told to build it with.
    options: tuple[str, ...] = ()


def stirred(model: Any) -> Any:
    """Return a model with numbers in it as after a training, whatever its layers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point():
                tensor.add_(0.02 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def behind(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def by_lightning(folder: Path, attribute: str, model: Any) -> Path:
    """A checkpoint that Lightning itself writes after a step of training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pytorch_lightning as lightning

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.save_hyperparameters({"lr": 0.1, "arch": "resnet18"})
                setattr(self, attribute, model)
                self.projector = nn.Linear(1000, 4)

            def training_step(self, batch: list[Tensor], _: int) -> Tensor:
                outputs: Tensor = self.projector(getattr(self, attribute)(batch[0]))
                return outputs.pow(2).mean()

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=1e-4)

        images = torch.utils.data.TensorDataset(torch.randn(4, 3, SIZE, SIZE))
        trainer = lightning.Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            default_root_dir=folder,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(images, batch_size=4))
        trainer.save_checkpoint(folder / f"{attribute}.ckpt")
    model.eval()
    return folder / f"{attribute}.ckpt"


def of_timm(name: str, **settings: Any) -> Any:
    return stirred(timm.create_model(name, num_classes=10, **settings))


def pooled(model: Any) -> Callable[[Tensor], Tensor]:
    """The features of a model of timm, before its classifier."""
    return lambda images: model.forward_head(model.forward_features(images), pre_logits=True)


def of_transformers(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda images: model.eval()(images).pooler_output.flatten(1)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("weights")
    model = stirred(torchvision.models.resnet18())
    own, other = model.state_dict(), torchvision.models.resnet18().state_dict()
    head = {"weight": torch.zeros(4, 512)}
    bare = {name: tensor for name, tensor in own.items() if not name.startswith("fc.")}
    compiled: Any = torch.compile(model)
    arguments = argparse.Namespace(arch="resnet18", lr=0.1, output_dir="runs")
    trained_with = {"epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}}
    files: dict[str, Any] = {
        "state dict": own,
        "DataParallel": nn.DataParallel(model).state_dict(),
        "torch.compile": compiled.state_dict(),
        "state_dict": trained_with | {"arch": "resnet18", "best_acc1": torch.tensor(1.0)}
        | {"state_dict": behind("module.", own)},
        "model_state_dict": trained_with | {"model_state_dict": own},
        "torchvision's references": trained_with | {"model": own, "args": arguments}
        | {"model_ema": {"n_averaged": torch.tensor(1)} | behind("module.", other)},
        # moco-v3/moco/builder.py and main_moco.py
        "MoCo v3": trained_with | {"arch": "resnet18"} | {
            "state_dict": behind("module.base_encoder.", own)
        | behind("module.momentum_encoder.", other) | behind("module.predictor.0.", head)},
        # simsiam/simsiam/builder.py and main_simsiam.py
        "SimSiam": trained_with | {"arch": "resnet18", "state_dict": behind("module.encoder.", bare)
        | behind("module.encoder.fc.0.", head) | behind("module.predictor.0.", head)},
        # swav/main_swav.py and src/resnet50.py
        "SwAV": trained_with | {"state_dict": behind("module.", bare)
        | behind("module.projection_head.0.", head) | behind("module.prototypes.", head)},
        # dino/main_dino.py and utils.py: MultiCropWrapper
        "DINO": trained_with | {"args": arguments, "dino_loss": {"center": torch.zeros(1, 4)}}
        | {"teacher": behind("backbone.", bare) | behind("head.mlp.0.", head)}
        | {"student": behind("module.backbone.", other) | behind("module.head.mlp.0.", head)},
        # mmpretrain/models/selfsup/moco.py, saved by mmengine
        "OpenMMLab": {"meta": {"epoch": 3, "cfg": "model = dict(backbone=dict(style='pytorch'))"}}
        | {"state_dict": behind("backbone.", bare) | behind("neck.fc0.", head)
        | behind("encoder_k.module.0.", bare) | {"queue": torch.zeros(4, 16)}},
        # vissl/models/base_ssl_model.py and trunks/resnext.py
        "VISSL": {"classy_state_dict": {"base_model": {"model": {
            "trunk": behind("_feature_blocks.", bare), "heads": behind("0.clf.0.", head)}}}},
    }  # fmt: skip
    found = {}
    for number, (name, content) in enumerate(files.items()):
        torch.save(content, folder / f"{number}.pth")
        found[name] = Kind(folder / f"{number}.pth", partial(features, model))
    for attribute in ("backbone", "model"):
        lit = stirred(torchvision.models.resnet18())
        path = by_lightning(folder, attribute, lit)
        found[f"Lightning, {attribute}"] = Kind(path, partial(features, lit))
    for name in ("resnext50_32x4d", "wide_resnet50_2"):
        large = stirred(getattr(torchvision.models, name)())
        save_file(large.state_dict(), folder / f"{name}.safetensors")
        path = folder / f"{name}.safetensors"
        found[name] = Kind(path, partial(features, large), name)
    for form, name in ((True, "resnet18"), (False, "resnetblur18")):
        theirs = of_timm(name)
        save_for_hf(theirs, str(folder / f"timm_{name}"), safe_serialization=form)
        backbone = name if name in BACKBONES else f"timm/{name}"
        found[f"timm {name}"] = Kind(folder / f"timm_{name}", pooled(theirs), backbone)
    regnet = of_timm("regnety_002")
    torch.save(regnet.state_dict(), folder / "regnet.pth")
    path = folder / "regnet.pth"
    found["timm, named"] = Kind(path, pooled(regnet), "timm/regnety_002", named=True)
    torch.save({"arch": "regnety_002", "state_dict": regnet.state_dict()}, folder / "train.pth.tar")
    found["timm's train.py"] = Kind(folder / "train.pth.tar", pooled(regnet), "timm/regnety_002")
    plain = stirred(ResNetModel(ResNetConfig(**R18)))
    plain.save_pretrained(folder / "resnet")
    found["transformers"] = Kind(folder / "resnet", of_transformers(plain))
    classifier = stirred(ResNetForImageClassification(ResNetConfig(**R18)))
    classifier.save_pretrained(folder / "classifier")
    found["transformers, classifier"] = Kind(
        folder / "classifier", of_transformers(classifier.resnet)
    )
    options = {"img_size": SIZE, "patch_size": 8, "num_heads": 4}  # heads are in no tensor
    small = of_timm("test_vit", **options)
    save_for_hf(small, str(folder / "small"), safe_serialization=True)
    words = tuple(f"{key}={value}" for key, value in options.items())
    found["timm, with options"] = Kind(
        folder / "small", pooled(small), "timm/test_vit", options=words
    )
    # moco-v3's ViT-S, which has more heads than timm's: main_moco.py and vits.py.
    theirs = of_timm("vit_small_patch16_224", num_heads=12, dynamic_img_size=True)
    headless = {k: v for k, v in theirs.state_dict().items() if not k.startswith("head.")}
    content = behind("module.base_encoder.", headless)
    content |= behind("module.base_encoder.head.0.", head)
    torch.save({"arch": "vit_small", "state_dict": content}, folder / "v3.pth.tar")
    small_v3 = "timm/vit_small_patch16_224"
    found["MoCo v3's ViT-S"] = Kind(
        folder / "v3.pth.tar", pooled(theirs), small_v3, options=("num_heads=12",)
    )
    around = stirred(TimmWrapperModel(TimmWrapperConfig(architecture="resnet18")))
    around.save_pretrained(folder / "wrapper")
    found["transformers, timm"] = Kind(
        folder / "wrapper", lambda images: around(pixel_values=images).pooler_output
    )
    return found


def by_probe(kind: Kind, folder: Path) -> tuple[Tensor, Tensor]:
    arguments = [f"views.{key}={value}".replace(" ", "") for key, value in IMAGENET.items()]
    arguments += ["data.shapes_train=20", "data.shapes_test=20", f"data.size={SIZE}"]
    arguments += [f"views.size={SIZE}", "batch_size=10", "control=false", "precision=fp32"]
    arguments += [f"backbone={kind.backbone}"] * kind.named
    trial = prepared(kind.path, folder, *arguments, "augment=false")
    return trial.features["test"][0], images_of_test()


def by_export(kind: Kind, folder: Path) -> tuple[Tensor, Tensor]:
    target = "timm" if kind.backbone.startswith("timm/") else "torchvision"
    name = kind.backbone if kind.named else ""
    exported = export(kind.path, target, folder / "out", backbone=name)
    if target == "timm":
        model: Any = timm.create_model(f"local-dir:{exported}", pretrained=True)
    else:
        model = getattr(torchvision.models, kind.backbone)()
        model.fc = nn.Identity()
        model.load_state_dict(load_file(exported / "model.safetensors"))
    return model.eval()(images_of_test()), images_of_test()


def by_load_encoder(kind: Kind, folder: Path) -> tuple[Tensor, Tensor]:
    encoder = moco_dist.load_encoder(kind.path, backbone=kind.backbone if kind.named else "")
    encoder.view, encoder.resize = VIEWS, SIZE  # most files don't tell
    test = datasets.load(DATA).test
    assert isinstance(test, datasets.Images)
    return encoder(test.pixels), images_of_test()


def by_init_from(kind: Kind, folder: Path) -> tuple[Tensor, Tensor]:
    options = f"encoder.options=[{','.join(kind.options)}]"
    # Not all of timm's models take smaller views.
    sizes = f"data.size={SIZE}", f"views.size={SIZE}"
    trainer = started(folder, kind.path, f"encoder.backbone={kind.backbone}", options, *sizes)
    encoder = trainer.moco.query_encoder
    batch_norm.average_statistics(encoder)
    return encoder.backbone.eval()(images_of_test()), images_of_test()


def images_of_test() -> Tensor:
    test = datasets.load(DATA).test
    assert isinstance(test, datasets.Images)
    return views.center(test.pixels, VIEWS)


READERS = {
    "probe": by_probe,
    "export": by_export,
    "load_encoder": by_load_encoder,
    "init_from": by_init_from,
}


@torch.no_grad()
def test_the_reader_gives_the_features_of_the_own_library(kinds: dict[str, Kind]) -> None:
    images, worst = images_of_test(), {}
    for name, kind in kinds.items():
        found, expected = find(kind.path, backbone=kind.named * kind.backbone), kind.oracle(images)
        assert float(expected.std(0).max()) > 0.01 * float(expected.abs().max()), "images differ"
        assert found.architecture.backbone == kind.backbone
        difference = (found.backbone(images) - expected).abs().max() / expected.abs().max()
        worst[name] = float(difference)
    assert len(worst) >= 16
    assert max(worst.values()) < 1e-4, worst


@pytest.mark.slow
@torch.no_grad()
def test_four_readers_give_the_features_of_the_own_library(
    kinds: dict[str, Kind], tmp_path: Path
) -> None:
    rows: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        expected, rows[name] = kind.oracle(images_of_test()), []
        for reader, read in READERS.items():
            found, _ = read(kind, tmp_path / name.replace(" ", "_") / reader)
            worst = float((found - expected).abs().max() / expected.abs().max())
            rows[name].append(f"{worst:.0e}")
    print("\n" + "\n".join(f"{name:26}{cells}" for name, cells in rows.items()))
    assert len(rows) >= 16
    assert all(float(cell) < 1e-4 for cells in rows.values() for cell in cells), rows


class Refused:
    """Files and folders that hold no encoder that is known here, and why."""

    reasons: ClassVar[dict[str, str]] = {
        "timm_stride": "config.json: output_stride is 16, with which the same tensors give other ",
        "timm_pool": "config.json: global_pool is max, with which the same tensors give other ",
        "hf_stride": "config.json: downsample_in_bottleneck is True, with which the same tensors ",
        "hf_gelu": "config.json: hidden_act is gelu, with which the same tensors give other ",
        "hf_vit": "config.json: says 'model_type': vit, but encoders are read from folders of ",
        "no_weights": "has config.json but no model.safetensors or pytorch_model.bin",
        "segmentation.pth": "is a model for segmentation, whose backbone has dilation in place of ",
        "caffe.pth": "its meta says style='caffe', whose blocks have their stride in another ",
        "whole.pth": r"can't be read as tensors alone (it also holds ",
        "net.pth": "has no conv1.weight as a torchvision ResNet has, it holds net.conv1.weight",
        "two.pth": "holds 2 encoders, at encoder.conv1.weight, backbone.conv1.weight; save the ",
        "inside.pth": "is nearest to resnet18, width 64, imagenet stem, but has not exactly its ",
        "deep.pth": "has no conv1.weight as a torchvision ResNet has, it holds conv1.0.weight",
        "arch.pth": "is said to hold a resnet50, but its tensors are nearest to those of a ",
    }

    def __init__(self, folder: Path) -> None:
        own = stirred(torchvision.models.resnet18()).state_dict()
        bare = {name: tensor for name, tensor in own.items() if not name.startswith("fc.")}
        for name, settings in (
            ("timm_stride", {"output_stride": 16}),
            ("timm_pool", {"global_pool": "max"}),
        ):
            save_for_hf(
                of_timm("resnet18", **settings), str(folder / name), safe_serialization=True
            )
        resnet: dict[str, Any] = {"hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1]}
        for name, changed in (
            ("hf_stride", {"layer_type": "bottleneck", "downsample_in_bottleneck": True}),
            ("hf_gelu", {"layer_type": "basic", "hidden_act": "gelu"}),
        ):
            ResNetModel(ResNetConfig(**(resnet | changed))).save_pretrained(folder / name)
        for name, described in (("hf_vit", {"model_type": "vit"}), ("no_weights", {})):
            (folder / name).mkdir()
            described = described or {"model_type": "resnet"}
            (folder / name / "config.json").write_text(json.dumps(described))
        dense = torchvision.models.segmentation.fcn_resnet50(weights_backbone=None)
        contents: dict[str, Any] = {
            "segmentation": stirred(dense).state_dict(),
            "caffe": {"state_dict": behind("backbone.", bare), "meta": {"config": "style='caffe'"}},
            "whole": {"model": torchvision.models.resnet18()},
            "net": behind("net.", own),
            "two": {"state_dict": behind("encoder.", own) | behind("backbone.", own)},
            "inside": {
                "state_dict": behind("backbone.", own | {"adapter.weight": own["bn1.bias"]})
            },
            "deep": of_timm("resnet26d").state_dict(),
            "arch": {"arch": "resnet50", "state_dict": own},
        }
        for name, content in contents.items():
            torch.save(content, folder / f"{name}.pth")


def test_four_readers_refuse_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    Refused(tmp_path / "files")
    for name, reason in Refused.reasons.items():
        path, said = tmp_path / "files" / name, set()
        for reader, read in READERS.items():
            with pytest.raises(UserError) as error:
                read(Kind(path, torch.relu), tmp_path / f"{name}-{reader}")
            said.add(str(error.value))
            assert error.value.exit_status in (65, 66)
        assert len(said) == 1, said
        (sentence,) = said
        assert sentence.startswith(str(path))
        assert reason in sentence
        assert sentence.isprintable()


def test_models_of_timm_with_the_tensors_of_a_resnet_are_all_known() -> None:
    """What timm builds decides: every other model with the same names and shapes is listed."""
    config = {name: EncoderConfig(name, stem="imagenet") for name in BACKBONES}
    ours = {n: state_dict.backbone_shapes(c, Path("x")) for n, c in config.items()}
    found: dict[str, set[str]] = {}
    for name in timm.list_models(["*resnet[!v]*", "*resnext*"]):
        with torch.device("meta"):
            theirs = timm.create_model(name, num_classes=0).state_dict()
        for own, shapes in ours.items():
            if {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in shapes.items()}:
                found.setdefault(own, set()).add(name)
    assert found.keys() == set(BACKBONES), "each has a namesake in timm"
    others = {own: names - {own} for own, names in found.items() if names - {own}}
    assert others == {own: set(names) for own, names in layouts.SAME_NAMES.items()}


def test_a_blurred_resnet_is_told_apart_or_named(tmp_path: Path) -> None:
    model = of_timm("resnetblur50")
    images = images_of_test()
    with torch.no_grad():
        expected = pooled(model)(images)
    torch.save(model.state_dict(), tmp_path / "by_modules.pth")
    save_file(model.state_dict(), tmp_path / "resnetblur50.safetensors")
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    for name, told in (("by_modules.pth", ""), ("resnetblur50.safetensors", "")):
        found = find(tmp_path / name, backbone=told)
        assert found.architecture.backbone == "timm/resnetblur50"
        assert float((found.backbone(images) - expected).abs().max() / expected.abs().max()) < 1e-4
    plain = find(tmp_path / "plain.safetensors")
    assert plain.place.endswith(
        "; if it is timm's resnetaa50 or resnetblur50, which has the same tensors, name it)"
    )
    assert float((plain.backbone(images) - expected).abs().max() / expected.abs().max()) > 0.01
    named = find(tmp_path / "plain.safetensors", backbone="timm/resnetblur50")
    assert float((named.backbone(images) - expected).abs().max() / expected.abs().max()) < 1e-4
    with pytest.raises(DataError, match="is not the resnet50 that was named"):
        find(tmp_path / "resnetblur50.safetensors", backbone="resnet50")
