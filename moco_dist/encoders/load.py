"""The reader of trained encoders: from the path that a user names to a frozen backbone.

Probe, export, report, `load_encoder` and `init_from` all call `find`, so they read and refuse the
same files with the same sentences.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from moco_dist.config.encoder import EncoderConfig
from moco_dist.config.recipe import ViewsConfig
from moco_dist.config.yaml_files import from_dict, to_dict
from moco_dist.encoders import library_folder, names, original, recognise, state_dict
from moco_dist.encoders.library_folder import BICUBIC, FILTERS
from moco_dist.errors import ConfigError, DataError, MissingError, output_errors, shown
from moco_dist.method import views
from moco_dist.method.batch_norm import batch_norms
from moco_dist.method.encoder import Encoder
from moco_dist.runs import checkpoint
from moco_dist.runs.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

Which = Literal["query", "key"]
# The description in an exported folder, and the files that hold the encoder.
DESCRIPTION = "moco_dist.json"
_EXPORTED = ("model.safetensors", "model.pth.tar", "backbone.pkl", "model.onnx")
# What reading a description of another version, or of a stranger, raises.
_BROKEN = (ValueError, LookupError, TypeError, AttributeError, RecursionError, ConfigError)
STARTED = "init_from.json"  # lists the weights that a run started from
_OURS = "query_encoder.backbone."
# Options of a backbone that tell of its new weights alone.
_NEW = {"weight_init": ""}


@dataclass(frozen=True)
class Found:
    """A trained backbone, frozen, in evaluation mode, and what is known of it."""

    backbone: Any
    architecture: EncoderConfig
    # Those of its pretraining; None if they are unknown.
    views: ViewsConfig | None
    # Pixels to which the shorter side of an image is resized.
    resize: int
    # The checkpoint or file, for a person.
    place: str
    # Its tensors under our names, and what is known of its training.
    checkpoint: Checkpoint
    # Names of tensors in the file that are not the backbone's.
    left: tuple[str, ...] = ()
    # The filter of that resizing.
    filter: str = BICUBIC

    @property
    def identity(self) -> str:
        """Return the path and the SHA-256 of what was read."""
        return f"{self.checkpoint.path} {self.checkpoint.state['sha256']}"

    @property
    def fed(self) -> ViewsConfig:
        """Return the views of its pretraining, or the usual ones of such an encoder."""
        return self.views or original.usual_views(self.architecture)


def find(path: Path, which: Which = "query", backbone: str = "") -> Found:
    """Return the trained encoder that `path` names, float32, on the CPU.

    `path` is a run (its newest whole checkpoint), a checkpoint folder, an exported folder, a folder
    that timm or transformers saved, or a file with a state dict, as libraries and training scripts
    save it (`layouts`). `backbone` names the architecture, which only a state dict of a timm model
    needs. Raises MissingError, or DataError unless the encoder is trained, of that architecture,
    and its tensors, except for known heads, are exactly the expected ones.
    """
    found = _found(path, which, backbone)
    if backbone and not recognise.alike(found.architecture.backbone, backbone):
        raise DataError(
            f"{found.place}: is not the {shown(backbone)} that was named; name the right one"
        )
    return found


def _found(path: Path, which: Which, backbone: str, options: Sequence[str] = ()) -> Found:
    """Return `find`'s answer, whatever its architecture; `options` are those of a timm model."""
    path = path.expanduser()
    if not path.exists():
        raise MissingError(
            f"{shown(path)}: no such file or folder; give a run that has been pretrained, a "
            "checkpoint folder, an export, or a file with a state dict"
        )
    folder, file = (path, path / _EXPORTED[0]) if path.is_dir() else (path.parent, path)
    # A file that was renamed is still what the description next to it describes.
    exported = path.name in _EXPORTED or not any((folder / each).is_file() for each in _EXPORTED)
    of_library = (folder / library_folder.CONFIG).is_file() and not (path / "state.json").exists()
    if (folder / DESCRIPTION).is_file() and (path == folder or exported):
        found = _export(folder, which, file if path == file else None)
    elif of_library and (path == folder or path.name in library_folder.WEIGHTS):
        found = _library(folder, which, backbone)
    elif path == folder and ((path / "state.json").exists() or not file.is_file()):
        saved = checkpoint_of(path)
        if saved.step == 0:
            raise DataError(
                f"{saved.path}: is the state before the first step, a random encoder; give a later "
                "one (control=true probes a random one)"
            )
        found = replace(of_checkpoint(saved, which), place=f"{saved.path} (step {saved.step:,})")
    else:
        found = _file(file, which, backbone, options=options)
    state_dict.require_trained(found.backbone, found.checkpoint.path)
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
    """Return the encoder of a pretraining's checkpoint, trained or not.

    Raises DataError unless the tensors, including the head's, are exactly the expected ones.
    """
    path, prefix = saved.path, f"{which}_encoder."
    tensors = {k.removeprefix(prefix): v for k, v in saved.model.items() if k.startswith(prefix)}
    if not tensors and which == "key":
        raise _no_key_encoder(path)
    if not tensors:
        raise DataError(
            f"{path}: not a checkpoint of a pretraining, it holds "
            f"{', '.join(list(saved.model)[:3])}; give the run directory of a pretraining"
        )
    if which == "key":  # it replaces the query encoder
        saved = replace(saved, model={f"query_encoder.{k}": v for k, v in tensors.items()})
    settings = saved.piece("config")
    try:
        config = from_dict(EncoderConfig, settings["encoder"])
        view = from_dict(ViewsConfig, settings["views"])
        # RUN/encoder lacks the configuration of the data.
        data = settings.get("data") or {"size": view.size}
        resize, how = int(data["size"]), FILTERS[data.get("resize", BICUBIC)]
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise DataError(f"{path}: not readable by this version ({reason})") from error
    whole = replace(config, predictor=config.predictor and which == "query")
    checkpoint.check_tensors(state_dict.shapes(whole, path), tensors, path)
    prefix = "backbone."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    backbone = state_dict.filled(config, own, path)
    size = max(resize, view.size)
    return Found(backbone, config, view, size, str(path), saved, filter=how)


def _no_key_encoder(path: Path) -> DataError:
    return DataError(f"{path}: has no key encoder; use the query encoder")


def _export(folder: Path, which: Which, file: Path | None) -> Found:
    """Return the encoder of a folder that moco_dist.export wrote, from `file` if it was renamed."""
    source = folder / DESCRIPTION
    try:
        described = json.loads(source.read_bytes())
        target, holds = str(described["target"]), described["which"]
        config = from_dict(EncoderConfig, described["encoder"])
        view = from_dict(ViewsConfig, described["views"]) if described["views"] else None
        resize, how = int(described["resize"]), FILTERS[described.get("filter", BICUBIC)]
        origin = {str(k): str(v) for k, v in described.get("origin", {}).items()}
    except (OSError, *_BROKEN) as error:
        raise DataError(f"{source}: can't be read ({error!r}); export it again") from error
    if target == "moco":  # the file itself has no views
        found = _file(file or folder / _EXPORTED[1], which)
        found.checkpoint.state["origin"] = origin
        return replace(found, views=view, resize=resize, filter=how)
    if target not in names.READABLE:
        raise DataError(
            f"{folder}: an export for {shown(target)} can't be read back; give its run, or an "
            f"export for {', '.join(names.READABLE)} or moco"
        )
    if which == "key" and holds != "key":
        raise _no_key_encoder(folder)
    content, sha256 = state_dict.read(file or folder / _EXPORTED[0])
    ours = {names.READABLE[target](k): k for k in state_dict.backbone_shapes(config, folder)}
    if content.keys() - ours.keys():
        raise DataError(f"{folder}: has other names than {target}'s; export it again")
    tensors = {ours[name]: each for name, each in content.items()}
    saved = _alone(folder, tensors, config, sha256)
    saved.state["origin"] = origin
    backbone = state_dict.filled(config, tensors, folder)
    place = f"{folder} (export for {target})"
    return Found(backbone, config, view, resize, place, saved, filter=how)


def _library(folder: Path, which: Which, backbone: str) -> Found:
    """Return the encoder of a folder that timm or transformers saved."""
    read = library_folder.read(folder)
    found = _file(read.weights, which, backbone, read.backbone, read.options)
    if read.views is None or len(read.views.mean) != found.architecture.channels:
        return found
    return replace(found, views=read.views, resize=read.resize, filter=read.filter)


def _file(
    path: Path, which: Which, backbone: str = "", said: str = "", options: Sequence[str] = ()
) -> Found:
    """Return the encoder of a file of tensors from any source."""
    content, sha256 = state_dict.read(path)
    if original.is_one(content):
        saved = original.read(path, content, sha256)
        place = f"{path} (of the original scripts, epoch {saved.state['epoch']})"
        return replace(of_checkpoint(saved, which), place=place)
    taken = recognise.backbone(content, path, which == "key", backbone, said, options)
    if taken is None:
        raise _no_key_encoder(path)
    filled = state_dict.filled(taken.config, taken.tensors, path)
    size = original.usual_views(taken.config).size
    saved = _alone(path, taken.tensors, taken.config, sha256)
    place = f"{path} ({taken.words})"
    return Found(filled, taken.config, None, size, place, saved, taken.left)


def _alone(
    path: Path, tensors: Mapping[str, Tensor], config: EncoderConfig, sha256: str
) -> Checkpoint:
    """Return a checkpoint of a backbone whose training is unknown."""
    model = {_OURS + name: each for name, each in tensors.items()}
    state = {"config": {"encoder": to_dict(config)}, "sha256": sha256}
    return Checkpoint(path, 0, model, {}, state)


class TrainedEncoder(nn.Module):
    """A frozen backbone behind the evaluation view that it was trained for."""

    def __init__(
        self,
        backbone: nn.Module,
        config: EncoderConfig,
        view: ViewsConfig,
        resize: int,
        filter: str = BICUBIC,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.config, self.view, self.resize = config, view, resize
        self.filter = functional.InterpolationMode(filter)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, float (n, length), of uint8 images (n, c, height, width).

        The shorter side is resized to what the training images had, and the centre is cut out.
        """
        assert images.dtype == torch.uint8, f"images are uint8 in [0, 255], not {images.dtype}"
        if min(images.shape[2:]) != self.resize:
            images = functional.resize(images, [self.resize], self.filter, antialias=True)
        features: Tensor = self.backbone(views.center(images, self.view))
        return features


def load_encoder(path: str | Path, encoder: Which = "query", backbone: str = "") -> TrainedEncoder:
    """Return the trained encoder that `path` names, as `find` reads it, for uint8 images.

    A plain state dict has no image size, mean and standard deviation: ImageNet's, or CIFAR-10's for
    a 3x3 stem, are then used, with a warning.
    """
    found = find(Path(path), encoder, backbone)
    fed = found.fed
    if found.views is None:
        text = "%s: doesn't tell how images were fed to it; size %s, mean %s and std %s are used"
        logger.warning(text, found.place, fed.size, fed.mean, fed.std)
    return TrainedEncoder(found.backbone, found.architecture, fed, found.resize, found.filter)


def start_from(encoder: Encoder, path: Path) -> tuple[list[str], list[str]]:
    """Load the tensors of `path` into the backbone; return the names of those used and unused.

    `path` is what `find` reads, of the same architecture; DataError otherwise. The head is new.
    """
    own = encoder.config
    found = _found(path, "query", own.backbone, own.options)
    if fix := _differences(own, found.architecture):
        raise DataError(
            f"{found.place}: is not this run's encoder, {state_dict.described(own)}; give "
            f"{' '.join(fix)}, or an init_from= that fits"
        )
    checkpoint.load_tensors(encoder.backbone, found.backbone.state_dict(), found.checkpoint.path)
    with torch.no_grad():
        for norm in batch_norms(encoder):
            norm.group_mean.copy_(norm.running_mean)
            norm.group_var.copy_(norm.running_var)
    read = sorted(found.checkpoint.model)
    return [k.removeprefix(_OURS) for k in read if k.startswith(_OURS)], list(found.left)


def _differences(own: EncoderConfig, found: EncoderConfig) -> list[str]:
    """Return the arguments that give `own` the backbone of `found`."""
    fix = [] if recognise.alike(own.backbone, found.backbone) else [found.backbone]
    fix = [f"encoder.backbone={name}" for name in fix]
    for key in ("channels", "width", "stem", "halves"):
        if (value := getattr(found, key)) != getattr(own, key):
            fix.append(f"encoder.{key}={value}")
    if found.settings | _NEW != own.settings | _NEW:
        fix.append(f"encoder.options=[{','.join(found.options)}]")
    return fix


def note_start(directory: Path, path: Path, taken: list[str], left: list[str]) -> None:
    """Write what `start_from` returned to the run's init_from.json."""
    listed = {"source": str(path), "taken": taken, "left": left}
    with output_errors(directory):
        (directory / STARTED).write_text(json.dumps(listed, indent=1) + "\n")


def start_sentence(directory: Path) -> str:
    """Return the content of a run's init_from.json in words."""
    noted = json.loads((directory / STARTED).read_text())
    left = noted["left"]
    some = ", ".join(map(shown, left[:4])) + (", ..." if len(left) > 4 else "")
    return (
        f"{shown(noted['source'])}: {len(noted['taken'])} tensors for the backbone, {len(left)} "
        f"left{f' ({some})' if left else ''}; {STARTED} lists them"
    )
