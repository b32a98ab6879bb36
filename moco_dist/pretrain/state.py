"""All state of a pretraining as tensors by name, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from moco_dist.method import batch_norm
from moco_dist.method.moco import REMEMBERED, MoCo
from moco_dist.runs import checkpoint
from moco_dist.runs.checkpoint import Checkpoint


def tensors(
    network: MoCo, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of the model, and those of the optimizer and the BatchNorm groups.

    Also sets the statistics that evaluation uses. A collective, with the same result everywhere.
    """
    training: dict[str, Tensor] = checkpoint.momentum_buffers(optimizer, network.query_encoder)
    for name, encoder in network.encoders.items():
        batch_norm.average_statistics(encoder)
        training |= batch_norm.group_statistics(encoder, f"statistics.{name}.")
    return network.state_dict(), training


def restore(
    network: MoCo, optimizer: torch.optim.Optimizer, bn_groups: int, saved: Checkpoint
) -> None:
    """Put back what `tensors` returned, whatever number of processes did; DataError if it differs.

    `bn_groups` are those of all processes.
    """
    expected = checkpoint.momentum_shapes(optimizer, network.query_encoder)
    for name, encoder in network.encoders.items():
        expected |= batch_norm.statistics_shapes(encoder, bn_groups, f"statistics.{name}.")
    # Earlier versions also saved a linear classifier that learned in each step.
    found = {k: each for k, each in saved.optimizer.items() if not k.startswith("online.")}
    checkpoint.check_tensors(expected, found, saved.path)
    checkpoint.load_tensors(network, saved.model, saved.path)
    for name, encoder in network.encoders.items():
        batch_norm.restore_group_statistics(encoder, saved.optimizer, f"statistics.{name}.")
    checkpoint.restore_momentum(optimizer, network.query_encoder, saved)
    network.remembered = saved.piece(REMEMBERED)
