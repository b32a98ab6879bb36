"""timm models as backbones, with grouped BatchNorm layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moco_dist.errors import ConfigError, shown

# Attributes that hold the rate of a dropout layer.
_RATES = ("p", "prob", "drop_prob")


def build(name: str, channels: int, norm_layer: Callable[[int], nn.BatchNorm2d]) -> nn.Module:
    """Return timm's model `name` with new weights and `norm_layer`s, without its classifier.

    Raises ConfigError if timm or the model is missing, or if training would depend on the machine:
    the model draws random numbers, or normalises over the batch in another way.
    """
    timm = _library(name)
    try:  # models with position embeddings then accept any image size
        model: nn.Module = timm.create_model(
            name, num_classes=0, in_chans=channels, dynamic_img_size=True
        )
    except TypeError:
        model = timm.create_model(name, num_classes=0, in_chans=channels)
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
                "so its result would depend on the number of processes; choose another model"
            )
    return model


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
