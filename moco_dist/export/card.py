"""The model card of an exported encoder, as Markdown, from the files of its run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moco_dist.config.moco import MocoConfig
from moco_dist.config.yaml_files import flat, to_dict
from moco_dist.distributed import fingerprint
from moco_dist.encoders.load import Found
from moco_dist.encoders.state_dict import SUFFIXES
from moco_dist.errors import UserError, shown
from moco_dist.runs.checkpoint import Checkpoint, newest
from moco_dist.runs.record import CONTROL, PARTS, TRAINED, Metric, read, read_object

# Keys of the pretraining that the card shows.
_SETTINGS = (
    *("batch_size", "bn_groups", "optim.name", "optim.lr", "optim.weight_decay", "optim.schedule"),
    *("precision", "seed"),
)


def text(found: Found, which: str, target: str, lines: str, folder: Path | str) -> str:
    """Return the card of an encoder for `target`, exported to `folder` or to a name on the hub."""
    run = run_directory(found.checkpoint)
    name = run.resolve().name if run else named(found.checkpoint.path)
    views, channels = found.fed, found.architecture.channels
    kind = {1: "gray", 3: "RGB"}.get(channels, f"of {channels} channels")
    usual = " (the defaults, because the exported file doesn't contain its own)"
    proof = (
        "The model was not built with detectron2: a second map translated the names back to "
        "torchvision's, and the features agreed with the encoder's within 1e-5."
        if target == "detectron2"
        else "Before the files were kept, this code was run on drawn images (from a folder), and "
        "its features agreed with the encoder's within 1e-5."
    )
    count = sum(p.numel() for p in found.backbone.parameters())
    length = found.backbone.num_features
    what = {"encoder": f"{found.architecture.described}; {count:,} parameters, {length} features"}
    recorded = found.checkpoint.state.get("config")
    settings = flat(recorded) if isinstance(recorded, dict) else {}
    what |= training(found.checkpoint, settings)
    words, tags = whose(origin(found), which)
    library = {"timm": "timm", "huggingface": "transformers"}.get(target)
    return f"""\
---
{f"library_name: {library}{chr(10)}" if library else ""}tags: [{", ".join(tags)}]
pipeline_tag: image-feature-extraction
---

# {name}, for {target}

{words}

| | |
| --- | --- |
{chr(10).join(f"| {key} | {value} |" for key, value in what.items())}

## Use

{use(found, target, lines, folder)}

`images` are {kind}, float (n, {channels}, {views.size}, {views.size}): pixels in [0, 1],
less the mean {views.mean}, divided by {views.std}{"" if found.views else usual}.
{proof}

## Measured

{chr(10).join(f"- {line}" for line in measured(found, settings))}

## Licence

The MIT licence of moco_dist does not cover these weights: whoever trained them sets their terms,
and the terms of the training images apply as well.
"""


def use(found: Found, target: str, lines: str, folder: Path | str) -> str:
    """Return the block of a card that loads the encoder, from a folder or a name on the hub."""
    on_hub, beginning = isinstance(folder, str), f'folder = "{folder}"\n'
    if target == "detectron2":
        block = f"```yaml\n{detectron2_config(found, folder)}```"
        download = f"```bash\nhf download {folder} --local-dir {folder}\n```\n\n"
        return download + block if on_hub else block
    if on_hub:
        lines = lines.replace('f"local-dir:{folder}"', f'"hf-hub:{folder}"')
        if target != "huggingface":  # which takes the name for the folder
            beginning = f"""\
from huggingface_hub import snapshot_download

folder = snapshot_download("{folder}")
"""
    return f"```python\n{beginning if 'folder' in lines else ''}{lines}```"


def origin(found: Found) -> dict[str, str]:
    """Return who trained an encoder: `kind`, the `source` of the weights it started from, `method`.

    The kind is "run", "init_from" (a run that started from other weights), "original" (the original
    scripts) or "unknown". The method is empty for Momentum Contrast.
    """
    saved = found.checkpoint
    if noted := saved.state.get("origin"):  # of an export
        return {key: shown(noted.get(key, "")) for key in ("kind", "source", "method")}
    source = Path(saved.state["config"].get("init_from") or "").name
    if saved.step:
        kind, moco = (
            "init_from" if source else "run",
            MocoConfig.stored(flat(saved.state["config"])),
        )
        method = _method(moco, found.architecture.vectors) if moco else ""
        return {"kind": kind, "source": source, "method": method}
    kind = "original" if "epoch" in saved.state else "unknown"
    return {"kind": kind, "source": "", "method": ""}


def _method(settings: MocoConfig, vectors: int) -> str:
    """Return what a method without a key encoder is called; empty for Momentum Contrast."""
    if settings.keys == "momentum":
        return ""
    if settings.negatives == "bank":
        return "a memory bank" if vectors == 1 else "Contrastive Multiview Coding"
    return "SimCLR" if settings.symmetric else "contrastive learning, end to end,"


def whose(trained: dict[str, str], which: str) -> tuple[str, tuple[str, ...]]:
    """Return what a card says of an encoder with this origin, and its tags."""
    part = f"its {which} encoder\nwithout the projection head."
    method: tuple[str, ...] = ("moco",)
    ours = f"by Momentum Contrast with moco_dist: {part}"
    if trained["method"]:
        ours = f"by {trained['method']} with moco_dist: its encoder\nwithout the projection head."
        method = ("simclr",) if trained["method"] == "SimCLR" else ()
    words, tags = {
        "run": (f"pretrained without labels {ours}", ("self-supervised", *method)),
        "init_from": (
            f"trained {ours} The training used no labels, but it\nstarted from the weights in "
            f"`{trained['source']}`, which may have been trained with labels.",
            method,
        ),
        "original": (
            f"pretrained without labels by the original MoCo scripts: {part}",
            ("self-supervised", "moco"),
        ),
    }.get(
        trained["kind"],
        ("that moco_dist did not train. Whether it was trained with labels is\nnot known.", ()),
    )
    return f"An image encoder {words}", tags


def training(found: Checkpoint, settings: dict[str, Any]) -> dict[str, str]:
    """Return the data and the settings of the pretraining, as far as the checkpoint has them."""
    if "data.name" not in settings:
        return {"training": "unknown: the file holds only the encoder"}
    epoch = float(found.state.get("epoch") or 0)
    limit = f", {settings['data.limit']} images of it" if settings.get("data.limit") else ""
    moco = MocoConfig.stored(settings)
    values = [f"moco.{key}={value}" for key, value in (moco.settings if moco else {}).items()]
    values += [f"{key}={settings[key]}" for key in _SETTINGS if key in settings]
    return {
        "data": f"{settings['data.name']} at {settings['data.size']} pixels{limit}, "
        f"{settings['data.validation']:.0%} held out; fingerprint {found.state.get('data')}",
        "training": f"step {found.step:,}, epoch {epoch:g} of {settings['epochs']}",
        "settings": ", ".join(values),
    }


def measured(found: Found, settings: dict[str, Any]) -> Iterator[str]:
    """Yield the figures of this checkpoint, each with how it was measured."""
    saved, run = found.checkpoint, run_directory(found.checkpoint)
    accuracies = dict(read(run).figures(Metric.KNN_TOP1)) if run else {}
    if saved.step in accuracies:
        yield (
            f"kNN top-1 {accuracies[saved.step]:.1%} on the validation images: weighted nearest "
            f"neighbours, k {settings.get('knn.k')}, temperature {settings.get('knn.temperature')}"
        )
    probe = run.with_name(f"{run.name}-probe") if run else None
    figures = list(_probed(probe, found)) if probe and probe.is_dir() else []
    yield from figures
    if saved.step not in accuracies and not figures:
        yield "nothing: no kNN evaluation and no finished probe of this checkpoint was found"


def _probed(run: Path, found: Found) -> Iterator[str]:
    """Yield the results of a finished probe if it probed this encoder."""
    record = read(run)
    try:
        saved = newest(run)
    except UserError:
        return
    of_this = saved and saved.state.get("encoder") == fingerprint.of_module(found.backbone)
    if not of_this or not record.results:
        return
    config, chosen = record.config, read_object(run / "results.json").get("selected")
    rate = chosen.get("lr") if isinstance(chosen, dict) else config.get("optim.lr")
    way = (
        f"{config.get('epochs')} epochs, batch size {config.get('batch_size')}, learning rate "
        f"{rate}, " + ("random views" if config.get("augment") else "features computed once")
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
        if (control := record.result(CONTROL, part, "top1")) is not None:
            line += f"; a random encoder of this architecture: {control:.2%}"
        yield line


def run_directory(found: Checkpoint) -> Path | None:
    """Return the run of a checkpoint, None if the checkpoint is outside a run."""
    inside = found.path.parent.name == "checkpoints"
    return found.path.parent.parent if inside else None


def named(source: Path) -> str:
    """Return the name of an encoder outside of a run: that of its folder or file."""
    file = source.with_name(source.name.removesuffix(".tar"))
    return file.stem if file.suffix in SUFFIXES and not source.is_dir() else file.name


def detectron2_config(found: Found, folder: Path | str) -> str:
    """Return the part of a detectron2 configuration that matches the weights."""
    config, views = found.architecture, found.fed
    convolution = found.backbone.layer1[0].conv2
    return f"""\
MODEL:
  WEIGHTS: {folder}/backbone.pkl
  PIXEL_MEAN: {[round(255 * v, 3) for v in views.mean]}
  PIXEL_STD: {[round(255 * v, 3) for v in views.std]}
  RESNETS:
    DEPTH: {re.findall("[0-9]+", config.backbone)[0]}
    STRIDE_IN_1X1: false
    NUM_GROUPS: {convolution.groups}
    WIDTH_PER_GROUP: {convolution.out_channels // convolution.groups}
    STEM_OUT_CHANNELS: {config.width}
    RES2_OUT_CHANNELS: {found.backbone.num_features // 8}
INPUT:
  FORMAT: RGB
"""


def description(found: Found, which: str, target: str) -> dict[str, Any]:
    """Return what `encoders.load` needs to read an exported folder."""
    return {
        "format": 1,
        "target": target,
        "which": which,
        "origin": origin(found),
        "encoder": to_dict(found.architecture),
        "views": to_dict(found.views) if found.views else None,
        "resize": found.resize,
        "filter": found.filter,
    }
