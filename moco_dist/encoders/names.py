"""Names of the tensors of a ResNet in other libraries, and in the checkpoints of two of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping


def to_huggingface(name: str) -> str:
    """Return the name in transformers of a tensor of torchvision's ResNet."""
    name = re.sub(r"^conv1\.", "embedder.embedder.convolution.", name)
    name = re.sub(r"^bn1\.", "embedder.embedder.normalization.", name)
    name = re.sub(r"^layer(\d)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.", name)
    name = re.sub(r"\.downsample\.0\.", ".shortcut.convolution.", name)
    name = re.sub(r"\.downsample\.1\.", ".shortcut.normalization.", name)
    name = re.sub(r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution.", name)
    return re.sub(r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization.", name)


def to_detectron2(name: str) -> str:
    """Return the name in detectron2's ResNet of a tensor of torchvision's."""
    name = name if name.startswith("layer") else f"stem.{name}"
    for old, new in (
        *((f"layer{i}.", f"res{i + 1}.") for i in (1, 2, 3, 4)),
        *((f"bn{i}.", f"conv{i}.norm.") for i in (1, 2, 3)),
        ("downsample.0.", "shortcut."),
        ("downsample.1.", "shortcut.norm."),
    ):
        name = name.replace(old, new)
    return name


def from_detectron2(name: str) -> str:
    """Return the name in torchvision's ResNet of a tensor of detectron2's, part by part."""
    place, _, tensor = name.rpartition(".")
    layer, norm = place.removesuffix(".norm"), place.endswith(".norm")
    parts = layer.split(".")
    if parts[-1] == "shortcut":
        parts[-1:] = ["downsample", "1" if norm else "0"]
    elif norm:
        parts[-1] = "bn" + parts[-1][-1]
    if parts[0] == "stem":
        parts = parts[1:]
    else:
        parts[0] = f"layer{int(parts[0][-1]) - 1}"
    return ".".join([*parts, tensor])


# Export targets whose files can be read back, and their names for torchvision's tensors.
READABLE: Mapping[str, Callable[[str], str]] = {
    "torchvision": str,
    "timm": str,
    "huggingface": to_huggingface,
}
# Classifiers and projection heads in a state dict, which are not part of the backbone.
HEADS = ("fc.", "head.", "classifier.")
# How checkpoints of two libraries prefix the backbone, and what else they hold: heads, the queue
# and the other encoder. lightly: examples/pytorch_lightning/{moco,simclr,byol}.py, and
# benchmarks/imagenet/resnet50/mocov2.py, where `backbone` is the momentum encoder, the evaluated
# one. solo-learn: solo/methods/{base,mocov2plus,simclr,byol}.py; `encoder.` until 2022.
_BACKBONES = ("backbone.", "encoder.")
_LIGHTLY = (
    *("projection_head.", "projection_head_momentum.", "prediction_head.", "criterion."),
    *("backbone_momentum.", "query_backbone.", "query_projection_head.", "online_classifier."),
)
_SOLO_LEARN = (
    *("projector.", "predictor.", "classifier.", "queue", "momentum_backbone."),
    *("momentum_encoder.", "momentum_projector.", "momentum_classifier."),
)
# lightly puts the children of a ResNet into a Sequential: torchvision's, with ReLU and pooling as
# children 2 and 3, or those of its `ResNetGenerator`, which has neither.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_OWN_CHILDREN = {"0": "conv1", "1": "bn1", **{str(i + 1): f"layer{i}" for i in (1, 2, 3, 4)}}


def from_library(names: Collection[str]) -> tuple[str, dict[str, str], list[str]]:
    """Return the library whose checkpoint has these names, new names, and unknown names.

    The library is "lightly", "solo-learn", or "" for a plain state dict. The new names are
    torchvision's, for the tensors of the backbone; neither library saves the unknown ones.
    """
    prefix = next((each for each in _BACKBONES if any(n.startswith(each) for n in names)), None)
    if prefix is None:
        return "", {}, []
    heads = [name for name in names if not name.startswith(prefix)]
    unknown = [name for name in heads if not name.startswith((*_LIGHTLY, *_SOLO_LEARN))]
    library = "solo-learn" if any(name.startswith(_SOLO_LEARN) for name in heads) else "lightly"
    own = any(name.startswith(f"{prefix}2.") for name in names)
    children = _OWN_CHILDREN if own else _CHILDREN
    ours: dict[str, str] = {}
    for name in names:
        if name.startswith(prefix):
            first, dot, rest = name.removeprefix(prefix).partition(".")
            rest = rest.replace("shortcut.", "downsample.") if own else rest
            # A second tensor with the same new name is unknown too.
            if ours.setdefault(children.get(first, first) + dot + rest, name) != name:
                unknown.append(name)
    return library, {name: our for our, name in ours.items()}, unknown
