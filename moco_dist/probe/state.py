"""All state of a probe as tensors by name, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from moco_dist.probe.finetune import FineTuning
from moco_dist.probe.heads import Best, HeadOptimizer, Heads
from moco_dist.runs import checkpoint


def tensors(
    heads: Heads, best: Best, optimizer: HeadOptimizer, tuning: FineTuning | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of the models and of the optimizers, by name."""
    model = {f"heads.{name}": each for name, each in heads.state_dict().items()}
    model |= {f"best.{name}": each for name, each in best.tensors.items()}
    momentum = {f"momentum.heads.{name}": each for name, each in optimizer.buffers.items()}
    if tuning:
        encoders, theirs = tuning.state()
        model, momentum = model | encoders, momentum | theirs
    return model, momentum


@torch.no_grad()
def restore(
    saved: checkpoint.Checkpoint,
    heads: Heads,
    best: Best,
    optimizer: HeadOptimizer,
    tuning: FineTuning | None,
) -> None:
    """Put back what `tensors` returned; DataError if the checkpoint holds other tensors."""
    model, momentum = tensors(heads, best, optimizer, tuning)
    shapes = {name: each.shape for name, each in momentum.items()}
    if tuning:
        trained = tuning.optimizer, tuning.encoders
        shapes |= checkpoint.momentum_shapes(*trained)
    checkpoint.check_tensors(model, saved.model, saved.path)
    checkpoint.check_tensors(shapes, saved.optimizer, saved.path)
    for name, tensor in model.items():
        tensor.copy_(saved.model[name])
    for name, tensor in optimizer.buffers.items():
        tensor.copy_(saved.optimizer[f"momentum.heads.{name}"])
    if tuning:
        checkpoint.restore_momentum(*trained, saved)
