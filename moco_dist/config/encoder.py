"""The `encoder.` group of the configuration."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from moco_dist.config.rules import check, require
from moco_dist.errors import shown

# The ResNets, ResNeXts and Wide ResNets of torchvision; `encoder.py` has their shapes.
BACKBONES = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
)
# What timm.create_model is told of by other keys, or can't be told here.
NOT_OPTIONS = ("num_classes", "in_chans", "dynamic_img_size", "pretrained", "checkpoint_path")


@dataclass(frozen=True)
class EncoderConfig:
    """A backbone with a projection head."""

    # One of BACKBONES, or a model of timm such as timm/regnety_002 (needs timm).
    backbone: str = "resnet18"
    # What timm builds that model with instead of its own settings, each as KEY=VALUE, such as
    # [img_size=32,patch_size=4,embed_dim=192]; a value is JSON, or else a text.
    options: list[str] = field(default_factory=list)
    # 3 (RGB) or 1 (gray: colour images are converted, and saturation, hue and grayscale have no
    # effect). Other numbers only for encoders that are built in Python.
    channels: int = 3
    # Channels of the first stage; 64 is the published width.
    width: int = 64
    # lab: two backbones, each of half the width (a model of timm: each a whole one), see the
    # lightness and the colours of an image in CIE Lab (CMC). Needs moco.negatives=bank.
    halves: Literal["none", "lab"] = "none"
    # cifar: 3x3 convolution, no pooling; imagenet: 7x7 with stride 2, then pooling.
    stem: Literal["cifar", "imagenet"] = "cifar"
    # frozen: a Vision Transformer of timm keeps its first, random projection of the patches, which
    # made MoCo v3's training stable.
    patches: Literal["trained", "frozen"] = "trained"
    # sincos: its positions are fixed sines and cosines, as MoCo v3's. They and trained ones are
    # made for timm's img_size, and interpolated for views of another size.
    positions: Literal["trained", "sincos"] = "trained"
    # linear: MoCo v1; mlp: MoCo v2; mlp_bn: SimCLR and MoCo v3, with BatchNorm behind each layer.
    head: Literal["linear", "mlp", "mlp_bn"] = "linear"
    # Layers of mlp and mlp_bn, 2 or 3, and the width of the hidden ones; 0: that of the features.
    head_layers: int = 2
    head_width: int = 0
    # MoCo v3: a second MLP of two layers with BatchNorm, behind the query's head alone.
    predictor: bool = False
    # Length of a key.
    dim: int = 128

    def __post_init__(self) -> None:
        check(
            "encoder.",
            self,
            channels=(1, None),
            width=(1, None),
            head_layers=(2, 3),
            dim=(2, None),
        )
        name = shown(self.backbone)
        require(
            self.is_timm or self.backbone in BACKBONES,
            f"encoder.backbone={name} is unknown; use one of {', '.join(BACKBONES)}, or timm/NAME",
        )
        require(
            not self.is_timm or (self.width, self.stem) == (64, "imagenet"),
            f"encoder.backbone={name} has the width and stem that timm gives it; "
            "use encoder.width=64 encoder.stem=imagenet, or another model of timm",
        )
        least = {"resnext50_32x4d": 16, "resnext101_64x4d": 16, "resnext101_32x8d": 8}.get(name, 1)
        require(
            self.vectors == 1 or (self.width % 2 == 0 and self.channels == 3),
            f"encoder.halves={self.halves} needs colours and a width for two, not encoder.channels="
            f"{self.channels} encoder.width={self.width}; use encoder.channels=3 encoder.width="
            f"{self.width + self.width % 2}",
        )
        least *= self.vectors
        require(
            self.width >= least,
            f"encoder.width={self.width} leaves the groups of {name} without a channel; "
            f"use {least} or more",
        )
        own = {"patches": "frozen", "positions": "sincos"}
        for key in (key for key, value in own.items() if getattr(self, key) == value):
            require(
                self.is_timm,
                f"encoder.{key}={own[key]} is for timm's Vision Transformers, and {name} has no "
                f"{key}; leave it out",
            )
        self._check_options()
        wide = self.head_width > 0 and not self.predictor
        require(
            self.head != "linear" or (self.head_layers == 2 and not wide),
            f"encoder.head=linear is one layer, which encoder.head_layers={self.head_layers} and "
            f"encoder.head_width={self.head_width} don't change; leave them out, or use "
            "encoder.head=mlp or mlp_bn",
        )

    def _check_options(self) -> None:
        name, found = shown(self.backbone), []
        require(
            self.is_timm or not self.options,
            f"encoder.options={shown(self.options)} is for models of timm, and {name} is built "
            "here; leave it out, or use encoder.backbone=timm/NAME",
        )
        for option in self.options:
            key, _, value = option.partition("=")
            given = f"encoder.options: {shown(option)}"
            plain = key.isidentifier() and value != ""
            require(plain, f"{given} is no KEY=VALUE; write it as in [patch_size=4]")
            require(key not in found, f"{given} sets {key} again; leave one out")
            rule = "is set by other keys of the configuration, or can't be set; leave it out"
            require(key not in NOT_OPTIONS, f"{given}: {key} {rule}")
            found.append(key)

    @property
    def settings(self) -> dict[str, Any]:
        """The options with their values."""
        words = (option.partition("=") for option in self.options)
        return {key: _value(text) for key, _, text in words}

    @property
    def described(self) -> str:
        """The backbone for a person."""
        name = self.backbone + f" in two halves ({self.halves})" * (self.vectors > 1)
        if not self.is_timm:
            return f"{name}, width {self.width}, {self.stem} stem"
        options = f" with {', '.join(map(shown, self.options))}" if self.options else ""
        return name + options + ", sincos positions" * (self.positions == "sincos")

    @property
    def vectors(self) -> int:
        """How many vectors an image has: one, or one of each half."""
        return 1 if self.halves == "none" else 2

    @property
    def numbers(self) -> int:
        """Length of all vectors of an image."""
        return self.vectors * self.dim

    @property
    def is_timm(self) -> bool:
        """Whether the backbone is one of timm's."""
        return self.backbone.startswith("timm/")


def _value(text: str) -> Any:
    """Return the value of an option; Python's True, False and None are JSON's."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text
