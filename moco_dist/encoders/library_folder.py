"""Folders that timm and transformers write: config.json with the weights next to it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco_dist.config.encoder import BACKBONES
from moco_dist.config.recipe import ViewsConfig
from moco_dist.config.yaml_files import from_dict
from moco_dist.errors import ConfigError, DataError, MissingError, shown
from moco_dist.method import timm_backbone

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
BICUBIC = "bicubic"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# What a model of timm may be built with and still give the features that it gives here; the first
# two show in its tensors, and the third is compared.
_FREE = ("num_classes", "in_chans", "global_pool", "dynamic_img_size")
_SIDES = "img_size", "patch_size"
# Filters that images are resized with, by the numbers that transformers and PIL give them.
_RESAMPLE: dict[Any, str] = {2: "bilinear", 3: BICUBIC}
FILTERS = {name: name for name in _RESAMPLE.values()}
# Settings of transformers' ResNet that change its features and not its tensors.
_RESNET = {
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}


@dataclass(frozen=True)
class Folder:
    """What such a folder says of its encoder."""

    weights: Path
    # Its name here, if it is no ResNet that its tensors tell.
    backbone: str
    # encoder.options of a model of timm.
    options: list[str]
    # How images are fed to it; None if the folder doesn't tell.
    views: ViewsConfig | None
    # Pixels to which the shorter side of an image is resized, and the filter.
    resize: int
    filter: str


def read(folder: Path) -> Folder:
    """Return what the folder says; DataError if it can't be an encoder here, or MissingError."""
    described = _object(folder / CONFIG)
    options: list[str] = []
    kind = described.get("model_type")
    if kind == "resnet":
        strange = {k: described[k] for k, v in _RESNET.items() if described.get(k, v) != v}
        _refuse(folder, strange)
        backbone, fed = "", _of_transformers(folder)
    elif "architecture" in described and kind in (None, "timm_wrapper"):
        backbone, options = _timm(folder, described)
        fed = _of_timm(described.get("pretrained_cfg"))
    else:
        what = f"'model_type': {shown(kind)}" if kind else "neither model_type nor architecture"
        raise DataError(
            f"{folder / CONFIG}: says {what}, but encoders are read from folders of timm and of "
            "transformers' ResNetModel; give one of these"
        )
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise MissingError(f"{folder}: has {CONFIG} but no {' or '.join(WEIGHTS)}; save it again")
    try:
        views = from_dict(ViewsConfig, fed[0]) if fed else None
    except ConfigError as error:
        raise DataError(f"{folder}: {error}") from error
    _, resize, how = fed or ({}, 0, BICUBIC)
    return Folder(weights, backbone, options, views, resize, how)


def _timm(folder: Path, described: dict[str, Any]) -> tuple[str, list[str]]:
    """Return name and options of a model of timm; DataError for one that can't be built here."""
    name = str(described["architecture"]).partition(".")[0]
    given = described.get("model_args") or {}
    strange = {k: v for k, v in given.items() if k not in _FREE and v is not None}
    options = []
    if name not in BACKBONES:
        plain = {k: _side(v) if k in _SIDES else v for k, v in strange.items()}
        options = [f"{k}={json.dumps(v)}" for k, v in plain.items() if k.isidentifier()]
        strange = {k: v for k, v in strange.items() if not k.isidentifier()}
    usual = "avg" if name in BACKBONES else timm_backbone.pooling(name)
    for pool in (described.get("global_pool"), given.get("global_pool")):
        _refuse(folder, strange if pool in (None, usual) else {"global_pool": pool})
    return (name if name in BACKBONES else f"timm/{name}"), options


def _side(value: Any) -> Any:
    """Return the one number that timm takes for a square, which may be saved as two."""
    same = isinstance(value, list) and len(value) == 2 and value[0] == value[1]
    return value[0] if same else value


def _refuse(folder: Path, strange: dict[str, Any]) -> None:
    """Raise DataError if there is a setting with which the tensors give other features."""
    for key, value in strange.items():
        raise DataError(
            f"{folder / CONFIG}: {shown(key)} is {shown(value)}, with which the same tensors give "
            "other features than here; give an encoder without it"
        )


# The settings of the views, the pixels to which images are resized, and the filter.
Fed = tuple[dict[str, Any], int, str]


def _of_timm(settings: Any) -> Fed | None:
    """Return how timm feeds images, from a pretrained_cfg."""
    try:
        _, height, width = settings["input_size"]
        share, mean, std = float(settings["crop_pct"]), settings["mean"], settings["std"]
    except (KeyError, TypeError, ValueError):
        return None
    if height != width or not 0 < share <= 1:
        return None
    resize = math.floor(height / share)
    how = settings.get("interpolation")
    how = how if how in FILTERS else BICUBIC
    return {"size": height, "mean": list(mean), "std": list(std)}, resize, how


def _of_transformers(folder: Path) -> Fed | None:
    """Return how transformers feeds images, from a preprocessor_config.json that crops squares."""
    if not (folder / PROCESSOR).is_file():
        return None
    settings = _object(folder / PROCESSOR)
    try:
        edge, share = int(settings["size"]["shortest_edge"]), settings.get("crop_pct")
        how = _RESAMPLE.get(settings.get("resample"), BICUBIC)
        unit = 255 * settings.get("rescale_factor", 1 / 255) if _does(settings, "rescale") else 255
        mean, std = settings["image_mean"], settings["image_std"]
        mean, std = (
            (mean, std) if _does(settings, "normalize") else ([0] * len(mean), [1] * len(std))
        )
        if not math.isclose(unit, 1):  # pixels are at most `unit`, and 1 here
            mean, std = ([each / unit for each in both] for both in (mean, std))
        crop = int(settings["crop_size"]["height"]) if "crop_size" in settings else edge
    except (KeyError, TypeError, ValueError):
        return None
    # ConvNextImageProcessor resizes to the edge divided by its share, and below 384 pixels only.
    resize = int(edge / share) if share and edge < 384 else edge
    return {"size": min(crop, resize), "mean": list(mean), "std": list(std)}, resize, how


def _does(settings: dict[str, Any], what: str) -> bool:
    return settings.get(f"do_{what}") is not False


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: can't be read ({shown(error, 200)}); save it again") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds no settings; save it again")
    return found
