"""Reading checkpoints: find, verify, set aside, restore.

A checkpoint is a folder `step_00039000` with model.safetensors, optimizer.safetensors and
state.json, which holds the sizes and SHA-256 of all three; `saving.py` writes them. No pickle, so
a stranger's checkpoint can't run code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from moco_dist.distributed import peers
from moco_dist.errors import DataError, MissingError, UserError, machine_error, output_errors, shown

logger = logging.getLogger(__name__)

FORMAT = 2
FILES = ("model.safetensors", "optimizer.safetensors")
# What an optimizer remembers of a parameter: the names in a checkpoint, and PyTorch's.
_BUFFERS = {"momentum": "momentum_buffer", "first": "exp_avg", "second": "exp_avg_sq"}
# state.json is some kilobytes; nothing larger is read into memory.
_MAX_STATE = 2**24


class OtherFormatError(DataError):
    """A checkpoint of another version of this program; it is not damaged."""


class UnreadableError(DataError):
    """A checkpoint that can't be read at the moment; it may be whole."""

    again = True


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint folder."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    # What else the run needs to resume, and its resolved configuration under "config".
    state: dict[str, Any]

    def piece(self, name: str) -> Any:
        """Return an entry of the state; DataError if it is missing."""
        if name not in self.state:
            raise DataError(
                f"{self.path}: '{name}' is missing from state.json, and the run can't resume "
                "exactly without it; use another checkpoint"
            )
        return self.state[name]


def folder_of(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint of step `step`."""
    return run / "checkpoints" / f"step_{step:08d}"


def step_folders(run: Path) -> list[tuple[int, Path]]:
    """Return the checkpoint folders, whole or not, as (step, folder) in order of steps."""
    folders = (run / "checkpoints").glob("step_*")
    steps = ((folder.name.removeprefix("step_"), folder) for folder in folders)
    return sorted((int(step), folder) for step, folder in steps if step.isdecimal())


def newest(run: Path, set_aside: bool = False) -> Checkpoint | None:
    """Return the newest whole checkpoint of a run, or None; log and skip damaged ones.

    A collective: the first process chooses. With `set_aside`, for the writer of the run only,
    damaged ones are renamed to damaged_step_..., but not those that can't be read at the moment,
    for example because a file server is down. Raises DataError if none is whole: whether to start
    from nothing is for the user to decide.
    """
    folder = peers.from_main(lambda: _newest_whole(run, set_aside))
    found = peers.together(lambda: None if folder is None else read(folder))
    if found:
        peers.same_everywhere(f"the content of {found.path.name}", found.state["sha256"])
    return found


def read(path: Path) -> Checkpoint:
    """Return the checkpoint in folder `path`; MissingError or DataError if absent or damaged."""
    state = _verified_state(path)
    try:
        model, optimizer = (safetensors.load_file(path / name) for name in FILES)
    except (SafetensorError, OSError) as error:
        if machine_error(error):  # the checkpoint is not to blame, nor to be set aside
            raise
        raise DataError(f"{path}: damaged checkpoint ({error}); use another one") from error
    return Checkpoint(path, state["step"], model, optimizer, state)


def differences(expected: Mapping[str, Tensor | torch.Size], tensors: Mapping[str, Tensor]) -> str:
    """Return which tensors are missing, not expected or of another shape; empty if none are."""
    shapes = {k: v.shape if isinstance(v, Tensor) else v for k, v in expected.items()}
    faults = [f"{name} is missing" for name in shapes if name not in tensors]
    faults += [f"{shown(name)} is not expected" for name in tensors if name not in shapes]
    faults += [
        f"{name} is {tuple(tensors[name].shape)} and should be {tuple(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
    return "; ".join(faults[:5]) + more


def check_tensors(
    expected: Mapping[str, Tensor | torch.Size], tensors: Mapping[str, Tensor], source: Path
) -> None:
    """Raise DataError, naming tensors, unless names and shapes are the expected ones."""
    if faults := differences(expected, tensors):
        raise DataError(
            f"{source}: holds another architecture than its configuration says "
            f"({faults}); use the checkpoint of the matching run"
        )


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load `tensors` into the module; DataError unless names and shapes agree."""
    check_tensors(module.state_dict(), tensors, source)
    module.load_state_dict(tensors)


def momentum_buffers(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Return what the optimizer remembers of each parameter, under the parameter's name.

    That is SGD's and LARS's momentum, or the first and second moments of AdamW.
    """
    return {
        f"{ours}.{name}": buffer
        for name, parameter in module.named_parameters()
        for ours, theirs in _BUFFERS.items()
        if (buffer := optimizer.state.get(parameter, {}).get(theirs)) is not None
    }


def momentum_shapes(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of what `momentum_buffers` returns after a step."""
    adam, settings = isinstance(optimizer, torch.optim.AdamW), optimizer.defaults
    kinds = ["first", "second"] if adam else ["momentum"] if settings["momentum"] else []
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return {f"{kind}.{name}": p.shape for kind in kinds for name, p in trained}


def restore_momentum(
    optimizer: torch.optim.Optimizer, module: nn.Module, saved: Checkpoint
) -> None:
    """Restore what `momentum_buffers` returned; the step of AdamW is the run's."""
    for name, parameter in module.named_parameters():
        for ours, theirs in _BUFFERS.items():
            if (buffer := saved.optimizer.get(f"{ours}.{name}")) is None:
                continue
            # In the parameter's own memory format, as the optimizer made it.
            own = torch.empty_like(parameter, dtype=buffer.dtype, requires_grad=False)
            optimizer.state[parameter][theirs] = own.copy_(buffer)
            if ours == "first":
                step = torch.tensor(float(saved.step), device=parameter.device)
                optimizer.state[parameter]["step"] = step


def _newest_whole(run: Path, set_aside: bool) -> Path | None:
    damaged, again = list[str](), False
    for _, folder in reversed(step_folders(run)):
        try:
            _verified_state(folder)
        except OtherFormatError:
            raise
        except (DataError, MissingError) as error:
            logger.warning("%s; going back to the previous checkpoint", error)
            again = again or error.again
            keeps_name = error.again or not set_aside
            damaged.append(folder.name if keeps_name else _set_aside(folder))
        else:
            return folder
    damaged += sorted(folder.name for folder in (run / "checkpoints").glob("damaged_step_*"))
    if damaged:
        none = DataError(
            f"{run}: has no whole checkpoint, only {', '.join(dict.fromkeys(damaged))}; bring one "
            "back, remove these folders to start from nothing, or choose name=... for a new run"
        )
        none.again = again
        raise none
    return None


def _set_aside(folder: Path) -> str:
    endings = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    targets = (folder.with_name(f"damaged_{folder.name}{ending}") for ending in endings)
    target = next(path for path in targets if not path.exists())
    with output_errors(folder):
        folder.rename(target)
    logger.warning("%s: kept as %s", folder, target.name)
    return target.name


def _verified_state(path: Path) -> dict[str, Any]:
    """Return the state of the checkpoint in `path` once every byte of it has been verified."""
    file = path / "state.json"
    try:
        _require_plain(file, _MAX_STATE)
        text = file.read_bytes()
        state: dict[str, Any] = json.loads(text)
        body, mark, end = text.rpartition(b'"sha256": "')
        whole = end == hashlib.sha256(body + mark).hexdigest().encode() + b'"\n}\n'
        # Format 1 had no SHA-256 of state.json.
        if not whole and ("sha256" in state or state["format"] == FORMAT):
            raise _wrong_sum(file, "at its end")
        if state["format"] != FORMAT:
            raise OtherFormatError(
                f"{path}: checkpoint format {state['format']}, this version reads {FORMAT}; "
                "use its version"
            )
        name = path.name
        if name.startswith("step_") and name != folder_of(path, state["step"]).name:
            raise DataError(f"{path}: holds step {state['step']}; restore its name")
        if sorted(state["files"]) != sorted(FILES):
            raise DataError(f"{path}: lists other files than {', '.join(FILES)}; use another one")
        for name in FILES:
            file, listed = path / name, state["files"][name]
            size = _require_plain(file, listed["bytes"])
            with file.open("rb") as opened:
                sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
            if {"bytes": size, "sha256": sha256} != listed:
                raise _wrong_sum(file, "in state.json")
    except FileNotFoundError as error:
        raise MissingError(
            f"{error.filename}: missing from the checkpoint; use another one"
        ) from error
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if machine_error(error):
            raise
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise UnreadableError(
                f"{path}: can't be read ({reason}); try again, or use another one"
            ) from error
        raise DataError(f"{path}: damaged checkpoint ({error!r}); use another one") from error
    return state


def _wrong_sum(path: Path, place: str) -> DataError:
    return DataError(f"{path}: damaged (its SHA-256 is not the one {place}); use another one")


def _require_plain(path: Path, most: int) -> int:
    """Return the size of a file; DataError if it is a device, a pipe, or larger than `most`."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path}: not a plain file; use another checkpoint")
    if found.st_size > most:
        raise DataError(f"{path}: damaged ({found.st_size} bytes, not {most}); use another one")
    return found.st_size
