"""The checkpoints of the original MoCo scripts: their names for the tensors, both ways.

They hold {"epoch", "arch", "state_dict"}: under `module.encoder_q.` and `module.encoder_k.` a
ResNet of torchvision whose `fc` is the projection head, `module.queue` (dim, size) and
`module.queue_ptr` (1,), the slot to write next (facebookresearch/moco, moco/builder.py).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_dist.config.recipe import BACKBONES, EncoderConfig, ViewsConfig
from moco_dist.config.yaml_files import from_dict, to_dict
from moco_dist.errors import ConfigError, DataError, shown
from moco_dist.method.encoder import build_encoder
from moco_dist.runs import checkpoint
from moco_dist.runs.checkpoint import Checkpoint

SUFFIXES = (".pth", ".pth.tar", ".pt", ".tar")

_ENCODERS = {"query_encoder.": "module.encoder_q.", "key_encoder.": "module.encoder_k."}
# Head of ours to `fc` of theirs; with one layer `fc` is that layer.
_HEADS = {"mlp": {"head.0.": "fc.0.", "head.2.": "fc.2."}, "linear": {"head.0.": "fc."}}
# What the original scripts feed their encoders: ImageNet's mean and standard deviation at 224
# pixels; the authors' CIFAR-10 demo, which has the 3x3 stem, CIFAR-10's at 32.
_IMAGENET = {"size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def write(model: Mapping[str, Tensor], config: EncoderConfig, epoch: int, enqueued: int) -> Any:
    """Return the content of an original checkpoint with the tensors of one of ours.

    `model` may lack the key encoder and the queue. Slots of the queue that hold no key are zero.
    Raises ConfigError for a backbone that isn't torchvision's.
    """
    if config.is_timm:
        raise ConfigError(
            f"{config.backbone} can't stand in a checkpoint of the original scripts, which know "
            "torchvision's ResNets; use --to timm or --to onnx"
        )
    tensors: dict[str, Tensor] = {}
    for ours, theirs in _ENCODERS.items():
        names = {f"{ours}backbone.": theirs}
        names |= {ours + k: theirs + v for k, v in _HEADS[config.head].items()}
        tensors |= _renamed(model, names)
    if "queue.keys" in model:
        keys = model["queue.keys"]
        tensors["module.queue"] = keys.T.contiguous()
        tensors["module.queue_ptr"] = torch.tensor([enqueued % len(keys)])
    return {"epoch": epoch, "arch": config.backbone, "state_dict": tensors}


def read(path: Path) -> Checkpoint:
    """Return the original checkpoint in a file as one of ours.

    The file is a pickle, read with `weights_only`, so that it can't run code. The views of its
    configuration are those of the original scripts. Raises DataError for another content.
    """
    content = load_pickle(path)
    tensors, arch = content.get("state_dict"), content.get("arch")
    if not isinstance(tensors, dict) or not any("encoder_q." in str(name) for name in tensors):
        raise DataError(
            f"{path}: no checkpoint of the original MoCo scripts, which have "
            "module.encoder_q.* under 'state_dict'; give a run, a checkpoint folder or another file"
        )
    if arch not in BACKBONES:
        raise DataError(
            f"{path}: its 'arch' is {shown(arch)}, not one of {', '.join(BACKBONES)}; "
            "use another checkpoint"
        )
    # Saved from within DistributedDataParallel, or without.
    tensors = {"module." + str(k).removeprefix("module."): v for k, v in tensors.items()}
    config = _architecture(path, arch, tensors)
    model: dict[str, Tensor] = {}
    for ours, theirs in _ENCODERS.items():
        names = {theirs + v: ours + k for k, v in _HEADS[config.head].items()}
        model |= _renamed(tensors, names | {theirs: f"{ours}backbone."})
    enqueued = 0
    left = {name for name in tensors if not name.startswith(tuple(_ENCODERS.values()))}
    if left == {"module.queue", "module.queue_ptr"}:
        queue, place = tensors["module.queue"], tensors["module.queue_ptr"]
        if queue.shape[:-1] != (config.dim,) or place.numel() != 1:
            raise DataError(
                f"{path}: the queue is {tuple(queue.shape)} with {place.numel()} places to write, "
                f"not ({config.dim}, size) with one; use another checkpoint"
            )
        model["queue.keys"] = queue.T.contiguous()
        size, slot = len(model["queue.keys"]), int(place)
        # Nobody knows which images they are of.
        model["queue.samples"] = torch.full((size,), -1)
        full = bool(model["queue.keys"][slot:].any())
        enqueued = slot + size * full
    elif left:
        raise DataError(f"{path}: {shown(min(left))} is not expected; use another checkpoint")
    with torch.device("meta"):
        shapes = build_encoder(config, seed=0).state_dict()
    for ours in _ENCODERS:
        own = {k.removeprefix(ours): v for k, v in model.items() if k.startswith(ours)}
        if own or ours == "query_encoder.":
            checkpoint.check_tensors(shapes, own, path)
    views = ViewsConfig() if config.stem == "cifar" else from_dict(ViewsConfig, _IMAGENET)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    settings = {"encoder": to_dict(config), "views": to_dict(views)}
    epoch = content.get("epoch")
    state = {"config": settings, "epoch": epoch, "enqueued": enqueued, "sha256": digest}
    return Checkpoint(path, 0, model, {}, state)


def is_one(path: Path) -> bool:
    """Return whether a file holds a checkpoint of the original scripts."""
    if not path.name.endswith(SUFFIXES):
        return False
    try:
        tensors = load_pickle(path).get("state_dict")
    except DataError:
        return False
    return isinstance(tensors, dict) and any("encoder_q." in str(name) for name in tensors)


def load_pickle(path: Path) -> dict[Any, Any]:
    """Return the dict that torch.save wrote to a file; DataError if it holds code or no dict."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind for bytes that are no such file
        reason = shown(" ".join(str(error).split())[:200])
        raise DataError(
            f"{path}: not a file of tensors that torch.save wrote ({reason}); use another file"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not tensors; use another file")
    return content


def _architecture(path: Path, arch: str, tensors: Mapping[str, Any]) -> EncoderConfig:
    """Return the configuration that the shapes of an original query encoder stand for."""
    fc = "module.encoder_q.fc."
    head = "mlp" if f"{fc}2.weight" in tensors else "linear"
    last, first = tensors.get(f"{fc}{'2.' if head == 'mlp' else ''}weight"), "conv1.weight"
    stem = tensors.get(f"module.encoder_q.{first}")
    if not all(isinstance(tensor, Tensor) for tensor in (*tensors.values(), last, stem)):
        raise DataError(
            f"{path}: holds no module.encoder_q.{first} or no {fc}weight, or another thing than "
            "tensors; use the file that the pretraining saved"
        )
    assert last is not None, "was looked at above"
    assert stem is not None, "likewise"
    settings = {
        "backbone": arch,
        "width": len(stem),
        "stem": "cifar" if stem.shape[-1] == 3 else "imagenet",
        "head": head,
        "dim": len(last),
    }
    try:
        return from_dict(EncoderConfig, settings)
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from error


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with one of `names`, the first that fits, renamed."""
    renamed = {}
    for name, tensor in tensors.items():
        start = next((old for old in names if name.startswith(old)), None)
        if start is not None:
            renamed[names[start] + name.removeprefix(start)] = tensor
    return renamed
