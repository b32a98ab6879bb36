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


def from_huggingface(name: str) -> str:
    """Return the name in torchvision's ResNet of a tensor of transformers'."""
    kind = {"convolution": "conv", "normalization": "bn"}
    parts = name.split(".")
    tail = parts[-1]
    if parts[0] == "embedder":
        return f"{kind[parts[2]]}1.{tail}"
    stage, block = int(parts[2]) + 1, parts[4]
    if parts[5] == "shortcut":
        return f"layer{stage}.{block}.downsample.{list(kind).index(parts[6])}.{tail}"
    return f"layer{stage}.{block}.{kind[parts[7]]}{int(parts[6]) + 1}.{tail}"


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


# Export targets whose files can be read back, and how to get our names from theirs. The others
# hold a pickle or a graph.
READABLE: Mapping[str, Callable[[str], str]] = {
    "torchvision": str,
    "timm": str,
    "huggingface": from_huggingface,
}
# Classifiers and projection heads of a state dict, which are no part of a backbone.
HEADS = ("fc.", "head.", "classifier.")
# What checkpoints of two libraries call the backbone, and what else they hold: heads, the queue and
# the other encoder. lightly: examples/pytorch_lightning/{moco,simclr,byol}.py, and
# benchmarks/imagenet/resnet50/mocov2.py, where `backbone` is the momentum encoder, the one that is
# evaluated there. solo-learn: solo/methods/{base,mocov2plus,simclr,byol}.py; `encoder.` until 2022.
_BACKBONES = ("backbone.", "encoder.")
_LIGHTLY = (
    *("projection_head.", "projection_head_momentum.", "prediction_head.", "criterion."),
    *("backbone_momentum.", "query_backbone.", "query_projection_head.", "online_classifier."),
)
_SOLO_LEARN = (
    *("projector.", "predictor.", "classifier.", "queue", "momentum_backbone."),
    *("momentum_encoder.", "momentum_projector.", "momentum_classifier."),
)
# lightly puts the children of a ResNet into a Sequential: torchvision's with ReLU and pooling at
# places 2 and 3, or those of its own `ResNetGenerator`, which has neither.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_OWN_CHILDREN = {"0": "conv1", "1": "bn1", **{str(i + 1): f"layer{i}" for i in (1, 2, 3, 4)}}


def from_library(names: Collection[str]) -> tuple[str, dict[str, str], list[str]]:
    """Return whose checkpoint has these names, what is renamed, and names that are not known.

    "lightly", "solo-learn", or "" for a plain state dict; torchvision's name for each tensor of the
    backbone; and the names that stand for nothing that either library saves.
    """
    prefix = next((each for each in _BACKBONES if any(n.startswith(each) for n in names)), None)
    if prefix is None:
        return "", {}, []
    heads = [name for name in names if not name.startswith(prefix)]
    strange = [name for name in heads if not name.startswith((*_LIGHTLY, *_SOLO_LEARN))]
    library = "solo-learn" if any(name.startswith(_SOLO_LEARN) for name in heads) else "lightly"
    inner = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    own = any(name.startswith("2.") for name in inner.values())
    children = _OWN_CHILDREN if own else _CHILDREN
    renamed = {}
    for name, inside in inner.items():
        first, dot, rest = inside.partition(".")
        rest = rest.replace("shortcut.", "downsample.") if own else rest
        renamed[name] = children.get(first, first) + dot + rest
        strange += [name] * (list(renamed.values()).count(renamed[name]) > 1)
    return library, renamed, strange
