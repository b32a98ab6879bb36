"""Measure a pretrained encoder: train a linear classifier on its frozen features, \
and on a random encoder's."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from moco_dist import checkpoint, command, comms, console_lines, data, peers, runtime
from moco_dist.config import ProbeConfig
from moco_dist.errors import ConfigError, NumbersError, StoppedError
from moco_dist.linear_probe import CONTROL, TRAINED, LinearProbe
from moco_dist.metrics import memory_gb
from moco_dist.runtime import console, logger
from moco_dist.stopping import StopRequests
from moco_dist.tracking import Tracker


def run(config: ProbeConfig, stop: StopRequests | None = None) -> None:
    """Probe an encoder from where the run directory stands to the end, or to a request to stop."""
    if not config.encoder:
        raise ConfigError(
            "encoder is empty; give encoder=runs/NAME, a run directory or a checkpoint folder"
        )
    source = Path(config.encoder).expanduser()
    config = dataclasses.replace(config, name=config.run_name())
    found = peers.together(lambda: checkpoint.find(source))
    encoder, architecture, trained_views = peers.together(lambda: checkpoint.load_encoder(found))
    session = runtime.start(config, stop)
    # Each process looked for itself, and a pretraining may be going on.
    peers.same_everywhere("the checkpoint of the encoder", f"{found.path} {found.state['sha256']}")
    splits = data.load(config.data)
    peers.together(lambda: _check_classes(splits, config))
    splits = dataclasses.replace(splits, train=splits.train.labelled())
    for key in ("size", "mean", "std"):
        ours, theirs = getattr(config.views, key), getattr(trained_views, key)
        if ours != theirs:
            logger.warning(
                "views.%s=%s here and %s in pretraining; use the same", key, ours, theirs
            )
    probe = LinearProbe(config, session, splits, encoder, architecture)
    announce(probe, f"{found.path} (step {found.step:,})")
    total = min(probe.total_steps, config.stop_at_step or probe.total_steps)
    runtime.begin(session)
    group = runtime.group(config.pretraining(), found.state)
    with runtime.tracker(session, total, "probe", group) as tracker:
        try:
            loop(probe, total, tracker)
            if probe.step == probe.total_steps:
                results = conclude(probe, tracker)
        except (StoppedError, NumbersError) as error:
            if probe.step:
                probe.save(wait=True)
            place = f"saved after step {probe.step:,} of {probe.total_steps:,}"
            runtime.end_early(session, error, place if probe.step else "nothing to save")
    probe.check_frozen()
    if probe.step == probe.total_steps:
        runtime.finish(session, results)
        summarize(probe, results)


def _check_classes(splits: data.Splits, config: ProbeConfig) -> None:
    data.require_labels(splits, config.data)
    classes = len(splits.train.classes)
    if config.top_k > classes:
        raise ConfigError(
            f"top_k={config.top_k} is more than the {classes} classes of {config.data.name}; "
            f"use {classes} or less"
        )


def loop(probe: LinearProbe, total: int, tracker: Tracker) -> None:
    """Train the heads up to step `total`."""
    config, per_epoch = probe.config, probe.plan.steps_per_epoch
    since, evaluated = time.monotonic(), probe.step
    part = "validation" if "validation" in probe.parts else "test"
    while probe.step < total:
        loss = probe.train_step()
        step, last = probe.step, probe.step == total
        epoch_ends = step % per_epoch == 0
        if epoch_ends or last:
            metrics = {"epoch": step / per_epoch, "train/loss": float(comms.mean(loss))}
            metrics["train/images_per_second"] = (
                (step - evaluated) * config.batch_size / (time.monotonic() - since)
            )
            metrics["system/memory_gb"] = memory_gb(probe.session.device)
            for name in probe.encoders:
                metrics |= {f"{name}/{k}": v for k, v in probe.evaluate(name, part).items()}
            tracker.log(step, metrics | {"train/lr": probe.optimizer.param_groups[0]["lr"]})
            since, evaluated = time.monotonic(), step
        keep = config.checkpoint
        due = keep.every_epochs and epoch_ends and step // per_epoch % keep.every_epochs == 0
        probe.session.stop.needs = 2 * probe.session.saver.seconds
        if last or due or (keep.every_steps and step % keep.every_steps == 0):
            probe.save(wait=last)


def final_results(probe: LinearProbe) -> dict[str, dict[str, dict[str, float]]]:
    """Return the figures of the last step: encoder, part of the data, metric."""
    return {
        name: {
            part: probe.evaluate(name, part) | {"knn_top1": probe.knn_top1(name, part)}
            for part in probe.parts
            if part != "train"
        }
        for name in probe.encoders
    }


Results = dict[str, dict[str, dict[str, float]]]


def conclude(probe: LinearProbe, tracker: Tracker) -> Results:
    """Return the figures of the last step; hand them, and the confusion matrix, to the tracker."""
    results = final_results(probe)
    part = "test" if "test" in probe.parts else "validation"
    counts = probe.confusion(TRAINED, part)
    if tracker.media:
        tracker.media.confusion(probe.step, counts, probe.splits.train.classes)
    tracker.conclude(
        {
            f"{name}/{part}_{key}": value
            for name, parts in results.items()
            for part, figures in parts.items()
            for key, value in figures.items()
        }
    )
    return results


def announce(probe: LinearProbe, place: str) -> None:
    """Print the banner."""
    config, splits, processes = probe.config, probe.splits, comms.world_size()
    rows = {
        "encoder": place,
        "data": f"{config.data.name}: {len(splits.train):,} training, "
        f"{len(splits.validation):,} validation and {len(splits.test):,} test images, "
        f"{len(splits.train.classes)} classes",
        "images": splits.held,
        "features": f"{probe.heads.heads[TRAINED].in_features}, "
        + ("new views in each epoch" if config.augment else "computed once, without augmentation"),
        "batch": f"{config.batch_size} = {processes} x {config.batch_size // processes}",
        "steps": f"{probe.plan.steps_per_epoch:,} an epoch, "
        f"{probe.total_steps:,} in {config.epochs} epochs",
    }
    runtime.banner(probe.session, "probe", rows)


def summarize(probe: LinearProbe, results: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print the figures of the last epoch, trained encoder and control side by side."""
    if not comms.is_main():
        return
    top_k = f"top{probe.config.top_k}"
    titles = {TRAINED: "trained", CONTROL: "random control"}
    columns = ("encoder", "images", "top-1", top_k.replace("top", "top-"), "loss", "kNN top-1")
    rows = [columns]
    for name, parts in results.items():
        for part, figures in parts.items():
            top1, top_few, knn = (f"{100 * figures[k]:.2f} %" for k in ("top1", top_k, "knn_top1"))
            rows.append((titles[name], part, top1, top_few, f"{figures['loss']:.4f}", knn))
    title = f"{probe.session.directory}: linear probe after {probe.config.epochs} epochs"
    console_lines.table(console, title, rows, words=2)


if __name__ == "__main__":
    command.main(ProbeConfig, run, __doc__)
