"""Reading and writing checkpoints of the original MoCo scripts.

They hold {"epoch", "arch", "state_dict"}: under `module.encoder_q.` and `module.encoder_k.` a
torchvision ResNet whose `fc` is the projection head, `module.queue` (dim, size) and
`module.queue_ptr` (1,), the slot to write next (facebookresearch/moco, moco/builder.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_dist.config.encoder import BACKBONES, EncoderConfig
from moco_dist.config.recipe import ViewsConfig
from moco_dist.config.yaml_files import from_dict, to_dict
from moco_dist.encoders import state_dict
from moco_dist.errors import ConfigError, DataError, shown
from moco_dist.runs import checkpoint
from moco_dist.runs.checkpoint import Checkpoint

_ENCODERS = {"query_encoder.": "module.encoder_q.", "key_encoder.": "module.encoder_k."}
_HEADS = {"mlp": {"head.0.": "fc.0.", "head.2.": "fc.2."}, "linear": {"head.0.": "fc."}}
# Views of the original scripts; the authors' demo of CIFAR-10 has the 3x3 stem and our defaults.
_IMAGENET = {"size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def write(model: Mapping[str, Tensor], config: EncoderConfig, epoch: int, enqueued: int) -> Any:
    """Return the content of an original checkpoint with the tensors of one of ours.

    `model` may lack the key encoder and the queue. Empty slots of the queue are zero. The backbone
    is a ResNet of torchvision's.
    """
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


def is_one(content: Mapping[Any, Any]) -> bool:
    """Return whether the content of a file is a checkpoint of the original scripts."""
    tensors = content.get("state_dict")
    named = isinstance(tensors, Mapping) and any("encoder_q." in str(name) for name in tensors)
    return named and "arch" in content  # others hold an encoder_q too


def read(path: Path, content: Mapping[Any, Any], sha256: str) -> Checkpoint:
    """Return an original checkpoint as one of ours, with the views of the original scripts.

    Raises DataError if it is not whole.
    """
    tensors, arch = content["state_dict"], content.get("arch")
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
        keys, slot = queue.T.contiguous(), int(place)
        # Their images are not known.
        model |= {"queue.keys": keys, "queue.samples": torch.full((len(keys),), -1)}
        enqueued = slot + len(keys) * bool(keys[slot:].any())
    elif left:
        raise DataError(f"{path}: {shown(min(left))} is not expected; use another checkpoint")
    shapes = state_dict.shapes(config, path)
    for ours in _ENCODERS:
        own = {k.removeprefix(ours): v for k, v in model.items() if k.startswith(ours)}
        if own or ours == "query_encoder.":
            checkpoint.check_tensors(shapes, own, path)
    settings = {"encoder": to_dict(config), "views": to_dict(usual_views(config))}
    epoch = content.get("epoch")
    state = {"config": settings, "epoch": epoch, "enqueued": enqueued, "sha256": sha256}
    return Checkpoint(path, 0, model, {}, state)


def usual_views(config: EncoderConfig) -> ViewsConfig:
    """Return the usual views for an encoder, by its first layer and its channels."""
    found = ViewsConfig() if config.stem == "cifar" else from_dict(ViewsConfig, _IMAGENET)
    if config.channels == len(found.mean):
        return found
    mean, std = (sum(each) / len(each) for each in (found.mean, found.std))
    return replace(found, mean=[mean] * config.channels, std=[std] * config.channels)


def _architecture(path: Path, arch: str, tensors: Mapping[str, Any]) -> EncoderConfig:
    """Return the configuration of an original query encoder, by the shapes of its tensors."""
    first, fc = "module.encoder_q.conv1.weight", "module.encoder_q.fc."
    head = "mlp" if f"{fc}2.weight" in tensors else "linear"
    stem, last = tensors.get(first), tensors.get(f"{fc}{'2.' if head == 'mlp' else ''}weight")
    others = [each for each in tensors.values() if not isinstance(each, Tensor)]
    if others or stem is None or last is None:
        raise DataError(
            f"{path}: has no {first}, no {fc}weight, or something that is no tensor; use the file "
            "that the pretraining saved"
        )
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
    """Return the tensors whose names begin with one of `names`, with the first such renamed."""
    renamed = {}
    for name, tensor in tensors.items():
        start = next((old for old in names if name.startswith(old)), None)
        if start is not None:
            renamed[names[start] + name.removeprefix(start)] = tensor
    return renamed
