"""Checkpoints of both runs: save, find, verify, restore, prune; and `load_encoder`, to use one.

A checkpoint is a folder `step_00039000` with model.safetensors, optimizer.safetensors and
state.json, which holds the size and SHA-256 of the others. It is written beside its place and
renamed: it is whole or absent. No pickle, so one from a stranger can't run code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from moco_dist import comms
from moco_dist.config import EncoderConfig, ViewsConfig
from moco_dist.config_files import from_dict
from moco_dist.encoder import Encoder, build_encoder
from moco_dist.errors import ConfigError, DataError, MissingError, OutputError

logger = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint folder."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    # What else the run needs to go on, and its resolved configuration under "config".
    state: dict[str, Any]


def save(
    run: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint of step `step` and remove all but the `keep` newest; return its folder.

    Call it on all processes: the first one writes. Raises OutputError on all of them if it can't.
    """
    path = run / "checkpoints" / f"step_{step:08d}"
    comms.from_main(lambda: _write(path, step, {"model": model, "optimizer": optimizer}, state))
    comms.from_main(lambda: _prune(run, keep))
    return path


def newest(run: Path) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run, or None; damaged ones are named and passed over.

    Call it on all processes: the first one chooses, and all return the same step.
    """
    step = comms.from_main(lambda: _newest_whole(run))
    return None if step is None else read(run / "checkpoints" / f"step_{step:08d}")


def read(path: Path) -> Checkpoint:
    """Return the checkpoint in folder `path`; MissingError or DataError if absent or damaged."""
    state = _verified_state(path)
    try:
        tensors = {
            name: safetensors.load_file(path / f"{name}.safetensors")
            for name in ("model", "optimizer")
        }
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: damaged checkpoint ({error}); use another one") from error
    return Checkpoint(path, state["step"], tensors["model"], tensors["optimizer"], state)


def find(path: Path) -> Checkpoint:
    """Return the checkpoint that `path` names: its folder, or a run directory with one in it."""
    if (path / "state.json").is_file():
        return read(path)
    if not path.exists():
        raise MissingError(
            f"{path}: no such checkpoint or run directory; give a run that has been pretrained"
        )
    checkpoint = newest(path)
    if checkpoint is None:
        raise MissingError(
            f"{path}: no checkpoint in this folder; give a run directory or a checkpoint folder"
        )
    return checkpoint


def load_encoder(checkpoint: Checkpoint) -> tuple[Encoder, EncoderConfig, ViewsConfig]:
    """Return the query encoder of a pretraining checkpoint, and what it was built and trained with.

    The encoder is frozen and in evaluation mode. Raises DataError unless every tensor of it is
    there, and no other.
    """
    prefix = "query_encoder."
    tensors = {
        k.removeprefix(prefix): v for k, v in checkpoint.model.items() if k.startswith(prefix)
    }
    if not tensors:
        raise DataError(
            f"{checkpoint.path}: not a checkpoint of a pretraining, it holds "
            f"{', '.join(list(checkpoint.model)[:3])}; give the run directory of a pretraining"
        )
    try:
        config = from_dict(EncoderConfig, checkpoint.state["config"]["encoder"])
        views = from_dict(ViewsConfig, checkpoint.state["config"]["views"])
    except (ConfigError, KeyError) as error:
        raise DataError(f"{checkpoint.path}: not readable by this version ({error})") from error
    encoder = build_encoder(config, seed=0)
    load_tensors(encoder, tensors, checkpoint.path)
    return encoder.requires_grad_(False).eval(), config, views


@torch.no_grad()
def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy `tensors` to the module's own by name; DataError unless names and shapes agree."""
    own = module.state_dict()
    faults = [f"{name} is missing" for name in own if name not in tensors]
    faults += [f"{name} is not expected" for name in tensors if name not in own]
    faults += [
        f"{name} is {tuple(tensors[name].shape)} and should be {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise DataError(
            f"{source}: holds another architecture than its configuration says "
            f"({'; '.join(faults[:5])}{more}); use the checkpoint of the matching run"
        )
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def momentum_buffers(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Return SGD's momentum of each parameter, under the parameter's name."""
    states = {name: optimizer.state.get(p, {}) for name, p in module.named_parameters()}
    return {
        f"momentum.{k}": s["momentum_buffer"]
        for k, s in states.items()
        if s.get("momentum_buffer") is not None
    }


def restore_momentum(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Give SGD the momentum that `momentum_buffers` returned."""
    for name, parameter in module.named_parameters():
        if (buffer := tensors.get(f"momentum.{name}")) is not None:
            optimizer.state[parameter]["momentum_buffer"] = buffer.to(parameter.device, copy=True)


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write into OutputError, one sentence that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"{path}: can't be written ({reason}); free it, or choose output=FOLDER"
        ) from error


def _write(
    path: Path, step: int, files: dict[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with output_errors(path):
        temporary.mkdir(parents=True)
        manifest = {}
        for name, tensors in files.items():
            content = safetensors.save(
                {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            )
            manifest[f"{name}.safetensors"] = {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            _write_through(temporary / f"{name}.safetensors", content)
        whole = {"format": FORMAT, "step": step, **state, "files": manifest}
        _write_through(temporary / "state.json", json.dumps(whole, indent=1).encode())
        _flush_folder(temporary)
        if path.exists():  # the same step, saved by the start before this one
            shutil.rmtree(path)
        temporary.rename(path)  # the commit
        _flush_folder(path.parent)


def _write_through(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _steps(run: Path) -> list[int]:
    folders = (run / "checkpoints").glob("step_*")
    return sorted(int(folder.name[5:]) for folder in folders if folder.name[5:].isdecimal())


def _prune(run: Path, keep: int) -> None:
    for step in _steps(run)[:-keep]:
        folder = run / "checkpoints" / f"step_{step:08d}"
        try:
            shutil.rmtree(folder)
        except OSError as error:
            logger.warning("%s: old checkpoint can't be removed (%s)", folder, error)


def _newest_whole(run: Path) -> int | None:
    for step in reversed(_steps(run)):
        try:
            _verified_state(run / "checkpoints" / f"step_{step:08d}")
        except (DataError, MissingError) as error:
            logger.warning("%s; going back to the checkpoint before it", error)
        else:
            return step
    return None


def _verified_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        if state["format"] != FORMAT:
            raise DataError(
                f"{path}: checkpoint format {state['format']}, this version reads {FORMAT}; "
                "use its version"
            )
        for name, expected in state["files"].items():
            content = (path / name).read_bytes()
            if (
                len(content) != expected["bytes"]
                or hashlib.sha256(content).hexdigest() != expected["sha256"]
            ):
                raise DataError(
                    f"{path / name}: damaged (its SHA-256 is not the one in state.json); "
                    "use another one"
                )
    except FileNotFoundError as error:
        raise MissingError(
            f"{error.filename}: missing from the checkpoint; use another one"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged checkpoint ({error!r}); use another one") from error
    return state
