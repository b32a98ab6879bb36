"""From what a user names to a checkpoint and its encoder."""

from __future__ import annotations

from pathlib import Path

import torch

from moco_dist.config.recipe import EncoderConfig, ViewsConfig
from moco_dist.config.yaml_files import from_dict
from moco_dist.errors import ConfigError, DataError, MissingError
from moco_dist.method.encoder import Encoder, build_encoder
from moco_dist.runs.checkpoint import Checkpoint, check_tensors, load_tensors, newest, read


def find(path: Path) -> Checkpoint:
    """Return the checkpoint that `path` names: its folder, or a run directory with one in it.

    Also a file that the original MoCo scripts wrote.
    """
    if (path / "state.json").is_file():
        return read(path)
    if path.is_file():
        from moco_dist.encoders import original  # it imports this file

        if path.name.endswith(original.SUFFIXES):
            return original.read(path)
    if path.is_file():
        raise DataError(
            f"{path}: a file, and a checkpoint is a folder; give the run directory of a "
            "pretraining, or one of its checkpoints/step_... folders"
        )
    if not path.exists():
        raise MissingError(
            f"{path}: no such checkpoint or run directory; give a run that has been pretrained"
        )
    for _ in range(3):  # a run that goes on may remove the newest one before it is read
        try:
            checkpoint = newest(path)
            break
        except MissingError:
            continue
    else:
        raise MissingError(f"{path}: its checkpoints vanish while they are read; try again")
    if checkpoint is None:
        raise MissingError(
            f"{path}: no checkpoint in this folder; give a run directory or a checkpoint folder"
        )
    return checkpoint


def load_encoder(checkpoint: Checkpoint) -> tuple[Encoder, EncoderConfig, ViewsConfig]:
    """Return the query encoder of a pretraining checkpoint, and what it was built and trained with.

    The encoder is frozen and in evaluation mode. Raises DataError unless every tensor of it is
    there, and no other.
    """
    prefix = "query_encoder."
    tensors = {
        k.removeprefix(prefix): v for k, v in checkpoint.model.items() if k.startswith(prefix)
    }
    if not tensors:
        raise DataError(
            f"{checkpoint.path}: not a checkpoint of a pretraining, it holds "
            f"{', '.join(list(checkpoint.model)[:3])}; give the run directory of a pretraining"
        )
    try:
        settings = checkpoint.piece("config")
        config = from_dict(EncoderConfig, settings["encoder"])
        views = from_dict(ViewsConfig, settings["views"])
        with torch.device("meta"):  # takes no memory, whatever sizes a stranger wrote there
            shapes = build_encoder(config, seed=0).state_dict()
    except (ConfigError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0][:200]
        raise DataError(f"{checkpoint.path}: not readable by this version ({reason})") from error
    check_tensors(shapes, tensors, checkpoint.path)
    encoder = build_encoder(config, seed=0)
    load_tensors(encoder, tensors, checkpoint.path)
    return encoder.requires_grad_(False).eval(), config, views
