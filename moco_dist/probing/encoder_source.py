"""Where a probe has its encoder from: a run, a checkpoint folder, or a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco_dist import checkpoint, moco_layout
from moco_dist.config import EncoderConfig, ViewsConfig
from moco_dist.config_probe import FOREIGN
from moco_dist.encoder import Backbone
from moco_dist.errors import DataError
from moco_dist.probing import foreign_encoder
from moco_dist.probing.frozen import require_trained


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
    if path.is_file() and moco_layout.is_one(path):
        original = moco_layout.read(path)
        encoder, architecture, views = checkpoint.load_encoder(original)
        require_trained(encoder.backbone, path)
        place = f"{path} (of the original scripts, epoch {original.state['epoch']})"
        identity = f"{path} {original.state['sha256']}"
        return Source(encoder.backbone, architecture, views, place, identity, {})
    if path.suffix in FOREIGN and not path.is_dir():
        backbone, architecture, sha256 = foreign_encoder.load(path)
        require_trained(backbone, path)
        place = f"{path} ({described(architecture)}, by its tensors)"
        return Source(backbone, architecture, None, place, f"{path} {sha256}", {})
    found = checkpoint.find(path)
    encoder, architecture, views = checkpoint.load_encoder(found)
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
