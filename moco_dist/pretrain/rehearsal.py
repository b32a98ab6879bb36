"""Passes before the first step that change nothing: they compile, and have DDP lay out its sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moco_dist.distributed import comms
from moco_dist.errors import ConfigError
from moco_dist.method import batch_norm
from moco_dist.method.compilation import compile_errors
from moco_dist.tracking import terminal
from moco_dist.tracking.start import console

if TYPE_CHECKING:
    from moco_dist.pretrain.trainer import Trainer


def settle_buckets(trainer: Trainer) -> None:
    """Do a backward pass through DDP: after its first one it lays out anew its sums.

    With three processes or more the layout decides in which order they are added, and the first
    step of a start that resumes would have other bits than the same step in the middle of one.
    """
    _pass(trainer, trainer.query)


def compile_all(trainer: Trainer) -> None:
    """Compile views and encoders for the shapes of a step; ConfigError if that fails."""
    if comms.is_main():
        text = "compiling views and encoders: minutes at a first start, then seconds"
        terminal.write_line(console, text)
    network, source, passes = trainer.moco, trainer.source, len(trainer.passes)
    # A process keeps few compiled forms of a function, and may have had other runs.
    torch.compiler.reset()
    source.maker.compile_step()
    for encoder in (network.query_encoder, network.key_encoder):
        encoder.compile_training()
    rows = _rows(trainer)
    number = 2 * passes * rows if trainer.config.runtime.micro_batches == 1 else rows
    device = trainer.session.device
    images = torch.zeros(number, *source.shape, dtype=torch.uint8, device=device)
    samples = torch.arange(number, device=device)
    try:
        with compile_errors():
            source.maker.of_step(images, [(samples, 0)], 0)
            # As in a step, the keys' without gradients: with them it would be another graph.
            _pass(trainer, network.query_encoder, torch.no_grad()(network.key_encoder.forward))
    except ConfigError:
        # A signal's exception comes out of a compiler as one of its own.
        trainer.session.stop.raise_at_once()
        raise


def _rows(trainer: Trainer) -> int:
    config = trainer.config
    return config.batch_size // comms.world_size() // config.runtime.micro_batches


def _pass(trainer: Trainer, *encoders: Callable[[Tensor], Tensor]) -> None:
    """Encode black images, once round the BatchNorm groups; with gradients, if there are any."""
    config, size = trainer.config, trainer.config.views.size
    shape = _rows(trainer), config.encoder.channels, size, size
    undo = batch_norm.Undo(trainer.moco.query_encoder, trainer.moco.key_encoder)
    undo.keep()
    for _ in range(config.runtime.micro_batches):
        images = torch.zeros(shape, dtype=trainer.dtype, device=trainer.session.device)
        for encoder in encoders:
            with trainer.accelerator.autocast():
                vectors = encoder(images)
            if vectors.requires_grad:
                trainer.accelerator.backward(vectors.sum())
    undo.restore()
    trainer.optimizer.zero_grad()
