"""Files of tensors from any source: read without running code in them, and their architecture."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor

from moco_dist.config.recipe import BACKBONES, EncoderConfig
from moco_dist.config.yaml_files import from_dict
from moco_dist.encoders import names
from moco_dist.errors import ConfigError, DataError, MissingError, shown
from moco_dist.method.encoder import build_encoder
from moco_dist.runs import checkpoint

SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".ckpt")
_MOST = 2**34  # bytes of a file, fifty times the largest ResNet
_STEMS = {3: "cifar", 7: "imagenet"}
_COUNTER = "num_batches_tracked"


def read(path: Path) -> tuple[Mapping[Any, Any], str]:
    """Return the content of a file of tensors, and its SHA-256; MissingError or DataError."""
    if not path.is_file():
        raise MissingError(f"{path}: no such file; give a state dict, or the run that it is of")
    if not path.name.endswith(SUFFIXES):
        raise DataError(
            f"{path}: encoders are not read from such files, but from {', '.join(SUFFIXES)}; give "
            "one of these, a run directory, or one of its checkpoints/step_... folders"
        )
    if path.stat().st_size > _MOST:
        raise DataError(
            f"{path}: {path.stat().st_size:,} bytes are more than any encoder has; use another file"
        )
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds for bytes that are no tensors
        reason = shown(" ".join(str(error).split()) or repr(error), 200)
        raise DataError(
            f"{path}: can't be read as tensors alone ({reason}); save the encoder's state_dict() "
            "as a .safetensors file"
        ) from error
    return (content if isinstance(content, Mapping) else {"state_dict": content}), sha256


def backbone(
    content: Mapping[Any, Any], path: Path, like: EncoderConfig | None
) -> tuple[dict[str, Tensor], EncoderConfig, list[str], str]:
    """Return a backbone's tensors, its architecture, the names left out, and whose names these are.

    Only known names are renamed, and only known heads are left out: those of a state dict, or of a
    checkpoint of lightly or solo-learn. A model of timm is recognised only as `like`. Raises
    DataError for anything else.
    """
    tensors = _unwrapped(content, path)
    library, renamed, unknown = names.from_library(tensors)
    if unknown:
        raise DataError(
            f"{path}: {shown(', '.join(unknown[:3]))} is neither of the backbone nor known from "
            "lightly and solo-learn; remove it from the file: nothing is left out here silently"
        )
    timm = backbone_shapes(like, path) if like and like.is_timm else {}
    fits = bool(timm) and all(name in tensors or name.endswith(_COUNTER) for name in timm)
    heads = [k for k in tensors if k.startswith(names.HEADS) and k not in timm]
    left = [k for k in tensors if k not in renamed] if library else heads
    kept = {renamed.get(k, k): each for k, each in tensors.items() if k not in left}
    config = like if like and fits else infer(kept, path)
    if library == "solo-learn" and config.stem == "cifar":
        raise DataError(
            f"{path}: solo-learn pads the first convolution of its CIFAR encoders by 2 pixels "
            "instead of 1, which gives other features; to start a pretraining from these weights "
            "all the same, save the backbone's state dict under torchvision's names"
        )
    return kept, config, left, library


def _unwrapped(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file without what a training script wraps them in."""
    inner = content.get("state_dict", content.get("model", content))
    others = [f"a {type(inner).__name__}"]
    if isinstance(inner, Mapping):
        others = [str(name) for name, each in inner.items() if not isinstance(each, Tensor)]
        others = others if inner else ["nothing"]
    if others:
        raise DataError(
            f"{path}: is no state dict, it holds {shown(', '.join(others[:3]))}; "
            "save only the encoder's state_dict(), names to tensors, in a file"
        )
    tensors = {str(name): each for name, each in inner.items()}
    if all(name.startswith("module.") for name in tensors):  # DistributedDataParallel
        tensors = {name.removeprefix("module."): each for name, each in tensors.items()}
    return tensors


def infer(tensors: Mapping[str, Tensor], path: Path) -> EncoderConfig:
    """Return the architecture that names and shapes are nearest to; DataError if no ResNet's."""
    stem = tensors.get("conv1.weight")
    if stem is None or stem.dim() != 4:
        first = ", ".join(shown(name, 60) for name in list(tensors)[:3])
        near = next((name for name in tensors if name.endswith(".conv1.weight")), "")
        prefix = near.removesuffix("layer1.0.conv1.weight").removesuffix("conv1.weight")
        hint = f"take '{shown(prefix, 60)}' from its names" if prefix else "rename its tensors"
        raise DataError(
            f"{path}: has no conv1.weight as a torchvision ResNet has, it holds {first}; {hint}: "
            "nothing is renamed here, so that no tensor is lost silently"
        )
    nearest, most = None, 0
    for name in BACKBONES:
        settings = {"backbone": name, "channels": stem.shape[1], "width": stem.shape[0]}
        try:
            config = from_dict(EncoderConfig, settings | {"stem": _STEMS.get(stem.shape[-1])})
        except ConfigError:
            continue
        own = backbone_shapes(config, path)
        same = sum(tensors[k].shape == v.shape for k, v in own.items() if k in tensors)
        missing = len(own.keys() - tensors.keys())
        if same == len(tensors) and not missing:  # no other is as near
            return config
        if nearest is None or same - missing > most:
            nearest, most = config, same - missing
    if nearest is None:
        raise DataError(
            f"{path}: its first convolution is {tuple(stem.shape)}, and its other tensors are "
            f"those of none of {', '.join(BACKBONES)} with a stem of 3 or 7 pixels; give one of "
            "these"
        )
    return nearest


def shapes(config: EncoderConfig, path: Path) -> dict[str, Tensor]:
    """Return an encoder's tensors without content; DataError if it can't be built."""
    try:
        with torch.device("meta"):  # needs no memory, whatever sizes a stranger wrote
            return build_encoder(config, seed=0).state_dict()
    except (ConfigError, RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise DataError(f"{path}: not readable by this version ({reason})") from error


def backbone_shapes(config: EncoderConfig, path: Path) -> dict[str, Tensor]:
    """Return `shapes` of the backbone alone, under its own names."""
    prefix = "backbone."
    return {k.removeprefix(prefix): v for k, v in shapes(config, path).items() if prefix in k}


def filled(config: EncoderConfig, tensors: Mapping[str, Tensor], path: Path) -> Any:
    """Return a backbone with these tensors, frozen, float32, on the CPU, in evaluation mode.

    Raises DataError unless they are exactly the backbone's; all num_batches_tracked may be missing,
    as evaluation doesn't use them and old versions didn't write them.
    """
    own = backbone_shapes(config, path)
    zero = torch.zeros((), dtype=torch.int64)
    counters = {name: zero for name in own if name.endswith(_COUNTER)}
    if not counters.keys() & tensors.keys():
        tensors = {**tensors, **counters}
    checkpoint.check_tensors(own, tensors, path)
    found = build_encoder(config, seed=0).backbone
    checkpoint.load_tensors(found, tensors, path)
    return found.requires_grad_(False).eval()
