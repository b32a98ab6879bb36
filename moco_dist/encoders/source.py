"""Where a probe has its encoder from: a run, a checkpoint folder, or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moco_dist.config.probe import FOREIGN
from moco_dist.config.recipe import EncoderConfig, ViewsConfig
from moco_dist.encoders import checkpoints, state_dict
from moco_dist.encoders import original as encoders_original
from moco_dist.errors import DataError
from moco_dist.method.encoder import Backbone


@dataclass(frozen=True)
class Source:
    """A backbone, frozen and in evaluation mode, and what is known of it."""

    backbone: Backbone
    architecture: EncoderConfig
    # Those of its pretraining, None where nothing tells.
    views: ViewsConfig | None
    # For a person: which checkpoint or file.
    place: str
    # The same on all processes, if they read the same.
    identity: str
    # Of the checkpoint; empty for a file.
    state: Mapping[str, Any]


def find(path: Path) -> Source:
    """Return the encoder that `path` names; MissingError or DataError without a trained one."""
    exported = path / "model.safetensors"
    if exported.is_file() and not (path / "state.json").exists():
        path = exported  # a folder of moco_dist.export
    if path.is_file() and encoders_original.is_one(path):
        original = encoders_original.read(path)
        encoder, architecture, views = checkpoints.load_encoder(original)
        require_trained(encoder.backbone, path)
        place = f"{path} (of the original scripts, epoch {original.state['epoch']})"
        identity = f"{path} {original.state['sha256']}"
        return Source(encoder.backbone, architecture, views, place, identity, {})
    if path.suffix in FOREIGN and not path.is_dir():
        backbone, architecture, sha256 = state_dict.load(path)
        require_trained(backbone, path)
        place = f"{path} ({described(architecture)}, by its tensors)"
        return Source(backbone, architecture, None, place, f"{path} {sha256}", {})
    found = checkpoints.find(path)
    encoder, architecture, views = checkpoints.load_encoder(found)
    if found.step == 0:
        raise DataError(
            f"{found.path}: is the state before the first step, a random encoder; give a later one "
            "(control=true probes a random one)"
        )
    require_trained(encoder.backbone, found.path)
    place = f"{found.path} (step {found.step:,})"
    identity = f"{found.path} {found.state['sha256']}"
    return Source(encoder.backbone, architecture, views, place, identity, found.state)


def described(architecture: EncoderConfig) -> str:
    """Return the architecture in words."""
    gray = ", gray images" if architecture.channels == 1 else ""
    return f"{architecture.backbone}, width {architecture.width}, {architecture.stem} stem{gray}"


def require_trained(backbone: nn.Module, source: object) -> None:
    """Raise DataError if a backbone is as it was initialised, or holds what is not finite.

    Each layer that normalises begins with weights of 1 (or 0) and biases of 0; a step moves them
    all. A backbone without such layers can't be told from one as it was initialised.
    """
    kinds = nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm
    norms = {
        name: each
        for name, each in backbone.named_modules()
        if isinstance(each, kinds) and each.weight is not None and each.bias is not None
    }
    for name, tensor in backbone.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DataError(f"{source}: {name} is not finite; use another checkpoint")
    if norms and all(map(_untouched, norms.values())):
        raise DataError(
            f"{source}: is a random encoder and no trained one: the weights of all its "
            f"{len(norms)} normalising layers ({next(iter(norms))}.weight and so on) are 1 and the "
            "biases 0, as before the first step; give the trained one (control=true probes a "
            "random one)"
        )


def _untouched(norm: nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm) -> bool:
    alike = bool((norm.weight == 1).all()) or bool((norm.weight == 0).all())
    return alike and not bool(norm.bias.any())
