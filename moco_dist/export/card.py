"""The model card of an exported encoder, as Markdown, from the files of its run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moco_dist.config.yaml_files import flat, to_dict
from moco_dist.distributed import fingerprint
from moco_dist.encoders.load import Found
from moco_dist.errors import UserError
from moco_dist.export.targets import expansion
from moco_dist.runs import checkpoint
from moco_dist.runs import record as runs_record
from moco_dist.runs.checkpoint import Checkpoint
from moco_dist.runs.record import CONTROL, PARTS, TRAINED, Metric

# What a probe calls the two encoders in its results.
# Keys of the pretraining that the card shows, with the words for them.
_SETTINGS = {
    "batch_size": "batch size",
    "bn_groups": "BatchNorm groups",
    "moco.queue_size": "queue",
    "moco.temperature": "temperature",
    "moco.momentum": "momentum of the key encoder",
    "moco.symmetric": "symmetric loss",
    "optim.lr": "learning rate",
    "optim.weight_decay": "weight decay",
    "optim.schedule": "schedule",
    "precision": "precision",
    "seed": "seed",
}
# What detectron2 needs to know beside the weights.
_DETECTRON2 = """\
MODEL:
  WEIGHTS: {folder}/backbone.pkl
  PIXEL_MEAN: {mean}
  PIXEL_STD: {std}
  RESNETS:
    DEPTH: {depth}
    STRIDE_IN_1X1: false
    NUM_GROUPS: {groups}
    WIDTH_PER_GROUP: {width}
    STEM_OUT_CHANNELS: {stem}
    RES2_OUT_CHANNELS: {res2}
INPUT:
  FORMAT: RGB
"""


def text(found: Found, which: str, target: str, lines: str, folder: Path) -> str:
    """Return the card of an encoder for `target`; `folder` is where the user will have it."""
    name = run_name(found.checkpoint)
    load = (
        f"```yaml\n{detectron2_config(found, folder)}```"
        if target == "detectron2"
        else f'```python\nfolder = "{folder}"\n{lines}```'
    )
    views, channels = found.fed, found.architecture.channels
    kind = {1: "gray", 3: "RGB"}.get(channels, f"of {channels} channels")
    usual = " (the usual ones, as the file that it was exported from doesn't tell its own)"
    proof = (
        "detectron2 was not at hand to build the model: the names were taken back to torchvision's "
        "by a second map, and the features are those of the encoder within 1e-5."
        if target == "detectron2"
        else "These very lines were run on drawn images before the files were kept, and gave the "
        "features of the encoder within 1e-5."
    )
    return f"""\
---
tags: [self-supervised, moco, image-feature-extraction]
---

# {name}, for {target}

An image encoder pretrained without labels by Momentum Contrast with moco_dist: its {which} encoder
without the projection head.

| | |
| --- | --- |
{_rows(architecture(found))}
{_rows(training(found.checkpoint))}

## Use

{load}

`images` are {kind}, float (n, {channels}, {views.size}, {views.size}): pixels in [0, 1],
less the mean {views.mean}, divided by {views.std}{"" if found.views else usual}.
{proof}

## Measured

{chr(10).join(f"- {line}" for line in measured(found))}

## Licence

moco_dist is under the MIT licence, which says nothing of these weights: whoever trained them says
under which terms they are passed on, and the terms of the training images hold as well.
"""


def _rows(rows: dict[str, str]) -> str:
    return "\n".join(f"| {key} | {value} |" for key, value in rows.items())


def architecture(found: Found) -> dict[str, str]:
    """Return what the encoder is."""
    config = found.architecture
    stem = "" if config.is_timm else f", {config.stem} stem, width {config.width}"
    count = sum(p.numel() for p in found.backbone.parameters())
    length = found.backbone.num_features
    return {"encoder": f"{config.backbone}{stem}; {count:,} parameters, {length} features"}


def training(found: Checkpoint) -> dict[str, str]:
    """Return what it was trained on and how, as far as the checkpoint knows."""
    config = found.state.get("config")
    settings = flat(config) if isinstance(config, dict) else {}
    if "data.name" not in settings:
        return {"training": "not known: the file holds the encoder alone"}
    epoch = float(found.state.get("epoch") or 0)
    limit = f", {settings['data.limit']} images of it" if settings.get("data.limit") else ""
    values = [f"{words} {settings[key]}" for key, words in _SETTINGS.items() if key in settings]
    return {
        "data": f"{settings['data.name']} at {settings['data.size']} pixels{limit}, "
        f"{settings['data.validation']:.0%} held out; fingerprint {found.state.get('data')}",
        "training": f"step {found.step:,}, epoch {epoch:g} of {settings['epochs']}",
        "settings": ", ".join(values),
    }


def measured(found: Found) -> Iterator[str]:
    """Yield the figures of this very checkpoint, each with how it was measured."""
    saved = found.checkpoint
    run, config = run_directory(saved), saved.state.get("config")
    settings = flat(config) if isinstance(config, dict) else {}
    accuracies = dict(runs_record.read(run).figures(Metric.KNN_TOP1)) if run else {}
    if saved.step in accuracies:
        yield (
            f"kNN top-1 {accuracies[saved.step]:.1%} on the validation images: weighted nearest "
            f"neighbours, k {settings.get('knn.k')}, temperature {settings.get('knn.temperature')}"
        )
    probe = run.with_name(f"{run.name}-probe") if run else None
    figures = list(_probed(probe, found)) if probe and probe.is_dir() else []
    yield from figures
    if saved.step not in accuracies and not figures:
        yield "nothing yet: no kNN evaluation or finished probe of this checkpoint was found"


def _probed(run: Path, found: Found) -> Iterator[str]:
    """Yield the results of a finished probe, if it was this encoder that it probed."""
    record = runs_record.read(run)
    try:
        newest = checkpoint.newest(run)
    except UserError:
        return
    of_this = newest and newest.state.get("encoder") == fingerprint.of_module(found.backbone)
    if not of_this or not record.results:
        return
    config = record.config
    way = (
        f"{config.get('epochs')} epochs, batch size {config.get('batch_size')}, learning rate "
        f"{config.get('optim.lr')}, "
        + ("random views" if config.get("augment") else "features computed once")
    )
    top_k = config.get("top_k", 5)
    for part in reversed(PARTS):
        top1 = record.result(TRAINED, part, "top1")
        if top1 is None:
            continue
        line = f"linear probe ({way}), {part} images: top-1 {top1:.2%}"
        more = {f"top-{top_k}": f"top{top_k}", "kNN top-1": "knn_top1"}
        for words, key in more.items():
            if (value := record.result(TRAINED, part, key)) is not None:
                line += f", {words} {value:.2%}"
        control = record.result(CONTROL, part, "top1")
        beside = f"; a random encoder of this architecture: {control:.2%}"
        yield line + (beside if control is not None else "")


def run_directory(found: Checkpoint) -> Path | None:
    """Return the run that a checkpoint folder lies in, None for a file or a folder elsewhere."""
    inside = found.path.parent.name == "checkpoints"
    return found.path.parent.parent if inside else None


def run_name(found: Checkpoint) -> str:
    """Return what the encoder is called: its run, or its file."""
    run = run_directory(found)
    return run.resolve().name if run else found.path.name.partition(".")[0]


def detectron2_config(found: Found, folder: Path) -> str:
    """Return the part of a configuration of detectron2 that fits the weights."""
    config, views = found.architecture, found.fed
    depth = int("".join(filter(str.isdigit, config.backbone.partition("_")[0])))
    groups, width = 1, config.width
    if "x" in (tail := config.backbone.partition("_")[2]):
        groups, width = (int(n) for n in tail.rstrip("d").split("x"))
        width = width * config.width // 64
    elif tail == "2":
        width = 2 * config.width
    return _DETECTRON2.format(
        folder=folder,
        mean=json.dumps([round(255 * v, 3) for v in views.mean]),
        std=json.dumps([round(255 * v, 3) for v in views.std]),
        depth=depth,
        groups=groups,
        width=width,
        stem=config.width,
        res2=config.width * expansion(found),
    )


def description(found: Found, which: str, target: str) -> dict[str, Any]:
    """Return what `encoders.load` needs to know of an exported folder."""
    return {
        "format": 1,
        "target": target,
        "which": which,
        "encoder": to_dict(found.architecture),
        "views": to_dict(found.views) if found.views else None,
        "resize": found.resize,
    }
