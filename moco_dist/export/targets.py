"""Exporters of the backbone: they write a library's files and return the code that loads them.

The code uses `folder` and `images`, normalised float (rows, channels, height, width), and sets
`features` (rows, length).
"""

from __future__ import annotations

import importlib
import json
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from moco_dist.config.encoder import EncoderConfig
from moco_dist.config.moco import MocoConfig
from moco_dist.config.yaml_files import flat
from moco_dist.encoders import original
from moco_dist.encoders.library_folder import PROCESSOR
from moco_dist.encoders.load import Found
from moco_dist.encoders.names import from_detectron2, to_detectron2, to_huggingface
from moco_dist.errors import ConfigError, MissingError, counted
from moco_dist.method.encoder import Backbone
from moco_dist.method.moco import REMEMBERED
from moco_dist.method.residual_blocks import BasicBlock

_RGB = "its images have three channels"
_WIDTH = "its models have 64 channels in stage 1"
_STEM = "its ResNets begin with a 7x7 convolution and pooling"
_TIMM = "the backbone comes from timm"
HALVES = "it is two backbones, of L and of a and b, behind a conversion of RGB to Lab"


def tensors(found: Found) -> dict[str, Tensor]:
    """Return the backbone's tensors under torchvision's names for ResNets, or timm's."""
    return {name: t.contiguous() for name, t in found.backbone.state_dict().items()}


def needs(module: str, target: str, packages: str) -> None:
    """Raise MissingError unless `module` can be imported."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise MissingError(
            f"--to {target} builds the model to check the export, but {module} is not installed; "
            f"pip install {packages}"
        ) from error


def refuse(found: Found, target: str, holds: bool, reason: str, others: str) -> None:
    """Raise ConfigError with `reason` unless the target holds the architecture."""
    config = found.architecture
    if config.stem == "cifar":  # huggingface can't hold it either
        others = others.replace(" or huggingface", "")
    if config.width != 64:  # nor can these
        others = others.removeprefix("timm or ").removeprefix("torchvision or ")
    if not holds:
        raise ConfigError(
            f"{target} can't hold this encoder ({config.backbone}, width {config.width}, "
            f"{config.stem} stem, {counted(config.channels, 'channel')}): {reason}; use --to "
            f"{others}"
        )


def torchvision(found: Found, folder: Path) -> str:
    """Write model.safetensors for torchvision's own models; the published width only."""
    config = found.architecture
    refuse(found, "torchvision", not config.is_timm, _TIMM, "timm or onnx")
    refuse(found, "torchvision", config.width == 64, _WIDTH, "onnx or huggingface")
    save_file(tensors(found), folder / "model.safetensors", {"format": "pt"})
    build = f"torchvision.models.{config.backbone}()\nmodel.fc = torch.nn.Identity()"
    return _loading("torchvision", build, config)


def timm(found: Found, folder: Path) -> str:
    """Write model.safetensors and config.json, a folder that timm loads; width 64 only."""
    needs("timm", "timm", "timm")
    config, views = found.architecture, found.fed
    name = config.backbone.removeprefix("timm/")
    refuse(found, "timm", config.width == 64, _WIDTH, "onnx or huggingface")
    save_file(tensors(found), folder / "model.safetensors", {"format": "pt"})
    if not config.is_timm and config.stem == "cifar":
        return _loading("timm", f'timm.create_model("{name}", num_classes=0)', config)
    import timm as library

    usual = library.get_pretrained_cfg(name)
    args = {k: v for k, v in config.settings.items() if k != "weight_init"}
    if getattr(found.backbone, "dynamic_img_size", False):
        args["dynamic_img_size"] = True
    described = {
        "architecture": name,
        "num_classes": 0,
        "num_features": found.backbone.num_features,
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [config.channels, views.size, views.size],
            "mean": list(views.mean),
            "std": list(views.std),
            "crop_pct": views.size / max(found.resize, views.size),
            "interpolation": found.filter,
            "fixed_input_size": False,
            "num_classes": 0,
            # Where timm puts a new classifier, and the layer that it adapts to other channels.
            "classifier": usual.classifier if usual else "fc",
            "first_conv": usual.first_conv if usual else "conv1",
        },
    }
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
    channels = "" if config.channels == 3 else f", in_chans={config.channels}"
    return f"""\
import timm

model = timm.create_model(f"local-dir:{{folder}}", pretrained=True{channels})
features = model.eval()(images)
"""


def huggingface(found: Found, folder: Path) -> str:
    """Write a folder that transformers' ResNetModel loads; ordinary ResNets with ImageNet stem."""
    config = found.architecture
    plain = re.fullmatch(r"resnet\d+", config.backbone) is not None
    reason = "its ResNets have no groups and no wider blocks"
    refuse(found, "huggingface", plain, reason, "timm or onnx")
    refuse(found, "huggingface", config.stem == "imagenet", _STEM, "timm or onnx")
    needs("transformers", "huggingface", "transformers")
    from transformers import ResNetConfig, ResNetModel

    backbone = found.backbone
    assert isinstance(backbone, Backbone), "a ResNet of torchvision"
    stages = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
    described = ResNetConfig(
        num_channels=config.channels,
        embedding_size=config.width,
        hidden_sizes=[backbone.num_features // 8 * 2**i for i in range(4)],
        depths=[len(stage) for stage in stages],
        layer_type="basic" if isinstance(backbone.layer1[0], BasicBlock) else "bottleneck",
    )
    model = ResNetModel(described)
    model.load_state_dict({to_huggingface(name): t for name, t in tensors(found).items()})
    model.save_pretrained(folder)
    fed = found.fed
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": config.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": max(found.resize, fed.size)},
        "resample": Image.Resampling[found.filter.upper()].value,
        "do_center_crop": True,
        "crop_size": {"height": fed.size, "width": fed.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(fed.mean),
        "image_std": list(fed.std),
    }
    (folder / PROCESSOR).write_text(json.dumps(processor, indent=1) + "\n")
    return """\
from transformers import ResNetModel

model = ResNetModel.from_pretrained(folder)
features = model.eval()(images).pooler_output.flatten(1)
"""


def detectron2(found: Found, folder: Path) -> str:
    """Write backbone.pkl for MODEL.WEIGHTS; ImageNet stem only.

    The check runs without detectron2: an independent map translates the names back.
    """
    config = found.architecture
    refuse(found, "detectron2", not config.is_timm, _TIMM, "timm or onnx")
    refuse(found, "detectron2", config.stem == "imagenet", _STEM, "timm or onnx")
    refuse(found, "detectron2", config.channels == 3, _RGB, "timm or onnx")
    arrays = {
        to_detectron2(name): t.numpy()
        for name, t in tensors(found).items()
        if not name.endswith("num_batches_tracked")  # its frozen BatchNorm doesn't count
    }
    content = {"model": arrays, "__author__": "moco_dist", "matching_heuristics": True}
    with (folder / "backbone.pkl").open("wb") as file:
        pickle.dump(content, file)
    check = Backbone(config, nn.BatchNorm2d)
    back = {from_detectron2(name): torch.from_numpy(array) for name, array in arrays.items()}
    counts = {k: v for k, v in check.state_dict().items() if k.endswith("num_batches_tracked")}
    check.fc = nn.Identity()  # type: ignore[assignment]
    check.load_state_dict(back | counts)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same(check.eval()(images), found.backbone(images), "detectron2")
    return ""


def moco(found: Found, folder: Path) -> str:
    """Write model.pth.tar like the original scripts: both encoders, heads and queue."""
    config, state, model = found.architecture, found.checkpoint.state, found.checkpoint.model
    refuse(found, "moco", not config.is_timm, _TIMM, "timm or onnx")
    refuse(found, "moco", config.width == 64, _WIDTH, "onnx or huggingface")
    refuse(found, "moco", config.channels == 3, _RGB, "torchvision or onnx")
    whole = "query_encoder.head.0.weight" in model
    refuse(found, "moco", whole, "its file has no projection head", "torchvision or onnx")
    trained = state.get("config")
    settings = MocoConfig.stored(flat(trained)) if isinstance(trained, dict) else None
    fills = settings is None or settings.fills
    refuse(found, "moco", fills, "its run had no queue of keys", "torchvision or onnx")
    usual = config.head_layers == 2 and config.head_width in (0, found.backbone.num_features)
    theirs = config.head != "mlp_bn" and usual
    reason = "its heads are a linear layer, or an MLP of two layers as wide as the features"
    refuse(found, "moco", theirs, reason, "torchvision or onnx")
    epoch, count = int(state.get("epoch") or 0), state.get(REMEMBERED) or 0
    torch.save(original.write(model, config, epoch, count), folder / "model.pth.tar")
    head = """\
size = model.fc.in_features
model.fc = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.ReLU(), model.fc)
"""
    return f"""\
import torch, torchvision

saved = torch.load(f"{{folder}}/model.pth.tar", weights_only=True)
tensors, prefix = saved["state_dict"], "module.encoder_q."
own = {{k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}}
model = torchvision.models.__dict__[saved["arch"]](num_classes={config.dim})
{head if config.head == "mlp" else ""}{_stem(config)}model.load_state_dict(own)
model.fc = torch.nn.Identity()
features = model.eval()(images)
"""


def onnx(found: Found, folder: Path) -> str:
    """Write model.onnx, from any number of normalised images to features."""
    for module in ("onnx", "onnxscript", "onnxruntime"):
        needs(module, "onnx", "onnx onnxscript onnxruntime")
    size = found.fed.size
    torch.onnx.export(
        found.backbone,
        (torch.zeros(2, found.architecture.channels, size, size),),
        folder / "model.onnx",
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes={"x": {0: torch.export.Dim("rows")}},
        external_data=False,
        verbose=False,
    )
    return """\
import onnxruntime, torch

session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
(found,) = session.run(["features"], {"images": images.numpy()})
features = torch.from_numpy(found)
"""


def _loading(library: str, build: str, config: EncoderConfig) -> str:
    """Return the code that loads model.safetensors into the model that `build` makes."""
    return f"""\
import torch, {library}
from safetensors.torch import load_file

model = {build}
{_stem(config)}model.load_state_dict(load_file(f"{{folder}}/model.safetensors"))
features = model.eval()(images)
"""


def _stem(config: EncoderConfig) -> str:
    """Return the code that replaces the first layer of a library's ResNet if it differs."""
    layer = f"model.conv1 = torch.nn.Conv2d({config.channels}, {config.width}, "
    if config.stem == "cifar":
        layer += "kernel_size=3, padding=1, bias=False)\n"
        return layer + "model.maxpool = torch.nn.Identity()\n"
    layer += "kernel_size=7, stride=2, padding=3, bias=False)\n"
    return "" if config.channels == 3 else layer


def same(theirs: Tensor, ours: Tensor, target: str) -> None:
    """Raise AssertionError if features differ by more than 1e-5, relative to values above 1."""
    assert theirs.shape == ours.shape, f"{target}: {tuple(theirs.shape)}, not {tuple(ours.shape)}"
    worst = float((theirs - ours).abs().max() / ours.abs().max().clamp(min=1))
    assert worst <= 1e-5, f"{target}: its features differ by {worst:.1e} from the encoder's"


TARGETS: Mapping[str, Callable[[Found, Path], str]] = {
    "torchvision": torchvision,
    "timm": timm,
    "huggingface": huggingface,
    "detectron2": detectron2,
    "moco": moco,
    "onnx": onnx,
}


def run_lines(lines: str, folder: Path, images: Tensor) -> Tensor:
    """Return the features that an exporter's lines compute."""
    names: dict[str, Any] = {"folder": str(folder), "images": images}
    with torch.no_grad():
        exec(compile(lines, "README.md", "exec"), names)
    found = names["features"]
    assert isinstance(found, Tensor), "the lines set features"
    return found
