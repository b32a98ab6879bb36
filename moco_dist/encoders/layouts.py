"""How other programs wrap and name the tensors of an encoder: tables of what is known by name.

What is in none of these tables is neither unwrapped nor renamed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moco_dist.encoders.names import from_huggingface

# Keys of a checkpoint that lead to its state dict; the first one that is there is followed.
WRAPPERS = (
    *("classy_state_dict", "base_model"),  # VISSL: classy_state_dict.base_model.model.trunk
    "state_dict",  # Lightning, OpenMMLab, timm, and the scripts of MoCo, SimSiam and SwAV
    "model_state_dict",  # PyTorch's tutorials
    "model",  # torchvision's references, Barlow Twins, VICReg, SupContrast
    *("teacher", "student"),  # DINO, which evaluates its teacher
    "trunk",
)
# Words in front of the names of an encoder's tensors.
_WORDS = {
    *("module", "_orig_mod"),  # DistributedDataParallel, torch.compile
    *("model", "backbone", "encoder"),  # Lightning modules, lightly, solo-learn, OpenMMLab, SimSiam
    *("base_encoder", "encoder_q"),  # MoCo v3, MoCo v1 and v2
    *("resnet", "timm_model"),  # transformers with a classifier, transformers around timm
    "_feature_blocks",  # VISSL
}
# Those of the momentum encoder: MoCo v3, solo-learn, lightly, MoCo v1 and v2.
_KEY_WORDS = {"momentum_encoder", "momentum_backbone", "backbone_momentum", "encoder_k"}
# Classifiers and projection heads among the tensors of a backbone; the last two are SwAV's.
HEADS = ("fc.", "head.", "classifier.", "projection_head.", "prototypes")
# Heads of models for segmentation, which replace strides of their backbone by dilation.
_DENSE = ("classifier.", "aux_classifier.", "decode_head.", "auxiliary_head.")
# What solo-learn saves with a backbone: solo/methods/{base,mocov2plus,simclr,byol}.py.
_SOLO_LEARN = (
    *("projector.", "momentum_projector.", "momentum_classifier."),
    *("momentum_backbone.", "momentum_encoder."),
)
# MoCo v3's Vision Transformers by their `arch` (vits.py): a model of timm, and its options.
_MOCO_V3 = {
    "vit_small": ("timm/vit_small_patch16_224", ("num_heads=12",)),
    "vit_base": ("timm/vit_base_patch16_224", ()),
}
# In the configuration that OpenMMLab saves in `meta`.
_CAFFE = re.compile(r"""style['"]?\s*[=:]\s*['"]caffe""")
# Models of timm whose tensors have the names and shapes of a ResNet of torchvision, but which give
# other features, because they filter before they take every second pixel.
SAME_NAMES = {"resnet18": ("resnetblur18",), "resnet50": ("resnetaa50", "resnetblur50")}


@dataclass(frozen=True)
class Naming:
    """Names of the tensors of a ResNet."""

    words: str
    # A tensor that every encoder with these names has, and none with others.
    mark: str
    # From such a name to torchvision's.
    ours: Callable[[str], str]


def _by_number(layers: Mapping[str, str]) -> Callable[[str], str]:
    def ours(name: str) -> str:
        first, dot, rest = name.partition(".")
        return layers.get(first, first) + dot + rest.replace("shortcut.", "downsample.")

    return ours


# lightly puts the children of a ResNet into a Sequential: torchvision's, with ReLU and pooling as
# children 2 and 3, or those of its `ResNetGenerator`, which has neither.
_STAGES = {f"{i + 3}": f"layer{i}" for i in (1, 2, 3, 4)}
_OWN_STAGES = {f"{i + 1}": f"layer{i}" for i in (1, 2, 3, 4)}
_FIRST = {"0": "conv1", "1": "bn1"}
NAMINGS = (
    Naming("", "conv1.weight", str),
    Naming("layers by number", "7.0.conv1.weight", _by_number(_FIRST | _STAGES)),
    Naming("layers by number", "2.0.conv1.weight", _by_number(_FIRST | _OWN_STAGES)),
    Naming("named by transformers", "embedder.embedder.convolution.weight", from_huggingface),
)


def unwrapped(content: Any) -> tuple[Any, list[str], list[str]]:
    """Return what the wrappers lead to, their keys, and the keys of the other state dicts."""
    keys, others = [], []
    while isinstance(content, Mapping):
        plain = Tensor | int | str | None
        inside = [key for key in WRAPPERS if not isinstance(content.get(key), plain)]
        if not inside:
            break
        others += [
            str(key)
            for key, each in content.items()
            if key != inside[0] and isinstance(each, Mapping) and each
            if all(isinstance(tensor, Tensor) for tensor in each.values())
        ]
        keys.append(inside[0])
        content = content[inside[0]]
    return content, keys, others


def moco_v3(
    content: Mapping[Any, Any], names: Collection[str]
) -> tuple[str, tuple[str, ...]] | None:
    """Return the model of timm, and its options, that a checkpoint of MoCo v3 holds; None if none.

    The number of heads is in no tensor, and timm's ViT-S has another.
    """
    arch = content.get("arch")
    theirs = any("base_encoder." in name for name in names)
    return _MOCO_V3.get(arch) if theirs and isinstance(arch, str) else None


def encoders(
    names: Collection[str], namings: Collection[Naming], key: bool
) -> list[tuple[str, Naming]]:
    """Return the encoders among tensors with these names: the prefix and the naming of each.

    A prefix consists of known words, one of them a momentum encoder's exactly if `key`.
    """
    found = []
    for naming in namings:
        for name in names:
            prefix = name.removesuffix(naming.mark)
            if prefix == name or not (prefix == "" or prefix.endswith(".")):
                continue
            words = set(prefix.split(".")[:-1])
            if words <= _WORDS | _KEY_WORDS and bool(words & _KEY_WORDS) == key:
                found.append((prefix, naming))
    return found


def other_features(content: Mapping[Any, Any], left: Mapping[str, Tensor], stem: str) -> str:
    """Return why the backbone of a file, next to `left`, gives other features than ours, or ""."""
    if any(name.startswith(_DENSE) and each.dim() == 4 for name, each in left.items()):
        return "is a model for segmentation, whose backbone has dilation in place of strides"
    meta = content.get("meta")
    if isinstance(meta, Mapping) and any(_CAFFE.search(str(each)) for each in meta.values()):
        return "its meta says style='caffe', whose blocks have their stride in another convolution"
    if stem == "cifar" and any(name.startswith(_SOLO_LEARN) for name in left):
        return (
            "solo-learn pads the first convolution of its CIFAR encoders by 2 pixels instead of 1"
        )
    return ""
