"""Writing checkpoints: a snapshot in host memory, written in the background, whole or not at all.

A kill at any moment is harmless: the files are written to a temporary folder and flushed, last
state.json with the sizes and SHA-256 of the others. The rename of the folder is the commit. Old
checkpoints are removed after that.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moco_dist.config.running import CheckpointConfig
from moco_dist.distributed import peers
from moco_dist.errors import NumbersError, OutputError, UserError, output_errors
from moco_dist.runs.checkpoint import FORMAT, folder_of, step_folders

logger = logging.getLogger(__name__)

# Names of the safetensors format, https://github.com/huggingface/safetensors
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Saver:
    """Writes the checkpoints of a run from process 0, one at a time, and removes old ones.

    `unless` is called before each commit, and raises if this process has lost the run.
    """

    def __init__(
        self, run: Path, settings: CheckpointConfig, unless: Callable[[], None] = lambda: None
    ) -> None:
        self.run, self.settings, self._unless = run, settings, unless
        # Step, and step of the last evaluation, of the newest state that is on disk or in flight.
        self.place: tuple[int, int | None] = (-1, None)
        self.seconds = 0.0  # of the slowest save
        self._error: UserError | None = None
        self._thread: threading.Thread | None = None
        self._copies: dict[str, Tensor] = {}
        self._copied = threading.Event()
        self._copied.set()

    @property
    def failed(self) -> bool:
        """Whether a save failed; `finish` raises why."""
        return self._error is not None

    def start(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> None:
        """Save the state after `step` steps in the background, once the previous save is done.

        The tensors must not change until `copied` has returned.
        """
        self.join()
        place = step, state.get("evaluated")
        if self.failed or place == self.place:
            return
        self.place = place
        self._copied.clear()
        files = {"model": dict(model), "optimizer": dict(optimizer)}
        self._thread = threading.Thread(target=self._work, args=(step, files, dict(state)))
        self._thread.start()

    def copied(self) -> None:
        """Wait until the tensors of the save in flight have been copied."""
        self._copied.wait()

    def finish(self) -> None:
        """Wait for the save in flight; raise UserError if it or an earlier one failed."""
        self.join()
        if self._error:
            raise self._error

    def join(self, seconds: float = math.inf) -> None:
        """Wait for the save in flight, but no longer than `seconds`."""
        end = time.monotonic() + seconds
        while self._thread and self._thread.is_alive() and time.monotonic() < end:
            self._thread.join(0.5)
            peers.me.mark(peers.me.step, "waiting for a save")

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """Return `tensor` in host memory, in the memory of its previous copy."""
        kept = self._copies.get(name)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name] = kept
        return kept.copy_(tensor.detach())

    def _work(
        self, step: int, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
    ) -> None:
        began = time.monotonic()
        try:
            try:
                copies = {
                    part: {name: self._copy(f"{part}.{name}", t) for name, t in tensors.items()}
                    for part, tensors in files.items()
                }
            finally:
                self._copied.set()
            write(self.run, step, copies["model"], copies["optimizer"], state, self._unless)
            prune(self.run, self.settings, (state.get("best") or {}).get("step"))
        except UserError as error:
            self._error = error
        except Exception as error:
            self._error = UserError(f"step {step} can't be saved: {error!r}")
        self.seconds = max(self.seconds, time.monotonic() - began)


def write(
    run: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    unless: Callable[[], None] = lambda: None,
) -> Path:
    """Write a checkpoint of the state after `step` steps; return its folder.

    All tensors are in host memory. Raises OutputError, or NumbersError for a tensor that is not
    finite, and then leaves nothing new on disk.
    """
    path = folder_of(run, step)
    files = {"model.safetensors": model, "optimizer.safetensors": optimizer}
    for tensors in files.values():
        for name, tensor in tensors.items():
            # The sum is quick; if it overflows, each value is tested.
            finite = not tensor.is_floating_point() or tensor.sum(dtype=torch.float64).isfinite()
            if not (finite or tensor.isfinite().all()):
                raise NumbersError(
                    f"{name} is not finite after step {step}: this state was not saved, and the "
                    "previous checkpoint stands; train again with a lower optim.lr and name=..."
                )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(t.nbytes for tensors in files.values() for t in tensors.values())
        free = shutil.disk_usage(path.parent).free
        if free < needed + 2**20:
            raise OutputError(
                f"{path}: needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; free some, "
                "and the same command resumes from the previous checkpoint"
            )
        temporary.mkdir()
        try:
            manifest = {
                name: _write_tensors(temporary / name, tensors) for name, tensors in files.items()
            }
            own = {key: value for key, value in state.items() if key != "sha256"}
            own |= {"format": FORMAT, "step": step, "files": manifest}
            _write_state(temporary / "state.json", own)
            _flush_folder(temporary)
            unless()
            _commit(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return path


def write_encoder(
    run: Path, step: int, model: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Path:
    """Write the query encoder alone as a checkpoint to RUN/encoder; return its folder.

    It has the part of the configuration that `load_encoder` needs, and no path of this machine. The
    predictor, which is a part of the loss, is left out.
    """
    own = {
        name: tensor.detach().cpu()
        for name, tensor in model.items()
        if name.startswith(("query_encoder.backbone.", "query_encoder.head."))
    }
    encoder = {**config["encoder"], "predictor": False}
    needed = {key: config[key] for key in ("views", "views_2") if key in config}
    needed["encoder"] = encoder
    needed["init_from"] = Path(config.get("init_from", "")).name
    return write(run / "encoder", step, own, {}, {"config": needed})


def prune(run: Path, settings: CheckpointConfig, best: int | None) -> None:
    """Remove checkpoints that `settings` don't keep; `best` is the step with the best kNN."""
    for step, folder in step_folders(run)[: -settings.keep_last]:
        multiple = settings.keep_every and step % settings.keep_every == 0
        if multiple or (settings.keep_best and step == best):
            continue
        # Renamed first: a kill in the middle leaves no half checkpoint under a checkpoint's name.
        old = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
        try:
            folder.rename(old)
            shutil.rmtree(old)
        except OSError as error:
            logger.warning("%s: old checkpoint can't be removed (%s)", folder, error)


def clean(run: Path) -> None:
    """Remove what killed saves have left, but not the only copy of a checkpoint.

    Call it as the only writer of the run.
    """
    for left in (run / "checkpoints").glob(".step_*.replaced"):
        path = left.with_name(left.name.split(".")[1])
        if not path.exists():  # the new one was not put in its place
            with output_errors(path):
                left.rename(path)
    for pattern in (".step_*.tmp", ".step_*.old", ".step_*.replaced"):
        for left in (run / "checkpoints").glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file; return its size and SHA-256.

    The library's own writer builds the whole file in memory and holds the interpreter's lock, for
    which training would have to wait.
    """
    header: dict[str, Any] = {}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in order:
        dtype, shape = _DTYPES[tensors[name].dtype], list(tensors[name].shape)
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    flat = (tensors[name].contiguous().reshape(-1).view(torch.uint8) for name in order)
    head = (len(text).to_bytes(8, "little"), text)
    sha256 = _write_flushed(path, itertools.chain(head, (each.numpy().data for each in flat)))
    return {"bytes": 8 + len(text) + end, "sha256": sha256}


def _write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write state.json, whose last entry is the SHA-256 of everything before it."""
    text = json.dumps(state, indent=1).removesuffix("\n}") + ',\n "sha256": "'
    text += hashlib.sha256(text.encode()).hexdigest() + '"\n}\n'
    _write_flushed(path, [text.encode()])


def _write_flushed(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write a new file and flush it to disk; return its SHA-256."""
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _commit(temporary: Path, path: Path) -> None:
    # An evaluation after the last save has it written again, and an earlier launch may have saved
    # the same step without this one resuming from it.
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.replaced")
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    _flush_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
