"""Trained encoders from files, for anyone's code and as the start of a pretraining."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from moco_dist.config.recipe import EncoderConfig, ViewsConfig
from moco_dist.config.yaml_files import from_dict
from moco_dist.encoders import checkpoints, original
from moco_dist.encoders.names import READABLE
from moco_dist.errors import ConfigError, DataError, MissingError, output_errors, shown
from moco_dist.method import views
from moco_dist.method.batch_norm import batch_norms
from moco_dist.method.encoder import Encoder, build_encoder
from moco_dist.runs import checkpoint
from moco_dist.runs.checkpoint import Checkpoint

# The file of an exported folder that says what is in it.
DESCRIPTION = "moco_dist.json"
# What a run notes of the weights that it started with.
STARTED = "init_from.json"


class TrainedEncoder(nn.Module):
    """A frozen backbone behind the view of evaluation that it was trained for."""

    def __init__(
        self, backbone: nn.Module, config: EncoderConfig, view: ViewsConfig, resize: int
    ) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.config, self.view, self.resize = config, view, resize
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, float (n, length), of uint8 images (n, c, height, width).

        The shorter side is resized to what the training images had, and the centre is cut out.
        """
        assert images.dtype == torch.uint8, f"images are uint8 in [0, 255], not {images.dtype}"
        if min(images.shape[2:]) != self.resize:
            bicubic = functional.InterpolationMode.BICUBIC
            images = functional.resize(images, [self.resize], bicubic, antialias=True)
        features: Tensor = self.backbone(views.center(images, self.view))
        return features


def load_encoder(path: str | Path, encoder: Literal["query", "key"] = "query") -> TrainedEncoder:
    """Return the encoder of a run, a checkpoint folder, an exported folder or a file.

    A run gives its newest whole checkpoint; a file is one of an exported folder, or a checkpoint
    of the original MoCo scripts (model.pth.tar). It is float32, on the CPU, frozen, in evaluation
    mode; every tensor of it was in the file, and no other. Raises MissingError or DataError.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    if (folder / DESCRIPTION).is_file() and not path.name.endswith(original.SUFFIXES):
        return _exported(folder)
    found = checkpoints.find(path)
    whole, config, view = checkpoints.load_encoder(chosen(found, encoder))
    return TrainedEncoder(whole.backbone, config, view, resize_of(found, view))


def chosen(found: Checkpoint, encoder: Literal["query", "key"]) -> Checkpoint:
    """Return a checkpoint whose query encoder is the one that was chosen."""
    if encoder == "query":
        return found
    keys = {k: v for k, v in found.model.items() if k.startswith("key_encoder.")}
    if not keys:
        raise DataError(f"{found.path}: has no key encoder; use the query encoder")
    model = {f"query_encoder.{k.removeprefix('key_encoder.')}": v for k, v in keys.items()}
    return replace(found, model=model)


def resize_of(found: Checkpoint, view: ViewsConfig) -> int:
    """Return to how many pixels the shorter side of training images was resized."""
    config = found.state.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    size = data.get("size") if isinstance(data, dict) else None
    return size if isinstance(size, int) and size >= view.size else view.size


def _exported(folder: Path) -> TrainedEncoder:
    """Return the encoder of a folder that moco_dist.export wrote."""
    source = folder / DESCRIPTION
    try:
        described = json.loads(source.read_bytes())
        target, resize = described["target"], int(described["resize"])
        config = from_dict(EncoderConfig, described["encoder"])
        view = from_dict(ViewsConfig, described["views"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise DataError(f"{source}: can't be read ({error!r}); export it again") from error
    if target == "moco":  # the file itself doesn't know with which views it was trained
        whole, config, _ = checkpoints.load_encoder(checkpoints.find(folder / "model.pth.tar"))
        return TrainedEncoder(whole.backbone, config, view, resize)
    if target not in READABLE:
        raise DataError(
            f"{folder}: an export for {shown(target)} can't be read back; give the run that it is "
            f"of, or an export for {', '.join(READABLE)}"
        )
    tensors = _tensors(folder / "model.safetensors")
    named = {READABLE[target](name): tensor for name, tensor in tensors.items()}
    backbone = build_encoder(config, seed=0).backbone
    checkpoint.load_tensors(backbone, named, folder / "model.safetensors")
    return TrainedEncoder(backbone, config, view, resize)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such file; export it again") from error
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: no whole safetensors file ({error}); use another one") from error


def note_start(directory: Path, path: Path, taken: list[str], left: list[str]) -> None:
    """List what `start_from` has returned in the run's init_from.json."""
    listed = {"source": str(path), "taken": taken, "left": left}
    with output_errors(directory):
        (directory / STARTED).write_text(json.dumps(listed, indent=1) + "\n")


def start_sentence(directory: Path) -> str:
    """Return what `note_start` noted in a run directory, in words."""
    noted = json.loads((directory / STARTED).read_text())
    left = noted["left"]
    names = ", ".join(map(shown, left[:4])) + (", ..." if len(left) > 4 else "")
    return (
        f"{shown(noted['source'])}: {len(noted['taken'])} tensors for the backbone, {len(left)} "
        f"left{f' ({names})' if left else ''}; {STARTED} lists them"
    )


def start_from(encoder: Encoder, path: Path) -> tuple[list[str], list[str]]:
    """Give the backbone the tensors of `path`; return the names taken and those left.

    `path` is what `load_encoder` takes, or a state dict of torchvision or timm: .safetensors, or
    what torch.save wrote. Every tensor of the backbone must be in it, with its shape: DataError
    otherwise. The classifier or projection head of the file is left.
    """
    if not path.exists():
        raise MissingError(f"init_from={path}: no such file or folder; give a state dict or a run")
    plain = path.is_file() and not (path.parent / DESCRIPTION).is_file()
    tensors: Mapping[str, Any]
    if plain and path.suffix == ".safetensors":
        tensors = _tensors(path)
    elif plain:
        tensors = _state_dict(original.load_pickle(path))
        if any(name.startswith("encoder_q.") for name in tensors):
            tensors = load_encoder(path).backbone.state_dict()
    else:
        tensors = load_encoder(path).backbone.state_dict()
    own = encoder.backbone.state_dict()
    # The counters of BatchNorm are no weights, and older files lack them.
    counters = {name for name in own if name.endswith("num_batches_tracked")} - tensors.keys()
    taken = {name: tensor for name, tensor in tensors.items() if name in own}
    needed = {name: tensor for name, tensor in own.items() if name not in counters}
    checkpoint.check_tensors(needed, taken, path)
    with torch.no_grad():
        for name, tensor in needed.items():
            tensor.copy_(taken[name])
        for norm in batch_norms(encoder):
            norm.group_mean.copy_(norm.running_mean)
            norm.group_var.copy_(norm.running_var)
    return sorted(taken), sorted(tensors.keys() - own.keys())


def _state_dict(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors of a file of torch.save, without the wrappings that training leaves."""
    inner = content.get("state_dict", content.get("model", content))
    tensors = {str(k): v for k, v in inner.items()} if isinstance(inner, dict) else {}
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): v for name, v in tensors.items()}
    return {name: v for name, v in tensors.items() if isinstance(v, Tensor)}
