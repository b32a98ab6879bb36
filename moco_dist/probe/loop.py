"""The training loop of a probe, and the results after its last step."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from moco_dist.data import run_lists
from moco_dist.distributed import comms
from moco_dist.errors import output_errors
from moco_dist.method.schedule import due
from moco_dist.probe.linear_probe import LinearProbe
from moco_dist.probe.overlap import Overlap
from moco_dist.probe.results import LOSS, TOP1, TOP_K, brief, measure, select
from moco_dist.probe.verdict import Results, deciding_part
from moco_dist.runs.environment import memory_gb
from moco_dist.runs.record import TRAINED, Metric
from moco_dist.runs.status import replace
from moco_dist.tracking.tracker import Tracker


def loop(probe: LinearProbe, total: int, tracker: Tracker) -> None:
    """Train up to step `total`; evaluate and log after each epoch, and save when due."""
    config, per_epoch = probe.config, probe.steps_per_epoch
    since, evaluated = time.monotonic(), probe.step
    while probe.step < total:
        losses = probe.train_step()
        step, last = probe.step, probe.step == total
        epoch = 0 if step % per_epoch else step // per_epoch
        if epoch or last:
            images = (step - evaluated) * config.batch_size
            metrics = {
                "epoch": step / per_epoch,
                Metric.IMAGES_PER_SECOND: images / (time.monotonic() - since),
                Metric.MEMORY_GB: memory_gb(probe.session.device),
            }
            tracker.log(step, metrics | evaluate(probe, comms.mean(losses), epoch > 0))
            run_lists.share(probe.session.directory, probe.splits.train, probe.splits.test)
            since, evaluated = time.monotonic(), step
        keep = config.checkpoint
        probe.session.stop.needs = 2 * probe.session.saver.seconds
        if last or due(keep.every_epochs, epoch) or due(keep.every_steps, step):
            probe.save(wait=last)


def evaluate(probe: LinearProbe, losses: Tensor, epoch_ends: bool) -> dict[str, float]:
    """Return the metrics of each encoder at its best point of the grid, averaged over seeds.

    The best point has the highest validation top-1. Without validation images there is one point,
    measured on the test images. `losses` (encoders, seeds, points) are those of the last step.
    """
    part = "validation" if "validation" in probe.parts else "test"
    probe.refresh(part)
    notes = epoch_ends and part == "validation"
    figures = probe.note_best() if notes else probe.evaluate(part)
    chosen = select(probe, {part: figures})
    rates = probe.optimizer.rates(probe.step - 1, probe.steps_per_epoch, probe.total_steps)
    found: dict[str, float] = {
        Metric.LOSS: float(losses.mean(1)[0, chosen[0]]),
        Metric.LR: rates[chosen[0]],
    }
    for place, name in enumerate(probe.names):
        values = figures[place, :, chosen[place]].mean(0).tolist()
        found |= {f"{name}/loss": values[LOSS], f"{name}/top1": values[TOP1]}
        found[f"{name}/top{probe.config.top_k}"] = values[TOP_K]
    return found


def conclude(probe: LinearProbe, tracker: Tracker, overlaps: list[Overlap]) -> Results:
    """Return the results after the last step; log them and the confusion matrix."""
    results = measure(probe, overlaps)
    part = deciding_part(results)
    if tracker.media:
        counts = torch.tensor(results["encoders"][TRAINED][part]["confusion"])
        tracker.media.confusion(probe.step, counts, probe.splits.train.classes)
    tracker.conclude(
        {
            f"{name}/{part}_{key}": value
            for name, parts in brief(results).items()
            for part, figures in parts.items()
            for key, value in figures.items()
        }
    )
    return results


def write(path: Path, results: Results) -> None:
    """Write results.json."""
    with output_errors(path):
        replace(path, json.dumps(results) + "\n")
