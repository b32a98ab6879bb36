"""Encoders from elsewhere: a file with the state dict of a torchvision ResNet.

Which ResNet it is shows in the names and shapes: blocks and their kind, width, and stem.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import torch as safetensors
from torch import Tensor

from moco_dist.config.recipe import EncoderConfig
from moco_dist.errors import DataError, MissingError, shown
from moco_dist.method.encoder import Backbone, build_encoder
from moco_dist.runs import checkpoint

# Bytes that a file may have; the largest ResNet here has a fiftieth.
_MOST = 2**34
_STAGES: dict[tuple[str, tuple[int, ...]], str] = {
    ("basic", (2, 2, 2, 2)): "resnet18",
    ("basic", (3, 4, 6, 3)): "resnet34",
    ("bottleneck", (3, 4, 6, 3)): "resnet50",
    ("bottleneck", (3, 4, 23, 3)): "resnet101",
}
_STEMS = {3: "cifar", 7: "imagenet"}
_CLASSIFIER = ("fc.weight", "fc.bias")


def load(path: Path) -> tuple[Backbone, EncoderConfig, str]:
    """Return the backbone in a file, frozen, in evaluation mode; its architecture; its SHA-256.

    A classifier `fc`, if there is one, is left out. Nothing is renamed, and every other tensor must
    be there and no more, but for num_batches_tracked, which evaluation doesn't use. Raises
    MissingError, or DataError with what is wrong.
    """
    tensors, sha256 = read(path)
    tensors = {name: each for name, each in tensors.items() if name not in _CLASSIFIER}
    architecture = infer(tensors, path)
    backbone = build_encoder(architecture, seed=0).backbone
    own = backbone.state_dict()
    counters = {name: each for name, each in own.items() if name.endswith("num_batches_tracked")}
    if not counters.keys() & tensors.keys():  # files of old versions have none
        tensors |= counters
    checkpoint.check_tensors(own, tensors, path)
    checkpoint.load_tensors(backbone, tensors, path)
    return backbone.requires_grad_(False).eval(), architecture, sha256


def read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a file by name, and its SHA-256; no code in it is run."""
    if not path.is_file():
        raise MissingError(f"{path}: no such file; give the state dict of a torchvision ResNet")
    if path.stat().st_size > _MOST:
        raise DataError(f"{path}: {path.stat().st_size} bytes are more than any encoder has")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: the readers raise many for bytes that are no tensors
        reason = shown(" ".join(str(error).split()) or repr(error), 200)
        raise DataError(
            f"{path}: can't be read as tensors alone ({reason}); save the encoder's state_dict() "
            "as a .safetensors file"
        ) from error
    others = ["nothing"]
    if isinstance(content, Mapping) and content:
        others = [str(name) for name, each in content.items() if not isinstance(each, Tensor)]
    elif not isinstance(content, Mapping):
        others = [f"a {type(content).__name__}"]
    if others:
        raise DataError(
            f"{path}: is no state dict, it holds {shown(', '.join(others[:3]))}; "
            "save the encoder's own state_dict(), names to tensors, in a file for itself"
        )
    return {str(name): each for name, each in content.items()}, sha256


def infer(tensors: Mapping[str, Tensor], path: Path) -> EncoderConfig:
    """Return the architecture that names and shapes show; DataError if it is none of ours."""
    stem = tensors.get("conv1.weight")
    if stem is None or stem.dim() != 4:
        first = ", ".join(shown(name, 60) for name in list(tensors)[:3])
        near = next((name for name in tensors if name.endswith(".conv1.weight")), "")
        prefix = near.removesuffix("layer1.0.conv1.weight").removesuffix("conv1.weight")
        hint = f"take '{shown(prefix, 60)}' from its names" if prefix else "rename its tensors"
        raise DataError(
            f"{path}: has no conv1.weight as a torchvision ResNet has, it holds {first}; {hint}: "
            "nothing is renamed here, so that no tensor is lost without a word"
        )
    blocks = tuple(_blocks(tensors, stage) for stage in (1, 2, 3, 4))
    kind = "bottleneck" if "layer1.0.conv3.weight" in tensors else "basic"
    name, sort = _STAGES.get((kind, blocks)), _STEMS.get(stem.shape[-1])
    if name is None or sort is None:
        raise DataError(
            f"{path}: {kind} blocks {'-'.join(map(str, blocks))} behind a {stem.shape[-1]}-pixel "
            f"convolution are none of {', '.join(_STAGES.values())} "
            "with a stem of 3 or 7 pixels; give one of these"
        )
    return EncoderConfig(
        backbone=cast(Any, name),
        channels=stem.shape[1],
        width=stem.shape[0],
        stem=cast(Any, sort),
    )


def _blocks(tensors: Mapping[str, Tensor], stage: int) -> int:
    prefix = f"layer{stage}."
    numbers = {name.split(".")[1] for name in tensors if name.startswith(prefix)}
    return len(numbers)
