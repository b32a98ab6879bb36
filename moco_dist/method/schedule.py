"""Learning rate, momentum and what is due, as functions of the step, without state."""

from __future__ import annotations

import math

from moco_dist.config.moco import MocoConfig
from moco_dist.config.optim import OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Return the learning rate of a step, counted from 0.

    The cosine falls from optim.lr at step 0 to optim.lr_min at total_steps (Loshchilov and Hutter
    2017, equation 5, without restarts), in SimCLR and MoCo v3 from the end of the warm-up on.
    """
    warmup = optim.warmup_epochs * steps_per_epoch
    if step < warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    if optim.schedule.startswith("cosine"):
        begun = warmup if optim.schedule == "cosine_after_warmup" else 0
        turn = math.pi * (step - begun) / max(total_steps - begun, 1)
        return optim.lr_min + (optim.lr - optim.lr_min) * 0.5 * (1 + math.cos(turn))
    if optim.schedule == "step":
        passed = sum(step >= milestone * steps_per_epoch for milestone in optim.milestones)
        return optim.lr * optim.gamma**passed
    return optim.lr


def key_momentum(moco: MocoConfig, step: int, total_steps: int) -> float:
    """Return the key encoder's momentum; the cosine rises to 1 (Grill et al. 2020)."""
    if moco.momentum_schedule == "constant":
        return moco.momentum
    return 1 - (1 - moco.momentum) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def due(every: int, number: int, always: bool = False) -> bool:
    """Return whether something is due at `number`, counted from 1; an `every` of 0 means never."""
    return every > 0 and (always or (number > 0 and number % every == 0))
