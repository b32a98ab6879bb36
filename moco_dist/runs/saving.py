"""Writing checkpoints: a snapshot in host memory, written in the background, whole or not at all.

The order of things makes a kill at any moment harmless: a temporary folder beside the final name,
each file flushed, state.json with the sizes and SHA-256 of the others last, then the rename, which
is the commit, and the flush of the parent. Old checkpoints go after that, never before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
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
# What a kill in a save, or in the removal of an old checkpoint, may leave.
_LEFTOVERS = (".step_*.tmp", ".step_*.old")


class Saver:
    """Writes the checkpoints of a run from process 0, one at a time, and removes old ones.

    `unless` is called before each commit; it raises if the run is no longer ours.
    """

    def __init__(
        self, run: Path, settings: CheckpointConfig, unless: Callable[[], None] = lambda: None
    ) -> None:
        self.run, self.settings, self._unless = run, settings, unless
        # The newest state that is on disk, or on its way: its step, and the one evaluated last.
        self.place: tuple[int, int | None] = (-1, None)
        # Seconds that the slowest save took.
        self.seconds = 0.0
        self._error: UserError | None = None
        self._thread: threading.Thread | None = None
        self._copies: dict[str, Tensor] = {}
        self._copied = threading.Event()
        self._copied.set()

    @property
    def failed(self) -> bool:
        """Whether a save has come to nothing; `finish` raises why."""
        return self._error is not None

    @property
    def busy(self) -> bool:
        """Whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
    ) -> None:
        """Save the state after `step` steps in the background; return at once.

        The tensors must not change until `copied` has returned. A save that is still being written
        is waited for.
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
        """Wait until the state of the save in flight has been copied, and may change."""
        self._copied.wait()

    def finish(self) -> None:
        """Wait for the save in flight; raise UserError if it, or one before it, failed."""
        self.join()
        if self._error:
            raise self._error

    def join(self, seconds: float = math.inf) -> None:
        """Wait for the save in flight, but no longer than so many seconds."""
        end = time.monotonic() + seconds
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < end:
            self._thread.join(0.5)
            peers.me.mark(peers.me.step, "waiting for a save")

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """Return `tensor` in host memory, in the place that its copy before this one had."""
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
    finite; then there is nothing new on disk.
    """
    path = folder_of(run, step)
    files = {"model.safetensors": model, "optimizer.safetensors": optimizer}
    for tensors in files.values():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not _finite(tensor):
                raise NumbersError(
                    f"{name} is not finite after step {step}: this state was not saved, and the "
                    "checkpoint before it stands; train anew with a lower optim.lr and name=..."
                )
    # Beside its final place: a rename works within one file system only.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _require_room(path, sum(t.nbytes for tensors in files.values() for t in tensors.values()))
        temporary.mkdir()
        try:
            manifest = {
                name: _write_tensors(temporary / name, tensors) for name, tensors in files.items()
            }
            own = {key: value for key, value in state.items() if key != "sha256"}
            whole = own | {"format": FORMAT, "step": step, "files": manifest}
            _write_state(temporary / "state.json", whole)
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

    It holds of the configuration what `load_encoder` needs, and no path of this machine.
    """
    own = {k: v.detach().cpu() for k, v in model.items() if k.startswith("query_encoder.")}
    needed = {key: config[key] for key in ("encoder", "views")}
    return write(run / "encoder", step, own, {}, {"config": needed})


def prune(run: Path, settings: CheckpointConfig, best: int | None) -> None:
    """Remove checkpoints that `settings` don't keep; `best` is the step with the best kNN."""
    for step, folder in step_folders(run)[: -settings.keep_last]:
        for_good = settings.keep_every and step % settings.keep_every == 0
        if for_good or (settings.keep_best and step == best):
            continue
        try:
            _remove(folder)
        except OSError as error:
            logger.warning("%s: old checkpoint can't be removed (%s)", folder, error)


def clean(run: Path) -> None:
    """Remove what killed saves have left; call it as the only writer of the run."""
    for pattern in _LEFTOVERS:
        for left in (run / "checkpoints").glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def _require_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed + 2**20:
        raise OutputError(
            f"{path}: needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; free some, "
            "and go on from the checkpoint before it with the same command"
        )


def _finite(tensor: Tensor) -> bool:
    # The sum is quick and tells almost always; a sum that overflows is looked into.
    return bool(tensor.sum(dtype=torch.float64).isfinite()) or bool(tensor.isfinite().all())


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file; return its size and SHA-256.

    The library's own writer builds the whole file in memory and holds the interpreter's lock, for
    which training would have to wait; what is read is read by the library.
    """
    header: dict[str, Any] = {}
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for name in order:
            content = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + offset, "sha256": digest.hexdigest()}


def _write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write state.json, whose last entry is the SHA-256 of everything before it."""
    text = json.dumps(state, indent=1).removesuffix("\n}") + ',\n "sha256": "'
    text += hashlib.sha256(text.encode()).hexdigest() + '"\n}\n'
    with path.open("xb") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _commit(temporary: Path, path: Path) -> None:
    # The same step: a start before this one saved it, and it was not taken up.
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    _flush_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove(folder: Path) -> None:
    # Renamed first: a kill in the middle leaves no half checkpoint under a checkpoint's name.
    old = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    folder.rename(old)
    shutil.rmtree(old)


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
