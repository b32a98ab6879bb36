"""A model of timm as a backbone, its BatchNorm layers in groups; loads timm to build one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from moco_dist.errors import ConfigError, shown

# Layers that draw from a random state in training, by the name of their class and their rate.
_RANDOM = {"p", "prob", "drop_prob"}


def build(name: str, channels: int, norm_layer: Callable[[int], nn.BatchNorm2d]) -> nn.Module:
    """Return the model `name` of timm for images of so many channels, without its classifier.

    Its weights are new. Each of its BatchNorm layers is one that `norm_layer` made, under the same
    name. Raises ConfigError if timm or the model is not there, or if the model can't be trained the
    same on any machine: it draws random numbers of its own, or normalises over the batch in another
    way.
    """
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
    try:  # what has position embeddings then takes any size of image
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
        rate = max((getattr(module, key, 0) or 0 for key in _RANDOM), default=0)
        if "Drop" in type(module).__name__ and rate:
            raise ConfigError(
                f"encoder.backbone=timm/{name}: its layer {path} drops at random (rate {rate}), "
                "which no other number of processes would repeat; choose another model"
            )
    return model


def _grouped(norm: nn.BatchNorm2d, norm_layer: Callable[[int], nn.BatchNorm2d]) -> nn.BatchNorm2d:
    """Return a layer of `norm_layer` in the place of `norm`, with the activation that it had."""
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
