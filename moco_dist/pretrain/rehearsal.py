"""Passes before the first step that change nothing: they compile, and have DDP lay out its sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from moco_dist.config.recipe import PretrainConfig
from moco_dist.data.view_source import ViewSource
from moco_dist.distributed import comms
from moco_dist.method.batch_norm import Undo
from moco_dist.method.compilation import compile_errors
from moco_dist.method.moco import MoCo
from moco_dist.tracking import terminal
from moco_dist.tracking.start import console


@dataclass(frozen=True)
class Rehearsal:
    """What a pass over black images needs."""

    network: MoCo
    undo: Undo
    accelerator: Accelerator
    # Those of a micro-batch, float (rows, channels, size, size).
    images: Tensor
    micro_batches: int

    def encode(self, *encoders: Callable[[Tensor], Tensor]) -> None:
        """Encode the images once round the BatchNorm groups; also backward, where it can."""
        self.undo.keep()
        for _ in range(self.micro_batches):
            for encoder in encoders:
                with self.accelerator.autocast():
                    vectors = encoder(self.images)
                if vectors.requires_grad:
                    self.accelerator.backward(vectors.sum())
        self.undo.restore()
        self.network.query_encoder.zero_grad()


def settle_buckets(rehearsal: Rehearsal, query: Callable[[Tensor], Tensor]) -> None:
    """Do a backward pass through DDP, after which it lays out its sums in another order.

    With three processes or more the layout decides in which order gradients are added. Without
    this pass, the first step of a launch that resumes would have other bits than the same step in
    the middle of a run.
    """
    rehearsal.encode(query)


def compile_all(rehearsal: Rehearsal, source: ViewSource, config: PretrainConfig) -> None:
    """Compile views and encoders for the shapes of a step; ConfigError if that fails."""
    if comms.is_main():
        text = "compiling views and encoders: a minute or more at a first launch, then seconds"
        terminal.write_line(console, text)
    network, (rows, _, _, _) = rehearsal.network, rehearsal.images.shape
    # A process keeps few compiled forms of a function, and may have had other runs.
    torch.compiler.reset()
    source.maker.compile_step()
    for encoder in network.encoders.values():
        encoder.compile_training()
    views = [view for views in config.moco.passes for view in views if view is not None]
    together = [views] if rehearsal.micro_batches == 1 else [[view] for view in {*views}]
    samples = torch.arange(rows, device=rehearsal.images.device)
    images = samples.new_zeros(len(together[0]) * rows, *source.shape, dtype=torch.uint8)
    with compile_errors():
        for views in together:
            source.maker.of_step(images, [(samples, view) for view in views], 0)
        # What runs without gradients in a step is another graph: mostly the key encoder.
        *_, last = network.encoders.values()
        rehearsal.encode(network.query_encoder, torch.no_grad()(last.forward))
