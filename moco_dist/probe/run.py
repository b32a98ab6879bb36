"""Measure a pretrained encoder: train a linear classifier on its features, \
and on a random encoder's."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path

from moco_dist.config import yaml_files
from moco_dist.config.probe import ProbeConfig
from moco_dist.data import datasets, run_lists
from moco_dist.data.image_file import MODES
from moco_dist.distributed import comms, faults, peers
from moco_dist.distributed.stopping import StopRequests
from moco_dist.encoders import load
from moco_dist.encoders.load import Found
from moco_dist.errors import ConfigError, DataError, NumbersError, StoppedError, counted
from moco_dist.method import schedule
from moco_dist.method.encoder import check
from moco_dist.probe import overlap
from moco_dist.probe.label_fraction import require_classes
from moco_dist.probe.linear_probe import LinearProbe
from moco_dist.probe.loop import conclude, loop, write
from moco_dist.probe.results import brief, grid_rows, summary_rows
from moco_dist.probe.verdict import Results
from moco_dist.runs import record, session
from moco_dist.runs.identity import group
from moco_dist.runs.session import Session, logger
from moco_dist.tracking import start, terminal
from moco_dist.tracking.start import console


def run(config: ProbeConfig, stop: StopRequests | None = None) -> None:
    """Start or resume a probe and train it to the end or to a stop request."""
    if not config.encoder:
        raise ConfigError(
            "encoder is empty; give encoder=runs/NAME, a run directory, a checkpoint folder, or a "
            "file with a state dict"
        )
    path = Path(config.encoder)
    config = dataclasses.replace(config, name=config.run_name())
    source = peers.together(lambda: load.find(path, backbone=config.backbone))
    opened = session.start(config, stop, source.checkpoint.state.get("run_id"))
    # Each process has searched by itself, and a pretraining may still be writing checkpoints.
    peers.same_everywhere("the checkpoint of the encoder", source.identity)
    peers.together(lambda: require_channels(config, source))
    warn_of_views(config, source)
    saved = opened.resumed
    begun = run_lists.Begun(opened.directory, saved.piece("data") if saved else None)
    splits = images_for(config, source, begun)
    overlaps = find_overlaps(splits)
    probe = LinearProbe(config, opened, splits, source)
    del splits  # whose images would stay in the host's memory when they are on a GPU
    announce(probe, source)
    total = min(probe.total_steps, config.stop_at_step or probe.total_steps)
    results_file = opened.directory / "results.json"
    if probe.step >= total and (probe.step != probe.total_steps or is_measured(opened, config)):
        start.nothing_left(opened, probe.step, total)
        return
    session.begin(opened, partial(rate, probe))
    peers.from_main(lambda: datasets.note_left_out(opened.directory, probe.splits))
    family = group(config.pretraining(), source.checkpoint.state)
    with start.tracker(opened, total, "probe", family) as tracker, faults.agreeing():
        try:
            loop(probe, total, tracker)
            if probe.step == probe.total_steps:
                results = conclude(probe, tracker, overlaps)
        except (StoppedError, NumbersError, DataError) as error:
            if isinstance(error, DataError) and not error.shared:
                raise
            run_lists.share(opened.directory, probe.splits.train, probe.splits.test)
            if probe.step:
                probe.save(wait=True)
            place = f"saved after step {probe.step:,} of {probe.total_steps:,}"
            session.end_early(opened, error, place if probe.step else "nothing to save")
    probe.frozen.check()
    if probe.step == probe.total_steps:
        peers.from_main(lambda: write(results_file, results))
        session.finish(opened, brief(results))
        summarize(probe, results)


def is_measured(opened: Session, config: ProbeConfig) -> bool:
    """Return whether the results of the finished probe are there, with this kNN; a collective."""
    run, wanted = opened.directory, (config.knn.k, config.knn.temperature)

    def there() -> bool:
        before = yaml_files.stored(run / "config.yaml")
        same = wanted == (before.get("knn.k"), before.get("knn.temperature"))
        return same and all(map(record.read_object, (run / "results.json", run / "DONE")))

    return peers.from_main(there)


def rate(probe: LinearProbe, epochs: int, step: int) -> dict[str, float]:
    """Return the first learning rate of the grid in a step if the probe had so many epochs."""
    optim = dataclasses.replace(probe.config.optim, lr=probe.points[0].lr)
    per_epoch = probe.steps_per_epoch
    found = schedule.learning_rate(optim, step, per_epoch, epochs * per_epoch)
    return {"the learning rate goes": found}


def images_for(config: ProbeConfig, source: Found, run: run_lists.Begun) -> datasets.Splits:
    """Return the labelled images for an encoder; a collective."""
    found = datasets.load(config.data, source.architecture.channels, run)
    return peers.together(lambda: labelled(found, config))


def require_channels(config: ProbeConfig, source: Found) -> None:
    """Raise ConfigError unless images can be read with the encoder's channels and views' size."""
    channels = source.architecture.channels
    if channels not in MODES:
        raise ConfigError(
            f"{source.place}: needs images of {channels} channels, but images are read with 3 "
            "(RGB) or 1 (gray); give another encoder"
        )
    config.views.check_channels(channels)
    check(source.architecture, config.views.size)


def labelled(splits: datasets.Splits, config: ProbeConfig) -> datasets.Splits:
    """Return the splits without unlabelled training images; UserError if they can't be probed."""
    datasets.require_labels(splits, config.data)
    if splits.fault:
        raise DataError(splits.fault)
    classes = len(splits.train.classes)
    if config.top_k > classes:
        raise ConfigError(
            f"top_k={config.top_k} is more than the {classes} classes of {config.data.name}; "
            f"use {classes} or less"
        )
    points = len(config.rates()) * max(1, len(config.grid.weight_decay))
    if not len(splits.validation) and (points > 1 or not len(splits.test)):
        count = len(splits.train.labelled())
        # The smallest share, in whole percent, that is one image.
        fix = f"give data.validation={max(0.1, math.ceil(100 / count) / 100):g}"
        other, lack = "", f"no images can choose among the {points} settings of the grid"
        if not len(splits.test):
            other = f"data.name={config.data.name} has no test images and "
            lack = "there is nothing to evaluate on"
        raise DataError(
            f"{other}data.validation={config.data.validation} holds none of {count} out, so "
            f"{lack}; {fix if count > 1 else 'give more images'}"
        )
    splits = dataclasses.replace(splits, train=splits.train.labelled())
    require_classes(splits.train)
    return splits


def warn_of_views(config: ProbeConfig, source: Found) -> None:
    """Warn if images are prepared differently than in the encoder's pretraining."""
    for key in ("size", "mean", "std") if source.views else ():
        ours, theirs = getattr(config.views, key), getattr(source.views, key)
        if ours != theirs:
            sentence = "views.%s is %s here but was %s in pretraining; use the same"
            logger.warning(sentence, key, ours, theirs)
    data = (source.checkpoint.state.get("config") or {}).get("data", {})
    if (theirs := data.get("background", config.data.background)) != config.data.background:
        sentence = "data.background is %s here but was %s in pretraining; use the same"
        logger.warning(sentence, config.data.background, theirs)


def find_overlaps(splits: datasets.Splits) -> list[overlap.Overlap]:
    """Return and warn of validation and test images that are also training images.

    Streamed images are not compared, because all of them would have to be decoded again.
    """
    train, parts = splits.train, {"validation": splits.validation, "test": splits.test}
    if not isinstance(train, datasets.Images):
        return []
    found = peers.from_main(
        lambda: [
            overlap.find(train, images, name)
            for name, images in parts.items()
            if isinstance(images, datasets.Images)
        ]
    )
    for each in found:
        if sentence := each.sentence():
            logger.warning(sentence)
    return found


def announce(probe: LinearProbe, source: Found) -> None:
    """Print the banner."""
    config, splits, processes = probe.config, probe.splits, comms.world_size()
    images, used = len(splits.train), probe.subsets.shape[1]
    share = f"{used:,} of {images:,}" if used < images else f"{images:,}"
    rows = {
        "encoder": source.place,
        "protocol": f"fine-tuned, BatchNorm in evaluation mode, encoder lr {config.encoder_lr:g}"
        if probe.tunes
        else "linear, the encoder is frozen",
        "data": f"{config.data.described}: {share} training, "
        f"{len(splits.validation):,} validation and {counted(len(splits.test), 'test image')}, "
        + counted(len(splits.train.classes), "class", "classes"),
        "images": splits.held,
        "features": f"{probe.heads.weight.shape[4]}, "
        + ("new views in each epoch" if config.augment else "computed once, without augmentation"),
        "heads": f"{counted(len(probe.names), 'encoder')} x {counted(config.seeds, 'seed')} x "
        + counted(len(probe.points), "setting"),
        "batch": f"{config.batch_size} = {processes} x {config.batch_size // processes}"
        if config.augment or probe.tunes
        else f"{config.batch_size}, the whole batch on each process",
        "steps": f"{probe.steps_per_epoch:,} an epoch, "
        f"{probe.total_steps:,} in {counted(config.epochs, 'epoch')}",
    }
    if config.unused:
        rows["no effect"] = ", ".join(config.unused)
    if splits.parts:
        rows["parts"] = splits.parts
    start.banner(probe.session, "probe", rows)


def summarize(probe: LinearProbe, results: Results) -> None:
    """Print the tables of the grid and of the results, the verdict and the faults."""
    if not comms.is_main():
        return
    config, chosen = probe.config, results["selected"]
    if len(probe.points) > 1:
        title = "grid: top-1 of the trained encoder after the last epoch, and after the best one"
        terminal.table(console, title, grid_rows(results), words=0)
    epochs = counted(config.epochs, "epoch")
    title = (
        f"{probe.session.directory}: {config.protocol} probe after {epochs}, "
        f"lr {chosen['lr']:g}, weight decay {chosen['weight_decay']:g}"
    )
    terminal.table(console, title, summary_rows(results), words=2)
    for sentence in (results["verdict"], *results["faults"]):
        terminal.write_line(console, sentence)
