"""Fine-tuning: the encoders are trained together with the classifiers (protocol=finetune).

BatchNorm stays in evaluation mode with the statistics of pretraining, so that an image's features
depend on no other image and a batch can be split over any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from moco_dist.config.optim import OptimConfig
from moco_dist.distributed import comms
from moco_dist.method import schedule
from moco_dist.method.batch_norm import batch_norms
from moco_dist.method.encoder import Backbone, freeze_unused
from moco_dist.runs import checkpoint

# Images from which a random encoder gets BatchNorm statistics before it is fine-tuned.
CALIBRATION = 256


class FineTuning:
    """The encoders in training; `encoders` and `optimizer` hold the state."""

    def __init__(
        self,
        backbones: Mapping[str, Backbone],
        optim: OptimConfig,
        accelerator: Accelerator,
        example: Tensor,
    ) -> None:
        self.optim = optim
        self.encoders = nn.ModuleDict(dict(backbones)).requires_grad_(True)
        for backbone in backbones.values():
            freeze_unused(backbone, example)
        self.optimizer = torch.optim.SGD(
            self.encoders.parameters(),
            lr=optim.lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
        )
        self.networks: dict[str, Callable[[Tensor], Tensor]] = {
            name: accelerator.prepare(each) for name, each in self.encoders.items()
        }
        if comms.world_size() > 1:
            for each in self.networks.values():
                # DDP changes the order of its sums after the first backward pass. Without this
                # pass, a resumed run would differ from an uninterrupted one.
                accelerator.backward(each(example).sum())
            self.optimizer.zero_grad()

    def step(self, step: int, steps_per_epoch: int, total_steps: int) -> None:
        """Update the encoders and clear their gradients."""
        rate = schedule.learning_rate(self.optim, step, steps_per_epoch, total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the encoders' tensors and their momentum, by name."""
        momentum = checkpoint.momentum_buffers(self.optimizer, self.encoders)
        model = {f"encoders.{name}": each for name, each in self.encoders.state_dict().items()}
        return model, momentum


@torch.no_grad()
def calibrate(backbone: Backbone, images: Tensor) -> None:
    """Give a random backbone the BatchNorm statistics of `images` (rows, channels, size, size).

    Without them the activations would grow from layer to layer, and training from scratch in
    evaluation mode would fail.
    """
    norms = batch_norms(backbone)
    kept = [(norm.rows_per_group, norm.momentum) for norm in norms]
    for norm in norms:
        norm.rows_per_group, norm.momentum = len(images), 1.0
    backbone.train()
    backbone(images)
    backbone.eval()
    for norm, (rows, momentum) in zip(norms, kept, strict=True):
        norm.rows_per_group, norm.momentum = rows, momentum
        norm.running_mean.copy_(norm.group_mean[0])
        norm.running_var.copy_(norm.group_var[0])
        norm.next_group = 0
