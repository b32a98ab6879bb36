"""What a W&B folder on disk holds, by wandb's own record type."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEAD = 32768, 7


def records(path: Path) -> Iterator[Any]:
    """Yield the records of a .wandb file: LevelDB's log format behind a header of 7 bytes.

    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    data = path.read_bytes()
    assert data[:4] == b":W&B", f"{path} is no W&B file"
    place, parts = HEAD, b""
    while place + HEAD <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEAD:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        if kind == 0:
            break
        parts += data[place + HEAD : place + HEAD + size]
        place += HEAD + size
        if kind in (1, 4):  # whole, or the last part
            record: Any = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(parts)
            parts = b""
            yield record


class Folder:
    """One start of a run, read back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (self.log,) = path.glob("run-*.wandb")
        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.axes: dict[str, str] = {}
        self.artifacts: list[Any] = []
        self.exit_code: int | None = None
        self.preempting = False
        for record in records(self.log):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self.config |= _items(record.run.config.update)
            elif kind == "history":
                self.history.append(_items(record.history.item))
            elif kind == "summary":
                self.summary |= _items(record.summary.update)
            elif kind == "metric":
                self.axes[record.metric.name] = record.metric.step_metric
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "preempting":
                self.preempting = True
            elif kind == "exit":
                self.exit_code = record.exit.exit_code


def _items(items: Any) -> dict[str, Any]:
    """Return what a list of updates says; a key may be a path through dicts."""
    found: dict[str, Any] = {}
    for item in items:
        *path, last = item.nested_key or [item.key]
        place = found
        for key in path:
            place = place.setdefault(key, {})
        place[last] = json.loads(item.value_json)
    return found


def folders(run: Path) -> list[Folder]:
    """Return the offline starts of a run that are on disk."""
    return [Folder(path) for path in sorted((run / "wandb").glob("offline-run-*"))]
