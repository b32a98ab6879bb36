"""What is about to run, in words, and what came of it."""

from __future__ import annotations

import logging

from moco_dist.distributed import comms
from moco_dist.encoders import load
from moco_dist.errors import counted
from moco_dist.method import timm_backbone
from moco_dist.pretrain.set_size import few_images
from moco_dist.pretrain.step_graph import why_not
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs.session import Session
from moco_dist.tracking import start, terminal
from moco_dist.tracking.start import console

logger = logging.getLogger(__name__)


def announce(trainer: Trainer, session: Session, can_classify: bool) -> None:
    """Print the banner and warn of settings that are legal and cost accuracy."""
    config, splits, processes = trainer.config, trainer.splits, comms.world_size()
    left_over = trainer.plan.num_samples - trainer.steps_per_epoch * config.batch_size
    if config.bn_groups == 1 and config.moco.fills:
        logger.warning(
            "bn_groups=1: queries and keys share their BatchNorm statistics, which tell the model "
            "the answer (about 4 points on CIFAR-10 in the original's demo); use bn_groups=8"
        )
    images, backbone = len(splits.train), trainer.moco.query_encoder.backbone
    too_long = config.moco.too_long(config.batch_size, images)
    small = timm_backbone.interpolates(backbone, config.views.size)
    for sentence in filter(None, (too_long, small, config.drifts)):
        logger.warning(sentence)
    monitor = (
        f"every {counted(config.knn.every_epochs, 'epoch')}"
        + ", with a linear classifier (online/top1)" * config.monitor.linear
        if config.knn.every_epochs
        else "never (knn.every_epochs=0)"
    )
    rows = {
        "data": f"{config.data.described}: {len(splits.train):,} training and "
        f"{counted(len(splits.validation), 'validation image')}, "
        + counted(len(splits.train.classes), "class", "classes"),
        "images": splits.held,
        "encoder": f"{config.encoder.described}, {config.encoder.head} head to "
        f"{config.encoder.dim}; {config.precision}",
        "batch": f"{config.batch_size} = {processes} x {config.batch_size // processes}, "
        f"{counted(config.bn_groups, 'BatchNorm group')} of "
        f"{config.batch_size // config.bn_groups}, "
        + counted(config.runtime.micro_batches, "micro-batch", "micro-batches"),
        "negatives": config.negatives(len(splits.train)),
        "steps": f"{trainer.steps_per_epoch:,} an epoch ({counted(left_over, 'image')} left over, "
        f"others each epoch), {trainer.total_steps:,} in {counted(config.epochs, 'epoch')}",
        "kNN": monitor if can_classify else "never (needs labels and validation images)",
    }
    if config.unused:
        rows["no effect"] = ", ".join(config.unused)
    if trainer.device.type == "cuda":
        why = why_not(trainer)
        one = "each step is one" if processes == 1 else "each step is several, cut at collectives,"
        rows["graph"] = f"none: {why}" if why else f"{one} once the memory is full"
    if few := few_images(config, len(splits.train)):
        rows["expect"] = few
    if splits.parts:
        rows["parts"] = splits.parts
    if config.runtime.compile:
        rows["compiled"] = "views and encoders, by torch.compile"
    if config.init_from and not session.resumed and comms.is_main():
        rows["start"] = load.start_sentence(session.directory)
    start.banner(session, "pretrain", rows)


def summarize(trainer: Trainer, session: Session, results: dict[str, float]) -> None:
    """Print the last figures and what to do next."""
    if not comms.is_main():
        return
    title = f"{session.directory} after step {trainer.step:,} of {trainer.total_steps:,}"
    figures = {name: f"{value:.4g}" for name, value in results.items()}
    terminal.banner(console, title, figures)
    terminal.write_line(console, f"next: probe it with encoder={session.directory}")
