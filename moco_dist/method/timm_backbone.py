"""timm models as backbones, with grouped BatchNorm layers."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_dist.config.encoder import NOT_OPTIONS
from moco_dist.errors import ConfigError, shown

# Attributes that hold the rate of a dropout layer.
_RATES = ("p", "prob", "drop_prob")


def build(
    name: str,
    channels: int,
    norm_layer: Callable[[int], nn.BatchNorm2d],
    options: Mapping[str, Any],
) -> nn.Module:
    """Return timm's model `name` with new weights and `norm_layer`s, without its classifier.

    `options` are timm.create_model's. Raises ConfigError if timm or the model is missing or has
    other options, or if training would depend on the machine: the model draws random numbers, or
    normalises over the batch in another way.
    """
    model = _created(name, {"num_classes": 0, "in_chans": channels}, options)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            model.set_submodule(path, _grouped(module, norm_layer))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"encoder.backbone=timm/{name}: its layer {path} is a {type(module).__name__}, "
                "which is not computed in groups here; choose another model"
            )
        rate = max(getattr(module, key, 0) or 0 for key in _RATES)
        if "Drop" in type(module).__name__ and rate:
            raise ConfigError(
                f"encoder.backbone=timm/{name}: its layer {path} drops at random (rate {rate}), "
                "so its result would depend on the number of processes; set that rate to 0, for "
                "example by encoder.options=[drop_path_rate=0], or choose another model"
            )
    return model


def _created(name: str, own: Mapping[str, Any], options: Mapping[str, Any]) -> nn.Module:
    """Return timm's model `name` with these settings; ConfigError if it has no such option."""
    timm, model = _library(name), None
    if options:
        with torch.device("meta"):
            _check(name, timm.create_model(name), options)
    for extra in ({"dynamic_img_size": True}, {}):  # with which positions fit any image size
        try:
            model = timm.create_model(name, **own, **options, **extra)
            break
        except Exception as error:
            if extra and isinstance(error, TypeError):
                continue
            if not options:
                raise
            given = ", ".join(f"{key}={value}" for key, value in options.items())
            raise ConfigError(
                f"encoder.options: timm/{name} can't be built with {shown(given)} "
                f"({shown(str(error) or type(error).__name__, 200)}); correct them"
            ) from error
    assert isinstance(model, nn.Module), "one of both has returned or raised"
    return model


def _check(name: str, usual: nn.Module, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for options that the model, as timm builds it, doesn't take."""
    known = inspect.signature(type(usual)).parameters
    plain = [key for key, each in known.items() if isinstance(each.default, int | float | str)]
    plain = [key for key in plain if key not in NOT_OPTIONS]
    takes_all = any(each.kind is each.VAR_KEYWORD for each in known.values())
    for key, value in options.items():
        given = f"encoder.options: {key}={shown(value)}"
        if key not in known and not takes_all:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(plain)}"
            raise ConfigError(f"{given}: timm/{name} has no option {key}; {hint}")
        usual_value = known[key].default if key in known else None
        kind = bool if isinstance(usual_value, bool) else int | float
        numeric = isinstance(usual_value, bool | int | float)
        if numeric and not isinstance(value, kind | list | tuple):
            rule = "true or false" if kind is bool else "a number"
            raise ConfigError(f"{given} is not {rule}, which timm/{name} needs; give one")


def freeze_patches(model: nn.Module, name: str) -> None:
    """Freeze a new random projection of the patches (Chen, Xie and He 2021, section 4.2).

    It is uniform within sqrt(6 / (numbers in + numbers out)), with biases of 0, as in moco-v3's
    vits.py. Raises ConfigError for a model without one.
    """
    projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(projection, nn.Conv2d):
        raise ConfigError(
            f"encoder.patches=frozen: timm/{name} has no projection of patches; use a Vision "
            "Transformer, or encoder.patches=trained"
        )
    projection.requires_grad_(False)
    nn.init.xavier_uniform_(projection.weight.flatten(1))
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)


def fix_positions(model: nn.Module, name: str) -> None:
    """Make the positions of the patches fixed sines and cosines (Chen, Xie and He 2021, A.1).

    Those of a row come first, then those of a column, each sines before cosines, as in moco-v3's
    vits.py; the class token has zeros. Raises ConfigError for a model without such positions.
    """
    positions = getattr(model, "pos_embed", None)
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not isinstance(positions, nn.Parameter) or positions.dim() != 3 or grid is None:
        raise ConfigError(
            f"encoder.positions=sincos: timm/{name} adds no positions to its patches; use a Vision "
            "Transformer, or encoder.positions=trained"
        )
    width = positions.shape[2]
    if width % 4:
        raise ConfigError(
            f"encoder.positions=sincos needs a width that is a multiple of 4, and timm/{name} has "
            f"{width}; change it (embed_dim in encoder.options), or use encoder.positions=trained"
        )
    table = _library(name).layers.build_sincos2d_pos_embed(
        list(grid), width, interleave_sin_cos=True
    )
    with torch.no_grad():
        positions.copy_(F.pad(table, (0, 0, positions.shape[1] - len(table), 0)))
    positions.requires_grad_(False)


def interpolates(model: nn.Module, size: int) -> str:
    """Return a sentence if the model interpolates its positions for views of `size` pixels."""
    made = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if not isinstance(getattr(model, "pos_embed", None), nn.Parameter) or not made:
        return ""
    if tuple(made) == (size, size):
        return ""
    return (
        f"the positions of the patches are made for {made[0]} pixels, and interpolated for views "
        f"of {size}; encoder.options=[img_size={size}] makes them for the views"
    )


def classifiers(name: str) -> tuple[str, ...]:
    """Return how the names of a model's classifiers begin, whose tensors `build` leaves out."""
    found = _library(name).get_pretrained_cfg(name)
    names = (found.classifier if found else None) or ()
    return tuple(f"{each}." for each in ([names] if isinstance(names, str) else names))


def pooling(name: str) -> Any:
    """Return what a model pools its features with, such as "avg", None if it doesn't say."""
    with torch.device("meta"):
        model = _library(name).create_model(name)
    owner = model if hasattr(model, "global_pool") else getattr(model, "head", None)
    pool = getattr(owner, "global_pool", None)
    return getattr(pool, "pool_type", pool)


def _library(name: str) -> Any:
    """Return timm; ConfigError if it or its model `name` is missing."""
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"encoder.backbone=timm/{shown(name)} needs timm, which is not installed; "
            "pip install timm, or choose a ResNet"
        ) from error
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0].split('.')[0]}*")[:3] if name else []
        hint = f"near it are {', '.join(near)}" if near else "timm.list_models() has all names"
        raise ConfigError(f"encoder.backbone=timm/{shown(name)}: timm has no such model; {hint}")
    return timm


def _grouped(norm: nn.BatchNorm2d, norm_layer: Callable[[int], nn.BatchNorm2d]) -> nn.BatchNorm2d:
    """Return a `norm_layer` with the settings, weights and activation of `norm`."""
    grouped = norm_layer(norm.num_features)
    grouped.eps, grouped.momentum = norm.eps, norm.momentum
    # A new model may start a residual branch at zero.
    grouped.load_state_dict(norm.state_dict())
    if hasattr(norm, "act"):  # timm's BatchNormAct2d
        grouped.drop, grouped.act = norm.drop, norm.act
        grouped.register_forward_hook(_activate)
    return grouped


def _activate(norm: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    activated: Tensor = norm.act(norm.drop(output))
    return activated
