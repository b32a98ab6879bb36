"""Pretrain an image encoder without labels by Momentum Contrast (MoCo v1, v2)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NoReturn

import torch

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import to_dict
from moco_dist.data import datasets
from moco_dist.distributed import comms, peers
from moco_dist.distributed.stopping import StopRequests
from moco_dist.encoders import load
from moco_dist.errors import NumbersError, StoppedError
from moco_dist.pretrain import alarms, pictures
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import saving
from moco_dist.runs import session as runs_session
from moco_dist.runs.session import logger
from moco_dist.tracking import start, terminal
from moco_dist.tracking.start import console
from moco_dist.tracking.tracker import Tracker


def run(config: PretrainConfig, stop: StopRequests | None = None) -> None:
    """Pretrain from where the run directory stands to the end, or to a request to stop."""
    session = runs_session.start(config, stop)
    splits = datasets.load(config.data, config.encoder.channels)
    trainer = Trainer(config, session, splits)
    total = min(trainer.total_steps, config.stop_at_step or trainer.total_steps)
    can_classify = bool(splits.train.classes) and len(splits.validation) > 0
    announce(trainer, can_classify)
    left = trainer.step < total or (not session.finished and owes(trainer, total, can_classify))
    if not left:
        if comms.is_main():
            place = f"step {trainer.step:,} of {total:,}"
            text = f"{session.directory} is at {place}: nothing is left to do."
            terminal.write_line(console, text)
        if trainer.step == trainer.total_steps and not session.finished:
            # The start before this one ended between its last two files.
            runs_session.finish(session, {})
        return
    runs_session.begin(session)
    with start.tracker(session, total, "pretrain") as tracker:
        watch = None
        if comms.is_main():
            path = session.directory / "metrics.jsonl"
            watch = alarms.Watch(config, len(splits.train), path, tracker.sinks[-1])
            tracker.sinks.append(watch.sink)
        try:
            results = loop(trainer, total, tracker, can_classify)
            if trainer.step == trainer.total_steps:
                tracker.conclude(results, write_encoder(trainer))
        except (StoppedError, NumbersError) as error:
            if watch and isinstance(error, NumbersError):
                watch.ended(trainer.step, error)
            # All processes are here, with the state after a whole step.
            end_early(trainer, error)
    if trainer.step == trainer.total_steps:
        runs_session.finish(session, results)
    summarize(trainer, results)


def loop(trainer: Trainer, total: int, tracker: Tracker, can_classify: bool) -> dict[str, float]:
    """Train up to step `total`; return the last figures."""
    config, stop = trainer.config, trainer.session.stop
    results: dict[str, float] = {}
    slowest = 0.0
    if owes(trainer, total, can_classify):
        results["knn/top1"] = evaluate(trainer, tracker)
        if trainer.step:
            trainer.save(wait=trainer.step >= total)
    since = saved = time.monotonic()
    logged = trainer.step
    while trainer.step < total:
        minutes = config.checkpoint.every_minutes
        began = time.monotonic()
        loss, logits = trainer.train_step(0 < minutes < (began - saved) / 60)
        slowest = max(slowest, time.monotonic() - began)
        stop.needs = 2 * (slowest + trainer.session.saver.seconds)
        step, last = trainer.step, trainer.step == total
        classifies = can_classify and evaluates(trainer, total)
        saves = last or trainer.agreed.save or saves_at(trainer)
        draws = _due(config.tracking.media_every_epochs, _ended_epoch(trainer), last)
        due = saves or draws or _due(config.tracking.every_steps, step)
        if step == 1 or due or trainer.health:
            seconds = time.monotonic() - since
            figures = trainer.metrics(loss, logits, seconds, step - logged)
            results |= figures
            tracker.log(step, figures)
            since, logged = time.monotonic(), step
        if draws and tracker.media:
            pictures.draw_step(trainer, tracker.media, torch.cat(logits))
        del loss, logits
        if classifies:
            results["knn/top1"] = evaluate(trainer, tracker)
            if draws and tracker.media:
                pictures.draw_neighbours(trainer, tracker.media)
            best = trainer.best is not None and trainer.best["step"] == step
            saves = saves or (best and config.checkpoint.keep_best)
        if saves:
            trainer.save(wait=last)
            saved = time.monotonic()
        if classifies or saves or draws:
            since, logged = time.monotonic(), step
    return results


def evaluates(trainer: Trainer, total: int) -> bool:
    """Return whether the kNN evaluation is due after the step that was done last."""
    settings, step = trainer.config.knn, trainer.step
    if step == 0:
        return settings.at_start
    return _due(settings.every_epochs, _ended_epoch(trainer), step == total)


def owes(trainer: Trainer, total: int, can_classify: bool) -> bool:
    """Return whether the evaluation after the last step is missing, as a stop cut it short."""
    return can_classify and trainer.evaluated != trainer.step and evaluates(trainer, total)


def saves_at(trainer: Trainer) -> bool:
    """Return whether a checkpoint is due after the step that was done last."""
    settings, step = trainer.config.checkpoint, trainer.step
    return _due(settings.every_epochs, _ended_epoch(trainer)) or _due(settings.every_steps, step)


def _ended_epoch(trainer: Trainer) -> int:
    """Return the epoch, from 1, that the last step ended; 0 in the middle of one."""
    epoch, inside = divmod(trainer.step, trainer.steps_per_epoch)
    return 0 if inside else epoch


def evaluate(trainer: Trainer, tracker: Tracker) -> float:
    """Return and log the kNN accuracy of the encoder as it is."""
    step = trainer.step
    peers.me.mark(step, "evaluating kNN")
    tracker.unfinished = True
    accuracy = trainer.knn_top1()
    tracker.log(step, {"epoch": step / trainer.steps_per_epoch, "knn/top1": accuracy})
    tracker.unfinished = False
    trainer.evaluated = step
    if step and (trainer.best is None or accuracy > trainer.best["knn_top1"]):
        trainer.best = {"step": step, "knn_top1": accuracy}
    return accuracy


def write_encoder(trainer: Trainer) -> Path | None:
    """Return, on process 0, the folder of the encoder alone, if it is to be uploaded."""
    if not trainer.config.tracking.upload_encoder:
        return None
    run, state, config = trainer.session.directory, trainer.moco.state_dict(), trainer.config

    def write() -> Path | None:
        return saving.write_encoder(run, trainer.step, state, to_dict(config))

    return peers.together(lambda: write() if comms.is_main() else None)


def end_early(trainer: Trainer, error: StoppedError | NumbersError) -> NoReturn:
    """Save the state after the last whole step; raise `error` again, with where that is."""
    step = trainer.step
    if step:
        trainer.save(wait=True)
    place = f"saved after step {step:,} of {trainer.total_steps:,}" if step else "nothing to save"
    runs_session.end_early(trainer.session, error, place)


def _due(every: int, number: int, always: bool = False) -> bool:
    """Return whether something is due at `number`, from 1, if it is every `every`; 0 is never."""
    return every > 0 and (always or (number > 0 and number % every == 0))


def announce(trainer: Trainer, can_classify: bool) -> None:
    """Print the banner and warn of settings that are legal and cost accuracy."""
    config, splits, processes = trainer.config, trainer.splits, comms.world_size()
    left_over = trainer.plan.num_samples - trainer.steps_per_epoch * config.batch_size
    if config.bn_groups == 1:
        logger.warning(
            "bn_groups=1: queries and keys share their BatchNorm statistics, which tell the model "
            "the answer (about 4 points on CIFAR-10 in the original's demo); use bn_groups=8"
        )
    if sentence := alarms.long_queue(config, len(splits.train)):
        logger.warning(sentence)
    monitor = (
        "every " + _counted(config.knn.every_epochs, "epoch", "epochs")
        if config.knn.every_epochs
        else "never (knn.every_epochs=0)"
    )
    rows = {
        "data": f"{config.data.name}: {len(splits.train):,} training and "
        f"{len(splits.validation):,} validation images, "
        f"{len(splits.train.classes) or 'no'} classes",
        "images": splits.held,
        "encoder": f"{config.encoder.backbone}, width {config.encoder.width}, "
        f"{config.encoder.stem} stem, {config.encoder.head} head to "
        f"{config.encoder.dim}; {config.precision}",
        "batch": f"{config.batch_size} = {processes} x {config.batch_size // processes}, "
        f"{config.bn_groups} BatchNorm groups of {config.batch_size // config.bn_groups}, "
        + _counted(config.runtime.micro_batches, "micro-batch", "micro-batches"),
        "queue": f"{config.moco.queue_size:,} keys, full after "
        f"{-(-config.moco.queue_size // (config.batch_size * len(trainer.passes))):,} "
        "steps; the loss rises till then",
        "steps": f"{trainer.steps_per_epoch:,} an epoch ({left_over} images left over, others each "
        f"epoch), {trainer.total_steps:,} in {config.epochs} epochs",
        "kNN": monitor if can_classify else "never (needs labels and validation images)",
    }
    if config.runtime.compile:
        rows["compiled"] = "views and encoders, by torch.compile"
    if config.init_from and not trainer.session.resumed and comms.is_main():
        rows["start"] = load.start_sentence(trainer.session.directory)
    start.banner(trainer.session, "pretrain", rows)


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def summarize(trainer: Trainer, results: dict[str, float]) -> None:
    """Print the last figures and what to do next."""
    if not comms.is_main():
        return
    title = f"{trainer.session.directory} after step {trainer.step:,} of {trainer.total_steps:,}"
    figures = {name: f"{value:.4g}" for name, value in results.items()}
    terminal.banner(console, title, figures)
    hint = f"next: probe it with encoder={trainer.session.directory}"
    terminal.write_line(console, hint)
