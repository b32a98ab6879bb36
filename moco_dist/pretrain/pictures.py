"""Pictures of a pretraining in progress."""

from __future__ import annotations

import torch
from torch import Tensor

from moco_dist.pretrain.trainer import Trainer
from moco_dist.tracking import media
from moco_dist.tracking.media import Album


def draw_step(trainer: Trainer, album: Album, logits: Tensor) -> None:
    """Save pictures of the step that was done last: pairs of views, and similarities.

    `logits` are those of this process, (rows, 1 + negatives), positive first.
    """
    step, temperature = trainer.step, trainer.config.moco.temperature
    rows = trainer.plan.step(step - 1)
    first, second = (trainer.views(rows.samples[: media.ROWS], rows.epoch, view) for view in (0, 1))
    album.views(step, first, second, trainer.config.views)
    album.histogram(step, "similarity_positive", logits[:, 0] * temperature)
    album.histogram(step, "similarity_negative", logits[:, 1:] * temperature)


def draw_neighbours(trainer: Trainer, album: Album) -> None:
    """Save a picture of the nearest neighbours that the last kNN evaluation found."""
    if trainer.nearest is None:
        return
    train, validation = trainer.splits.train.labelled(), trainer.splits.validation
    rows = torch.arange(len(trainer.nearest), device=trainer.nearest.device)
    right = train.labels[trainer.nearest] == validation.labels[rows, None]
    queries, nearest = validation.squares(rows), train.squares(trainer.nearest)
    album.neighbours(trainer.step, queries, nearest, right)
