"""The step of one process as CUDA graphs: the GPU repeats it without Python and without a wait.

What differs between steps is on the device: the step, the place in the memory, learning rate and
momentum. So is whether all numbers were finite. After a step that was not, nothing changes any
more; the host, which reads a step's figures while the next one runs, then raises what it would have
raised in that step. Health is measured between the two graphs, in the steps in which it is due.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from moco_dist.distributed import comms, peers
from moco_dist.distributed.agreement import Agreement
from moco_dist.errors import shown
from moco_dist.method.plan import Step
from moco_dist.pretrain import figures, finite
from moco_dist.pretrain.device_clock import DeviceClock
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.mechanisms import Hooks
from moco_dist.pretrain.step_parts import Graphs, OtherGradients, Parts
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs.record import Metric
from moco_dist.runs.session import Session

logger = logging.getLogger(__name__)

# Eager steps before a capture, in which libraries set themselves up.
_WARM_UP = 3
# Steps whose figures are kept.
_KEPT = 4
# A step's figures on the device.
_NAMES = (*figures.PROGRESS, Metric.GRADIENT_NORM, "keys", "bad")


class Taken(NamedTuple):
    """A step that was taken, or that the GPU has yet to finish."""

    # Of each micro-batch of each pass, (rows, 1 + negatives), until the next step.
    logits: list[Tensor]
    # Waits for the step and returns its figures over all processes; NumbersError if it is refused.
    figures: Callable[[], dict[str, float]]


def why_not(trainer: Trainer) -> str:
    """Return why the trainer's step can't be a CUDA graph, or an empty text."""
    config = trainer.config
    if trainer.device.type != "cuda":
        return "there is no GPU"
    if not config.runtime.cuda_graph:
        return "runtime.cuda_graph=false"
    if config.bn_groups < comms.world_size():
        return "several processes share a BatchNorm group, and exchange moments in each layer"
    if config.runtime.compile and comms.world_size() > 1:
        return "compiled encoders of several processes are not captured"
    return "precision=fp64" if config.precision == "fp64" else ""  # the rate is read as float32


class _Guard(Hooks):
    """Lets nothing enter the state that is not finite, without asking the host."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper, self.clock = stepper, stepper.clock

    def begin(self, step: int, rows: Step) -> None:
        self.stepper.trainer.undo.keep()
        self.rows = rows

    def before_update(self, made: list[Tensor], losses: Tensor) -> None:
        hooks, good = self.stepper.hooks, self.clock.good
        self.norms = finite.norms(hooks.parameters, *made)
        good.logical_and_(torch.add(*self.norms).isfinite())
        self.stepper.trainer.undo.restore_unless(good)
        # The fused optimizer does nothing if this is 1.
        self.stepper.trainer.optimizer.found_inf = good.logical_not().float()  # type: ignore[attr-defined]

    def before_enqueue(self, queries: Tensor, positives: list[Tensor]) -> None:
        measure = self.stepper.hooks.before_enqueue
        self.stepper.graphs.cut(partial(measure, queries, positives))


def _warn(reason: str) -> None:
    logger.warning(
        "the step can't be captured as a CUDA graph (%s): it is slower; runtime.cuda_graph=false "
        "says that it shall not be",
        shown(next(iter(reason.splitlines()), "")),
    )


class Stepper:
    """Takes the trainer's steps one by one: eagerly, and from a CUDA graph as soon as it can.

    That is once the memory is full, so that all shapes are those of every later step. One of
    several processes repeats the `parts` of a step between what they exchange.
    """

    def __init__(self, trainer: Trainer, hooks: RunHooks) -> None:
        self.trainer, self.hooks = trainer, hooks
        self.session: Session | None = hooks.session
        self.eager_steps = 0
        self.captures, self.captured = not why_not(trainer), False
        self.parts: Parts | None = None

    def __call__(self) -> Taken:
        """Take a step; what it raises leaves the state as it was before the step that it names."""
        if self.captures and self.eager_steps >= _WARM_UP and self.trainer.moco.fill in (None, 1):
            self.captures = False
            self._capture()
        if self.captured:
            return self._replay()
        loss, logits = self._by_parts() or self.trainer.train_step(self.hooks)
        self.eager_steps += 1
        return Taken(logits, partial(self._eager_figures, loss, logits))

    def settle(self) -> None:
        """Wait for the last step; NumbersError if it is refused."""
        if self.captured and self.checked < self.count - 1:
            self._figures(self.count - 1, self.trainer.step - 1)

    def _eager_figures(self, loss: Tensor, logits: list[Tensor]) -> dict[str, float]:
        temperature = self.trainer.config.moco.temperature
        mine = figures.progress(loss, torch.cat(logits), temperature)
        values = [*comms.mean(mine).tolist(), float(self.hooks.gradient_norm)]
        shown = dict(zip(_NAMES, values, strict=False))
        if logits[0].shape[1] == 1:  # no negatives, no similarity of them
            del shown[Metric.NEGATIVE]
        return shown

    def _by_parts(self) -> tuple[Tensor, list[Tensor]] | None:
        """Take a step by its parts; None, before anything has changed, if it can't be."""
        try:
            return self.parts() if self.parts else None
        except OtherGradients as error:
            self.parts = None
            _warn(str(error))
            return None

    def _capture(self) -> None:
        """Capture the step on all processes; if one can't, say so and take eager steps on."""
        self.clock, fault = DeviceClock(self.trainer), ""
        several = comms.world_size() > 1
        parts = Parts(self.trainer, self.hooks, self.clock) if several else None
        try:
            parts.capture() if parts else self._capture_whole()
        except RuntimeError as error:
            fault = str(error) or type(error).__name__
        if fault := next(filter(None, comms.gather_objects(fault)), ""):
            _warn(fault)
        else:
            self.parts, self.captured = parts, parts is None

    def _capture_whole(self) -> None:
        """Capture the step of a process alone; RuntimeError if it can't be."""
        trainer, shape = self.trainer, (_KEPT, len(_NAMES))
        self.guard, self.graphs = _Guard(self), Graphs()
        self.ring = torch.zeros(shape, dtype=torch.float64, device=trainer.device)
        self.read = torch.zeros(shape, dtype=torch.float64, pin_memory=True)
        self.events = [torch.cuda.Event() for _ in range(_KEPT)]
        self.count, self.checked = 0, -1
        trainer.source.begin(trainer.step)
        with self.graphs.capture(trainer, self.clock):
            loss, self.logits = trainer.train_step(self.guard)
            self._keep_figures(loss)

    def _keep_figures(self, loss: Tensor) -> None:
        temperature = self.trainer.config.moco.temperature
        progress = figures.progress(loss, torch.cat(self.logits), temperature)
        others = *self.guard.norms, self.clock.good.logical_not()
        row = torch.cat([progress, torch.stack([each.double() for each in others])])
        self.ring.index_copy_(0, (self.clock.count % _KEPT)[None], row[None])
        self.read.copy_(self.ring, non_blocking=True)
        self.clock.count += 1

    def _replay(self) -> Taken:
        trainer, hooks, step = self.trainer, self.hooks, self.trainer.step
        peers.me.mark(step, "training")
        trainer.source.begin(step)
        if self.session:
            self.session.stop_for(self.session.request())  # also for an image of this step
            self.session.saver.copied()
        hooks.agreed = Agreement(stop=0, save=hooks.wants_save)
        self.clock.set()
        hooks.step, hooks.rows = step, self.guard.rows
        self.graphs.replay()
        number = self.count
        self.events[number % _KEPT].record()
        self.count += 1
        trainer.step += 1
        trainer.moco.remembered += self._keys
        if self.checked < number - 1:
            self._figures(number - 1, step - 1)
        return Taken(self.logits, partial(self._figures, number, step))

    @property
    def _keys(self) -> int:
        return len(self.trainer.config.moco.passes) * self.trainer.config.batch_size

    def _figures(self, number: int, step: int) -> dict[str, float]:
        """Return the figures of replay `number`, which took `step`; NumbersError if it was bad."""
        event = self.events[number % _KEPT]
        if not event.query():
            event.synchronize()
        values = dict(zip(_NAMES, self.read[number % _KEPT].tolist(), strict=True))
        self.checked = number
        if values["bad"]:
            self._refuse(number, step)
        return {name: values[name] for name in _NAMES[:-2]}

    def _refuse(self, number: int, step: int) -> None:
        """Put the host back to the state before `step`, where the device is, and raise."""
        trainer = self.trainer
        torch.cuda.synchronize(trainer.device)
        trainer.step = step
        trainer.moco.remembered -= (self.count - number) * self._keys
        row = dict(zip(_NAMES, self.read[number % _KEPT], strict=True))
        suspects = row["keys"], row[Metric.LOSS], row[Metric.GRADIENT_NORM]
        rows = trainer.plan.step(step, len(trainer.config.moco.passes))
        finite.refuse(trainer, step, rows, *suspects)
