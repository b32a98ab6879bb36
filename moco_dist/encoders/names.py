"""Names of the tensors of a ResNet in other libraries."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping


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
    """Return the name in torchvision's ResNet of a tensor of transformers' ResNetModel."""
    name = re.sub(r"^embedder\.embedder\.convolution\.", "conv1.", name)
    name = re.sub(r"^embedder\.embedder\.normalization\.", "bn1.", name)
    stage = r"^encoder\.stages\.(\d)\.layers\."
    name = re.sub(stage, lambda m: f"layer{int(m[1]) + 1}.", name)
    name = name.replace(".shortcut.convolution.", ".downsample.0.")
    name = name.replace(".shortcut.normalization.", ".downsample.1.")
    name = re.sub(r"\.layer\.(\d)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}.", name)
    return re.sub(r"\.layer\.(\d)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}.", name)


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
