"""What a step depends on besides the state, as tensors on the device, for steps in CUDA graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from moco_dist.method import schedule
from moco_dist.method.plan import Step
from moco_dist.pretrain.trainer import Clock, Trainer


class DeviceClock(Clock):
    """What a step depends on besides the state, as tensors that a graph reads and advances."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        config, total = trainer.config, trainer.total_steps
        rates = [
            schedule.learning_rate(config.optim, step, trainer.steps_per_epoch, total)
            for step in range(total)
        ]
        momenta = [schedule.key_momentum(config.moco, step, total) for step in range(total)]
        self.rates = torch.tensor(rates, dtype=torch.float32, device=trainer.device)
        self.momenta = torch.tensor(momenta, dtype=torch.float64, device=trainer.device)
        self.step, self.remembered, self.count = torch.zeros(
            3, dtype=torch.int64, device=trainer.device
        )
        self.good = torch.ones((), dtype=torch.bool, device=trainer.device)
        self.order = torch.empty_like(trainer.plan.order(0))
        self._place = self._epoch = -1

    def set(self) -> None:
        """Follow the trainer to its step, and to its epoch's order; nothing if it is there."""
        step = self.trainer.step
        if step != self._place:
            self.step.fill_(step)
            self.remembered.fill_(self.trainer.moco.remembered)
        epoch = step // self.trainer.steps_per_epoch
        if epoch != self._epoch:
            self.order.copy_(self.trainer.plan.order(epoch))
        self._place, self._epoch = step + 1, epoch

    def rows(self) -> Step:
        """Return the rows of the step."""
        plan = self.trainer.plan
        place = self.step % plan.steps_per_epoch
        each = torch.arange(plan.batch_size, device=self.order.device)
        samples = self.order[place * plan.batch_size + each]
        epoch = self.step // plan.steps_per_epoch
        return plan.rows(epoch, samples, self.step, len(self.trainer.config.moco.passes))

    @property
    def now(self) -> Tensor:
        """The step, int64 ()."""
        step: Tensor = self.step
        return step

    def _now(self, steps: Tensor) -> Tensor:
        """Return the element of this step, or the last; an index would be read by the host."""
        # A bench may take more steps than the run has.
        return steps.index_select(0, self.step[None].clamp(max=len(steps) - 1)).squeeze(0)

    def rate(self) -> Tensor:
        """Return the learning rate, float32 ()."""
        return self._now(self.rates)

    def momentum(self) -> Tensor:
        """Return the share of the key encoder that stays, float64 (): all after a bad number."""
        return torch.where(self.good, self._now(self.momenta), 1.0)

    def remember(self, vectors: Tensor, samples: Tensor) -> None:
        """Put vectors into the memory, and advance."""
        self.trainer.moco.remember(vectors, samples, self.remembered, self.good)
        self.step += self.good
        self.remembered += self.good * len(vectors)
