"""The loop of a pretraining: step, evaluate, save; when each is due."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from moco_dist.data import run_lists
from moco_dist.distributed import fingerprint, peers
from moco_dist.errors import DataError, StoppedError
from moco_dist.method.moco import REMEMBERED
from moco_dist.method.schedule import due, learning_rate
from moco_dist.pretrain import pictures, state
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.step_graph import Stepper, Taken
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import environment
from moco_dist.runs.record import Metric
from moco_dist.runs.session import Session
from moco_dist.tracking.tracker import Tracker


def loop(
    trainer: Trainer, session: Session, total: int, tracker: Tracker, can_classify: bool
) -> dict[str, float]:
    """Train up to step `total`; return the last figures."""
    config, hooks = trainer.config, RunHooks(trainer, session)
    take = Stepper(trainer, hooks)
    results: dict[str, float] = {}
    owed: list[tuple[int, Callable[[], dict[str, float]]]] = []

    def write_owed() -> None:
        """Write the line of the last step that is due, for which a GPU has to be waited for."""
        for number, line in owed:
            results.update(found := line())
            tracker.log(number, found)
        owed.clear()

    slowest = 0.0
    if owes(trainer, total, can_classify):
        results |= evaluate(trainer, session, tracker)
        if trainer.step:
            save(trainer, session, wait=trainer.step >= total)
    since = saved = time.monotonic()
    logged = trainer.step
    while trainer.step < total:
        began = time.monotonic()
        hooks.wants_save = 0 < config.checkpoint.every_minutes < (began - saved) / 60
        try:
            taken = take()
        except (StoppedError, DataError):
            take.settle()
            write_owed()
            raise
        write_owed()  # while the GPU takes this step
        slowest = max(slowest, time.monotonic() - began)
        session.stop.needs = 2 * (slowest + session.saver.seconds)
        step, last = trainer.step, trainer.step == total
        classifies = can_classify and evaluates(trainer, total)
        keep, epoch = config.checkpoint, _ended_epoch(trainer)
        is_due = due(keep.every_epochs, epoch) or due(keep.every_steps, step)
        saves = last or hooks.agreed.save or is_due
        draws = due(config.tracking.media_every_epochs, epoch, last)
        logs = saves or draws or due(config.tracking.every_steps, step)
        if step == 1 or logs or hooks.health:
            seconds = (time.monotonic() - since) / (step - logged)
            owed.append((step, partial(figures_of, trainer, step, taken, hooks.health, seconds)))
            if config.data.skip_unreadable:
                run_lists.share(session.directory, trainer.splits.train, trainer.splits.test)
            since, logged = time.monotonic(), step
        if not take.captured or saves or draws or classifies:
            take.settle()
            write_owed()
        if draws and tracker.media:
            pictures.draw_step(trainer, tracker.media, torch.cat(taken.logits))
        del taken
        if classifies:
            results |= evaluate(trainer, session, tracker)
            if draws and tracker.media:
                pictures.draw_neighbours(trainer, tracker.media)
            best = trainer.best is not None and trainer.best["step"] == step
            saves = saves or (best and config.checkpoint.keep_best)
        if saves:
            save(trainer, session, wait=last)
            saved = time.monotonic()
        if classifies or saves or draws:
            since, logged = time.monotonic(), step
    return results


def figures_of(
    trainer: Trainer, step: int, taken: Taken, health: dict[str, float], seconds: float
) -> dict[str, float]:
    """Return the figures of a step, counted from 1, over all processes; it took `seconds`."""
    optim, fill = trainer.config.optim, trainer.moco.fill
    found = taken.figures()
    norm = found.pop(Metric.GRADIENT_NORM)
    return {
        "epoch": step / trainer.steps_per_epoch,
        **found,
        **({} if fill is None else {Metric.FILL: fill}),
        Metric.LR: learning_rate(optim, step - 1, trainer.steps_per_epoch, trainer.total_steps),
        Metric.GRADIENT_NORM: norm,
        Metric.IMAGES_PER_SECOND: trainer.config.batch_size / seconds,
        Metric.MEMORY_GB: environment.memory_gb(trainer.device),
        **health,
    }


def evaluates(trainer: Trainer, total: int) -> bool:
    """Return whether the kNN evaluation is due after the step that was done last."""
    settings, step = trainer.config.knn, trainer.step
    if step == 0:
        return settings.at_start
    return due(settings.every_epochs, _ended_epoch(trainer), step == total)


def owes(trainer: Trainer, total: int, can_classify: bool) -> bool:
    """Return whether the evaluation after the last step is missing, as a stop cut it short."""
    return can_classify and trainer.evaluated != trainer.step and evaluates(trainer, total)


def _ended_epoch(trainer: Trainer) -> int:
    """Return the epoch, from 1, that the last step ended; 0 in the middle of one."""
    epoch, inside = divmod(trainer.step, trainer.steps_per_epoch)
    return 0 if inside else epoch


def evaluate(trainer: Trainer, session: Session, tracker: Tracker) -> dict[str, float]:
    """Return and log the accuracies of the encoder as it is."""
    step = trainer.step
    peers.me.mark(step, "evaluating kNN")
    tracker.unfinished = True
    found = trainer.accuracies(partial(session.pause, "evaluating kNN"))
    tracker.log(step, {"epoch": step / trainer.steps_per_epoch, **found})
    tracker.unfinished = False
    trainer.evaluated = step
    knn = found[Metric.KNN_TOP1]
    if step and (trainer.best is None or knn > trainer.best["knn_top1"]):
        trainer.best = {"step": step, "knn_top1": knn}
    return found


def save(trainer: Trainer, session: Session, wait: bool = False) -> None:
    """Write a checkpoint of the state after `step` steps, in the background, or `wait` for it."""
    peers.me.mark(trainer.step, "saving")
    run_lists.share(session.directory, trainer.splits.train, trainer.splits.test)
    model, training = state.tensors(trainer.moco, trainer.optimizer)
    momentum = [value for key, value in training.items() if key.startswith("momentum.")]
    peers.same_everywhere(
        f"the checksum of the state after step {trainer.step}",
        fingerprint.checksum(*model.values(), *momentum),
        "a machine has miscalculated: continue without it, from the last checkpoint",
    )
    others = {
        "epoch": trainer.step / trainer.steps_per_epoch,
        REMEMBERED: trainer.moco.remembered,
        "evaluated": trainer.evaluated,
        "best": trainer.best,
        "data": trainer.splits.fingerprint,
    }
    session.save(trainer.step, model, training, others, wait)
