"""The encoder: a backbone with grouped BatchNorm, and a projection head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from moco_dist.config.encoder import EncoderConfig
from moco_dist.errors import ConfigError, shown
from moco_dist.method import convolutions, heads, timm_backbone
from moco_dist.method.batch_norm import GroupedBatchNorm, batch_norms, take_in
from moco_dist.method.compilation import compiled
from moco_dist.method.halves import CHANNELS, Halves
from moco_dist.method.residual_blocks import BasicBlock, Bottleneck, fuses

# Block, blocks per stage, groups, and channels per group of the 3x3 convolutions in stage 1 (at the
# published width): He et al. 2016, table 1; Xie et al. 2017, table 1; Zagoruyko et al. 2016.
_STAGES: dict[str, tuple[type[BasicBlock | Bottleneck], list[int], int, int]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2], 1, 64),
    "resnet34": (BasicBlock, [3, 4, 6, 3], 1, 64),
    "resnet50": (Bottleneck, [3, 4, 6, 3], 1, 64),
    "resnet101": (Bottleneck, [3, 4, 23, 3], 1, 64),
    "resnet152": (Bottleneck, [3, 8, 36, 3], 1, 64),
    "resnext50_32x4d": (Bottleneck, [3, 4, 6, 3], 32, 4),
    "resnext101_32x8d": (Bottleneck, [3, 4, 23, 3], 32, 8),
    "resnext101_64x4d": (Bottleneck, [3, 4, 23, 3], 64, 4),
    "wide_resnet50_2": (Bottleneck, [3, 4, 6, 3], 1, 128),
    "wide_resnet101_2": (Bottleneck, [3, 4, 23, 3], 1, 128),
}


class Backbone(ResNet):
    """torchvision's ResNet without its classifier; `width` channels in stage 1 (published: 64)."""

    bn1: Any

    def __init__(self, config: EncoderConfig, norm_layer: Any) -> None:
        block, stages, groups, group_width = _STAGES[config.backbone]
        channels = config.channels
        self.width = config.width
        super().__init__(
            block,
            stages,
            num_classes=1,
            groups=groups,
            width_per_group=group_width,
            norm_layer=norm_layer,
        )
        if config.stem == "cifar":
            self.conv1 = nn.Conv2d(channels, config.width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()  # type: ignore[assignment]
        else:
            self.conv1 = nn.Conv2d(channels, config.width, 7, 2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.bn1 = norm_layer(config.width)
        self.fc = nn.Identity()  # type: ignore[assignment]
        self.num_features: int = self.inplanes

    def _make_layer(
        self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        if planes == 64:
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, blocks, stride, dilate)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1.rectified(x) if fuses(self.bn1, x) else self.relu(self.bn1(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.maxpool(x)))))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def build_backbone(config: EncoderConfig, norm_layer: Any) -> Any:
    """Return a backbone with new weights; `num_features` is the length of its features.

    Raises ConfigError for a model that doesn't exist or can't be trained here.
    """
    if config.vectors > 1:
        width = config.width if config.is_timm else config.width // 2
        lightness, colours = (
            build_backbone(replace(config, halves="none", width=width, channels=n), norm_layer)
            for n in CHANNELS
        )
        return Halves(lightness, colours, _length(lightness) + _length(colours))
    if config.is_timm:
        name = config.backbone.removeprefix("timm/")
        backbone = timm_backbone.build(name, config.channels, norm_layer, config.settings)
        if config.patches == "frozen":
            timm_backbone.freeze_patches(backbone, name)
        if config.positions == "sincos":
            timm_backbone.fix_positions(backbone, name)
        return backbone
    backbone = Backbone(config, norm_layer)
    convolutions.suit(backbone)
    return backbone


def _length(backbone: Any) -> int:
    """Return the length of a backbone's features."""
    # Some of timm's models have a last layer behind what they call their features.
    found = getattr(backbone, "head_hidden_size", None) or backbone.num_features
    assert isinstance(found, int), f"a backbone with {found!r} features"
    return found


class Encoder(nn.Module):
    """Backbone, head and perhaps a predictor; `forward` returns keys or queries.

    `backbone` returns features. The predictor is a part of the loss, which evaluation leaves out; a
    key encoder is a copy whose `predictor` is None.
    """

    predictor: nn.Module | None

    def __init__(
        self, config: EncoderConfig, rows_per_group: int = 1, groups: int = 1, span: int = 1
    ) -> None:
        super().__init__()
        self.config = config
        norm_layer, norm_of_vectors = (
            partial(kind, rows_per_group=rows_per_group, groups=groups, span=span)
            for kind in (GroupedBatchNorm, heads.VectorBatchNorm)
        )
        self.backbone = build_backbone(config, norm_layer)
        behind = config, self.num_features, norm_of_vectors
        self.head = heads.of_halves(*behind) if config.vectors > 1 else heads.projection(*behind)
        self.predictor = heads.predictor(*behind) if config.predictor else None
        # It makes convolutions 1.3 times as fast, also on a CPU.
        self.to(memory_format=torch.channels_last)
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def compile_training(self) -> None:
        """Compile `forward` for training, at its first call."""
        for norm in batch_norms(self):
            norm.leaves_seen = True
        self._compiled = compiled(self._vectors)

    def forward(self, views: Tensor) -> Tensor:
        """Return unit vectors (rows, dim), float32 or more, of `views` (rows, c, height, width).

        With two halves they are (rows, 2, dim).
        """
        if self._compiled is None or not self.training:
            return self._vectors(views)
        vectors = self._compiled(views)
        take_in(batch_norms(self))
        return vectors

    def _vectors(self, views: Tensor) -> Tensor:
        out = self.head(self.backbone(views))
        if self.training and self.predictor is not None:
            out = self.predictor(out)
        return F.normalize(out if out.dtype == torch.float64 else out.float(), dim=-1)

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that a key encoder has too, which are not the predictor's."""
        return chain(self.backbone.parameters(), self.head.parameters())

    @property
    def num_features(self) -> int:
        """Length of the backbone's features."""
        return _length(self.backbone)

    def expect(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Tell two halves by what images are normalised; other backbones needn't know."""
        if isinstance(self.backbone, Halves):
            self.backbone.expect(mean, std)


def build_encoder(
    config: EncoderConfig, seed: int, rows_per_group: int = 1, groups: int = 1, span: int = 1
) -> Encoder:
    """Return a new float32 encoder on the CPU; its weights depend on `config` and `seed` only.

    What follows them is of `GroupedBatchNorm`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Encoder(config, rows_per_group, groups, span)


def freeze_unused(backbone: nn.Module, images: Tensor) -> None:
    """Freeze the parameters that the features of `images` (rows, c, height, width) don't depend on.

    They get no gradients, for which DistributedDataParallel would wait, and no momentum, which a
    run that resumes would miss. Nothing changes on a process alone.
    """
    training, trained = backbone.training, [p for p in backbone.parameters() if p.requires_grad]
    features = backbone.eval()(images)
    found = torch.autograd.grad(features.sum(), trained, allow_unused=True)
    for parameter, gradient in zip(trained, found, strict=True):
        parameter.requires_grad_(gradient is not None)
    backbone.train(training)


def check(config: EncoderConfig, size: int) -> None:
    """Raise ConfigError unless the encoder can be built and takes views of `size` pixels.

    Nothing is computed. The ResNets that are built here take all views.
    """
    if not config.is_timm:
        return
    with torch.device("meta"):
        encoder = build_encoder(config, seed=0).eval()
        try:
            found = encoder.backbone(torch.zeros(1, config.channels, size, size)).shape
        except NotImplementedError:  # by this device
            return
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{config.described} takes no views of {size} pixels ({shown(error, 200)}); change "
                "views.size, or encoder.options, such as patch_size"
            ) from error
    if found != (1, encoder.num_features):
        raise ConfigError(
            f"{config.described} gives {tuple(found)} numbers for a view, not one vector of "
            f"{encoder.num_features}; change encoder.options"
        )
