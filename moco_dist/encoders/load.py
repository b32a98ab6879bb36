"""The one reader of trained encoders: from what a user names to a frozen backbone.

Probe, export, report, `load_encoder` and `init_from` all call `find`: what one of them reads all
of them read, and what one refuses all refuse with the same sentence.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from moco_dist.config.recipe import EncoderConfig, ViewsConfig
from moco_dist.config.yaml_files import from_dict, to_dict
from moco_dist.encoders import names, original, state_dict
from moco_dist.errors import ConfigError, DataError, MissingError, output_errors, shown
from moco_dist.method import views
from moco_dist.method.batch_norm import batch_norms
from moco_dist.method.encoder import Encoder
from moco_dist.runs import checkpoint
from moco_dist.runs.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

Which = Literal["query", "key"]
# The file of an exported folder that says what is in it, and those that hold the encoder.
DESCRIPTION = "moco_dist.json"
_EXPORTED = ("model.safetensors", "model.pth.tar", "backbone.pkl", "model.onnx")
# What a run notes of the weights that it started with.
STARTED = "init_from.json"
_QUERY, _KEY = "query_encoder.", "key_encoder."


@dataclass(frozen=True)
class Found:
    """A trained backbone, frozen, in evaluation mode, and what is known of it."""

    backbone: Any
    architecture: EncoderConfig
    # Those of its pretraining; None where nothing tells.
    views: ViewsConfig | None
    # Pixels to which the shorter side of an image is resized.
    resize: int
    # For a person: which checkpoint or file.
    place: str
    # Its tensors under our names, and its training, as far as that is known.
    checkpoint: Checkpoint
    # Names in a file of tensors that are not of the backbone.
    left: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """Return a text that is the same on all processes if they have read the same."""
        return f"{self.checkpoint.path} {self.checkpoint.state['sha256']}"

    @property
    def fed(self) -> ViewsConfig:
        """Return the views of its pretraining, or the usual ones of such an encoder."""
        return self.views or original.usual_views(self.architecture)


def find(path: Path, which: Which = "query", like: EncoderConfig | None = None) -> Found:
    """Return the trained encoder that `path` names, float32, on the CPU.

    `path` is a run (its newest whole checkpoint), a checkpoint folder, an exported folder, or a
    file: the state dict of a torchvision ResNet, or a checkpoint of the original MoCo scripts, of
    lightly, or of solo-learn. The state dict of a model of timm can only be read as that of `like`.
    Every tensor must be there, and no other but known heads. Raises MissingError, or DataError for
    what is not whole, not known or not trained.
    """
    path = path.expanduser()
    if not path.exists():
        raise MissingError(
            f"{shown(path)}: no such file or folder; give a run that has been pretrained, a "
            "checkpoint folder, an export, or a file with a state dict"
        )
    folder, file = (path, path / _EXPORTED[0]) if path.is_dir() else (path.parent, path)
    if (folder / DESCRIPTION).is_file() and (path == folder or path.name in _EXPORTED):
        found = _export(folder, which)
    elif path == folder and ((path / "state.json").exists() or not file.is_file()):
        found = _trained_here(checkpoint_of(path), which)
    else:
        found = _file(file, which, like)
    require_trained(found.backbone, found.checkpoint.path)
    return found


def checkpoint_of(path: Path) -> Checkpoint:
    """Return the checkpoint in folder `path`, or the newest whole one of the run in it."""
    if (path / "state.json").exists():
        return checkpoint.read(path)
    for _ in range(3):  # a run in progress may remove the newest one before it is read
        try:
            newest = checkpoint.newest(path)
            break
        except MissingError:
            continue
    else:
        raise MissingError(f"{path}: its checkpoints vanish while they are read; try again")
    if newest is None:
        raise MissingError(
            f"{path}: no checkpoint in this folder; give a run directory or a checkpoint folder"
        )
    return newest


def of_checkpoint(saved: Checkpoint, which: Which = "query") -> Found:
    """Return the encoder of a pretraining's checkpoint, as it was saved, trained or not.

    Raises DataError unless every tensor of the encoder is there, of its head too, and no other.
    """
    path = saved.path
    if which == "key":
        saved = replace(saved, model=_keys_as_queries(saved))
    tensors = {k.removeprefix(_QUERY): v for k, v in saved.model.items() if k.startswith(_QUERY)}
    if not tensors:
        raise DataError(
            f"{path}: not a checkpoint of a pretraining, it holds "
            f"{', '.join(list(saved.model)[:3])}; give the run directory of a pretraining"
        )
    settings = saved.piece("config")
    try:
        config = from_dict(EncoderConfig, settings["encoder"])
        view = from_dict(ViewsConfig, settings["views"])
        # An encoder alone doesn't have the configuration of its data.
        resize = int(settings["data"]["size"]) if "data" in settings else view.size
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise DataError(f"{path}: not readable by this version ({reason})") from error
    checkpoint.check_tensors(state_dict.shapes(config, path), tensors, path)
    prefix = "backbone."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    backbone = state_dict.filled(config, own, path)
    return Found(backbone, config, view, max(resize, view.size), str(path), saved)


def _keys_as_queries(saved: Checkpoint) -> dict[str, Tensor]:
    keys = {k.removeprefix(_KEY): v for k, v in saved.model.items() if k.startswith(_KEY)}
    if not keys:
        raise DataError(f"{saved.path}: has no key encoder; use the query encoder")
    return {_QUERY + name: tensor for name, tensor in keys.items()}


def _trained_here(saved: Checkpoint, which: Which) -> Found:
    found = of_checkpoint(saved, which)
    if saved.step == 0:
        raise DataError(
            f"{saved.path}: is the state before the first step, a random encoder; give a later one "
            "(control=true probes a random one)"
        )
    return replace(found, place=f"{saved.path} (step {saved.step:,})")


def _export(folder: Path, which: Which) -> Found:
    """Return the encoder of a folder that moco_dist.export wrote."""
    source = folder / DESCRIPTION
    try:
        described = json.loads(source.read_bytes())
        target, holds = str(described["target"]), described["which"]
        config = from_dict(EncoderConfig, described["encoder"])
        view = from_dict(ViewsConfig, described["views"]) if described["views"] else None
        resize = int(described["resize"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise DataError(f"{source}: can't be read ({error!r}); export it again") from error
    if target == "moco":  # the file itself doesn't know with which views it was trained
        return replace(_file(folder / _EXPORTED[1], which), views=view, resize=resize)
    if target not in names.READABLE:
        raise DataError(
            f"{folder}: an export for {shown(target)} can't be read back; give the run that it is "
            f"of, or an export for {', '.join(names.READABLE)} or moco"
        )
    if which == "key" and holds != "key":
        raise DataError(f"{folder}: has no key encoder; use the query encoder")
    content, sha256 = state_dict.read(folder / _EXPORTED[0])
    try:
        tensors = {names.READABLE[target](name): each for name, each in content.items()}
    except (LookupError, ValueError) as error:
        raise DataError(f"{folder}: has other names than {target}'s; export it again") from error
    saved = _alone(folder, tensors, config, sha256)
    backbone = state_dict.filled(config, tensors, folder)
    return Found(backbone, config, view, resize, f"{folder} (export for {target})", saved)


def _file(path: Path, which: Which, like: EncoderConfig | None = None) -> Found:
    """Return the encoder of a file of tensors that anyone may have written."""
    content, sha256 = state_dict.read(path)
    if original.is_one(content):
        saved = original.read(path, content, sha256)
        place = f"{path} (of the original scripts, epoch {saved.state['epoch']})"
        return replace(of_checkpoint(saved, which), place=place)
    tensors, config, left, library = state_dict.backbone(content, path, like)
    if which == "key":
        raise DataError(f"{path}: has no key encoder; use the query encoder")
    said = f"{described(config)}, by its tensors"
    said += f", named by {library}" if library else ""
    if left:
        said += f"; not used: {shown(', '.join(sorted({name.split('.')[0] for name in left})))}"
    backbone = state_dict.filled(config, tensors, path)
    size = original.usual_views(config).size
    saved = _alone(path, tensors, config, sha256)
    return Found(backbone, config, None, size, f"{path} ({said})", saved, tuple(sorted(left)))


def _alone(
    path: Path, tensors: Mapping[str, Tensor], config: EncoderConfig, sha256: str
) -> Checkpoint:
    """Return a checkpoint of a backbone alone, of whose training nothing is known."""
    model = {f"{_QUERY}backbone.{name}": each for name, each in tensors.items()}
    state = {"config": {"encoder": to_dict(config)}, "sha256": sha256}
    return Checkpoint(path, 0, model, {}, state)


def described(architecture: EncoderConfig) -> str:
    """Return the architecture in words."""
    gray = ", gray images" if architecture.channels == 1 else ""
    return f"{architecture.backbone}, width {architecture.width}, {architecture.stem} stem{gray}"


def require_trained(backbone: nn.Module, source: object) -> None:
    """Raise DataError if a backbone is as it was initialised, or holds what is not finite.

    Layers that normalise begin with weights of 1 (or 0) and biases of 0; a step moves them all. A
    backbone without such layers can't be told from one as it was initialised.
    """
    kinds = nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm
    norms = {
        name: each
        for name, each in backbone.named_modules()
        if isinstance(each, kinds) and each.weight is not None and each.bias is not None
    }
    for name, tensor in backbone.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DataError(f"{source}: {name} is not finite; use another checkpoint")
    if norms and all(map(_untouched, norms.values())):
        raise DataError(
            f"{source}: is a random encoder and no trained one: the weights of all its "
            f"{len(norms)} normalising layers ({next(iter(norms))}.weight and so on) are 1 and the "
            "biases 0, as before the first step; give the trained one (control=true probes a "
            "random one)"
        )


def _untouched(norm: nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm) -> bool:
    alike = bool((norm.weight == 1).all()) or bool((norm.weight == 0).all())
    return alike and not bool(norm.bias.any())


class TrainedEncoder(nn.Module):
    """A frozen backbone behind the view of evaluation that it was trained for."""

    def __init__(
        self, backbone: nn.Module, config: EncoderConfig, view: ViewsConfig, resize: int
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.config, self.view, self.resize = config, view, resize
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, float (n, length), of uint8 images (n, c, height, width).

        The shorter side is resized to what the training images had, and the centre is cut out.
        """
        assert images.dtype == torch.uint8, f"images are uint8 in [0, 255], not {images.dtype}"
        if min(images.shape[2:]) != self.resize:
            bicubic = functional.InterpolationMode.BICUBIC
            images = functional.resize(images, [self.resize], bicubic, antialias=True)
        features: Tensor = self.backbone(views.center(images, self.view))
        return features


def load_encoder(path: str | Path, encoder: Which = "query") -> TrainedEncoder:
    """Return the trained encoder that `path` names, as `find` reads it, for uint8 images.

    A state dict doesn't tell which images its encoder was fed. The usual size, mean and standard
    deviation are then used, with a warning that has them: ImageNet's, or CIFAR-10's for a 3x3 stem.
    """
    found = find(Path(path), encoder)
    fed = found.fed
    if found.views is None:
        logger.warning(
            "%s: doesn't tell how images were fed to it; used are size %s, mean %s, std %s",
            *(found.place, fed.size, fed.mean, fed.std),
        )
    return TrainedEncoder(found.backbone, found.architecture, fed, found.resize)


def start_from(encoder: Encoder, path: Path) -> tuple[list[str], list[str]]:
    """Give the backbone the tensors of `path`; return the names taken, and those left there.

    `path` is what `find` reads, of the same architecture; DataError otherwise. The head is new.
    """
    found = find(path, like=encoder.config)
    checkpoint.load_tensors(encoder.backbone, found.backbone.state_dict(), found.checkpoint.path)
    with torch.no_grad():
        for norm in batch_norms(encoder):
            norm.group_mean.copy_(norm.running_mean)
            norm.group_var.copy_(norm.running_var)
    prefix, read = f"{_QUERY}backbone.", sorted(found.checkpoint.model)
    return [k.removeprefix(prefix) for k in read if k.startswith(prefix)], list(found.left)


def note_start(directory: Path, path: Path, taken: list[str], left: list[str]) -> None:
    """List what `start_from` has returned in the run's init_from.json."""
    listed = {"source": str(path), "taken": taken, "left": left}
    with output_errors(directory):
        (directory / STARTED).write_text(json.dumps(listed, indent=1) + "\n")


def start_sentence(directory: Path) -> str:
    """Return what `note_start` noted in a run directory, in words."""
    noted = json.loads((directory / STARTED).read_text())
    left = noted["left"]
    some = ", ".join(map(shown, left[:4])) + (", ..." if len(left) > 4 else "")
    return (
        f"{shown(noted['source'])}: {len(noted['taken'])} tensors for the backbone, {len(left)} "
        f"left{f' ({some})' if left else ''}; {STARTED} lists them"
    )
