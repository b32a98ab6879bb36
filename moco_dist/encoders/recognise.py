"""Which encoder a file of tensors holds: where in it, under which names, of which architecture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moco_dist.config.encoder import BACKBONES, EncoderConfig
from moco_dist.config.yaml_files import from_dict
from moco_dist.encoders import layouts
from moco_dist.encoders.layouts import HEADS, NAMINGS, SAME_NAMES, Naming
from moco_dist.encoders.state_dict import backbone_shapes, described
from moco_dist.errors import ConfigError, DataError, shown
from moco_dist.method import timm_backbone

_STEMS = {3: "cifar", 7: "imagenet"}
_ROOT = NAMINGS[0].mark
_GIVE = (
    "name its architecture with backbone= (in a pretraining encoder.backbone=, in an export "
    "--backbone)"
)


@dataclass(frozen=True)
class Recognised:
    """A backbone in a file: its tensors under our names, and what was taken and left."""

    tensors: dict[str, Tensor]
    config: EncoderConfig
    # Names of the other tensors, and keys of the other state dicts.
    left: tuple[str, ...]
    # All this for a person.
    words: str


def backbone(
    content: Mapping[Any, Any],
    path: Path,
    key: bool = False,
    asked: str = "",
    said: str = "",
    options: Sequence[str] = (),
) -> Recognised | None:
    """Return the backbone in the content of a file; None without a momentum encoder if `key`.

    Only known wrappers and prefixes are taken off and only known names renamed (`layouts`). The
    architecture is the one that the file, or `said` from a file next to it, names; else `asked`,
    if it is one of timm; else that of a ResNet with such tensors. `options` are encoder.options of
    a model of timm. Raises DataError for a file in which no encoder, or more than one, is
    recognised.
    """
    inner, keys, others = layouts.unwrapped(content)
    tensors = _tensors(inner, path)
    if of_v3 := layouts.moco_v3(content, tensors):
        name, options = of_v3
    else:
        name = said or _arch(content, path, asked) or asked * asked.startswith("timm/")
    built = None
    if name.startswith("timm/"):
        built = EncoderConfig(name, list(options), stem="imagenet")
    own = backbone_shapes(built, path) if built else {}
    mark = next(iter(own), _ROOT)
    namings = NAMINGS if mark == _ROOT else (Naming("", mark, str),)
    found = layouts.encoders(tensors, namings, key)
    if not found and key:
        return None
    prefix, naming = _only(found, tensors, path, mark)
    heads = HEADS + (timm_backbone.classifiers(name.removeprefix("timm/")) if own else ())
    kept, left = _split(tensors, path, prefix, naming, heads, own)
    config = _of_timm(built, kept, own) if built else infer(kept, path)
    if name in BACKBONES and config.backbone != name:
        raise DataError(
            f"{path}: is said to hold a {name}, but its tensors are nearest to those of a "
            f"{config.backbone}; use another file"
        )
    if reason := layouts.other_features(content, left, config.stem):
        raise DataError(
            f"{path}: {reason}, so {config.backbone} would give other features here; to start a "
            "pretraining from these weights all the same, save the backbone's state dict under "
            "torchvision's names"
        )
    note = ""
    if not name:
        modules = {str(each) for each in getattr(inner, "_metadata", None) or ()}
        config, note = _told_apart(config, path, {each.removeprefix(prefix) for each in modules})
    how = "by its config.json" if said else "by its name" if name else "by its tensors"
    parts = [described(config), how] + [naming.words] * bool(naming.words)
    parts += [f"in {'.'.join(keys)}"] * bool(keys) + [f"behind '{prefix}'"] * bool(prefix)
    unused = [each.removeprefix(prefix.removeprefix("module.")) for each in left] + others
    unused = sorted({each.partition(".")[0] for each in unused})
    words = ", ".join(parts) + f"; not used: {shown(', '.join(unused))}" * bool(unused) + note
    return Recognised(kept, config, tuple(sorted([*left, *others])), words)


def alike(one: str, other: str) -> bool:
    """Return whether two names mean the same architecture."""
    names = {one.removeprefix("timm/"), other.removeprefix("timm/")}
    return one == other or (len(names) == 1 and names <= set(BACKBONES))


def _tensors(inner: Any, path: Path) -> dict[str, Tensor]:
    """Return a state dict; DataError if it is none."""
    others = [f"a {type(inner).__name__}"]
    if isinstance(inner, Mapping):
        others = [str(name) for name, each in inner.items() if not isinstance(each, Tensor)]
        others = others if inner else ["nothing"]
    if others:
        raise DataError(
            f"{path}: is no state dict, it holds {shown(', '.join(others[:3]))}; "
            "save only the encoder's state_dict(), names to tensors, in a file"
        )
    return {str(name): each for name, each in inner.items()}


def _arch(content: Mapping[Any, Any], path: Path, asked: str) -> str:
    """Return the architecture that a checkpoint's 'arch' names, or nothing.

    Raises DataError for an unknown one, unless `asked` names another.
    """
    arch = content.get("arch")
    if not isinstance(arch, str):
        return ""
    plain = arch.partition(".")[0]  # timm's names may end with a tag
    name = plain if plain in BACKBONES else f"timm/{plain}"
    try:
        backbone_shapes(EncoderConfig(name, stem="imagenet"), path)
    except DataError as error:
        if asked:
            return ""
        raise DataError(
            f"{path}: its 'arch' is {shown(arch)}, which is no ResNet of torchvision and no model "
            f"of timm that can be built here; {_GIVE}"
        ) from error
    return name


def _only(
    found: list[tuple[str, Naming]], tensors: Mapping[str, Tensor], path: Path, mark: str
) -> tuple[str, Naming]:
    """Return the only encoder of those found in a file; DataError for none or several."""
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{path}: holds {len(found)} encoders, at "
            f"{', '.join(prefix + naming.mark for prefix, naming in found)}; save the state_dict() "
            "of the one that you mean in a file"
        )
    first = ", ".join(shown(name, 60) for name in list(tensors)[:3])
    near = next((name for name in tensors if name.endswith(f".{mark}")), "")
    prefix = near.removesuffix("layer1.0.conv1.weight").removesuffix(mark)
    hint = f"take '{shown(prefix, 60)}' from its names" if prefix else _GIVE
    raise DataError(
        f"{path}: has no {mark}{' as a torchvision ResNet has' * (mark == _ROOT)}, it holds "
        f"{first}; {hint}: nothing is renamed here that is not known by name, so that no tensor "
        "is lost silently"
    )


def _split(
    tensors: Mapping[str, Tensor],
    path: Path,
    prefix: str,
    naming: Naming,
    heads: tuple[str, ...],
    own: Collection[str],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors behind a prefix, under our names, and the others with known heads."""
    kept: dict[str, Tensor] = {}
    left: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = naming.ours(name.removeprefix(prefix))
        if not name.startswith(prefix) or (ours.startswith(heads) and ours not in own):
            left[name.removeprefix("module.")] = tensor
        elif kept.setdefault(ours, tensor) is not tensor:
            raise DataError(f"{path}: holds {shown(ours)} twice, once as {shown(name)}; remove one")
    return kept, left


def _of_timm(
    built: EncoderConfig, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> EncoderConfig:
    """Return the configuration of a model of timm with as many channels as its tensors have."""
    first = next((key for key, each in own.items() if each.dim() == 4), "")
    found = tensors.get(first)
    channels = found.shape[1] if found is not None and found.dim() == 4 else 3
    return replace(built, channels=channels)


def _told_apart(
    config: EncoderConfig, path: Path, modules: Collection[str]
) -> tuple[EncoderConfig, str]:
    """Return the architecture of a ResNet, and a note where its tensors could be another's.

    The name of the file tells timm's models of the same tensors apart, or `modules`, those that
    PyTorch lists with a state dict.
    """
    published = (config.width, config.stem) == (64, "imagenet")
    others = SAME_NAMES.get(config.backbone, ()) if published else ()
    named = [name for name in others if name in path.name]
    named += [name for name in others if "blur" in name and "maxpool.1" in modules]
    if named:
        return replace(config, backbone=f"timm/{named[0]}"), ""
    if not others or "relu" in modules:  # torchvision's
        return config, ""
    return config, f"; if it is timm's {' or '.join(others)}, which has the same tensors, name it"


def infer(tensors: Mapping[str, Tensor], path: Path) -> EncoderConfig:
    """Return the architecture that names and shapes are nearest to; DataError if no ResNet's."""
    stem = tensors[_ROOT]
    if stem.dim() != 4:
        raise DataError(f"{path}: its {_ROOT} is {tuple(stem.shape)}, no convolution; {_GIVE}")
    nearest, most = None, 0
    for name in BACKBONES:
        settings = {"backbone": name, "channels": stem.shape[1], "width": stem.shape[0]}
        try:
            config = from_dict(EncoderConfig, settings | {"stem": _STEMS.get(stem.shape[-1])})
        except ConfigError:
            continue
        own = backbone_shapes(config, path)
        same = sum(tensors[k].shape == v.shape for k, v in own.items() if k in tensors)
        missing = len(own.keys() - tensors.keys())
        if same == len(tensors) and not missing:  # no other is as near
            return config
        if nearest is None or same - missing > most:
            nearest, most = config, same - missing
    if nearest is None:
        raise DataError(
            f"{path}: its first convolution is {tuple(stem.shape)}, and its other tensors are "
            f"those of none of {', '.join(BACKBONES)} with a stem of 3 or 7 pixels; give one of "
            "these"
        )
    return nearest
