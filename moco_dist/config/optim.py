"""The `optim.` group of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from moco_dist.config.rules import OWN, check, check_momentum, check_positive, given, require

# Keys of one optimizer that another doesn't read.
_UNUSED = {
    "sgd": ("trust", "trust_clip"),
    "lars": (),
    "adamw": ("momentum", "nesterov", "trust", "trust_clip"),
}


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the schedule of its learning rate."""

    # lars: SGD that moves each weight tensor by a share of its own norm, for large batches.
    name: Literal["sgd", "lars", "adamw"] = "sgd"
    lr: float = 0.03
    # Of sgd and lars; adamw has PyTorch's betas, 0.9 and 0.999.
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    # lars: that share at a rate of 1. With trust_clip no tensor moves further than by sgd; then
    # 0.02 is usual.
    trust: float = 0.001
    trust_clip: bool = False
    # cosine falls from the first step on, cosine_after_warmup from the end of the warm-up on, both
    # to lr_min. step multiplies the rate by gamma at each of the milestones, in epochs.
    schedule: Literal["cosine", "cosine_after_warmup", "step", "constant"] = "cosine"
    lr_min: float = 0.0
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    # Epochs over which the rate rises linearly from 0.
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        check("optim.", self, gamma=(0, 1), lr=OWN, momentum=OWN, trust=OWN)
        check_positive("optim.", self, lr="give a positive learning rate", trust="0.001 is usual")
        check_momentum("optim.", self.momentum, 0.9)
        for key in _UNUSED[self.name]:
            given = getattr(self, key)
            require(
                given == next(each.default for each in fields(self) if each.name == key),
                f"optim.{key}={given} has no effect with optim.name={self.name}; leave it out",
            )
        require(
            self.momentum > 0 or not self.nesterov,
            "optim.nesterov=true needs a momentum; give optim.momentum=0.9, or leave it out",
        )
        require(
            self.lr_min <= self.lr,
            f"optim.lr_min={self.lr_min} is above optim.lr={self.lr}; give a smaller one",
        )
        require(
            self.lr_min == 0 or self.schedule.startswith("cosine"),
            f"optim.lr_min={self.lr_min} has no effect with optim.schedule={self.schedule}; leave "
            "it out",
        )
        require(
            self.schedule != "step" or bool(self.milestones),
            "optim.schedule=step has no milestones; give epochs, as optim.milestones=[120,160]",
        )

    def unused(self, epochs: int) -> list[str]:
        """Return those given keys that have no effect in so many epochs, KEY=VALUE."""
        if self.schedule != "step":
            return given("optim.", self, "milestones", "gamma")
        late = [milestone for milestone in self.milestones if milestone >= epochs]
        return [f"optim.milestones={late} of {epochs} epochs"] if late else []
