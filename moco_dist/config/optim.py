"""The `optim.` group of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moco_dist.config.rules import OWN, check, check_momentum, check_positive, require


@dataclass(frozen=True)
class OptimConfig:
    """SGD and the schedule of its learning rate."""

    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 5e-4
    # step multiplies the rate by gamma at each of the milestones, in epochs.
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    # Epochs over which the rate rises linearly from 0.
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        check("optim.", self, gamma=(0, 1), lr=OWN, momentum=OWN)
        check_positive("optim.", self, lr="give a positive learning rate")
        check_momentum("optim.", self.momentum, 0.9)
        require(
            self.schedule != "step" or bool(self.milestones),
            "optim.schedule=step has no milestones; give epochs, as optim.milestones=[120,160]",
        )
