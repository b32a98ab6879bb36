"""The id of a run for its whole life, and its group."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moco_dist.errors import ConfigError, output_errors, shown
from moco_dist.runs.status import replace

logger = logging.getLogger(__name__)

FILE = "run_id.json"

# An id is part of the names of folders, and may come from a stranger's checkpoint.
_USABLE = re.compile(r"[A-Za-z0-9_-]{1,64}")


def run_id(
    directory: Path, name: str, saved: Mapping[str, Any] | None, encoder: str | None = None
) -> str:
    """Return the id of the run, which the first launch draws and later ones keep.

    `saved` is the state of the checkpoint that the run resumes from, and `encoder` the id of the
    run that a probe measures. A copy of a run directory that continues under another name gets
    another id. WANDB_RUN_ID is the id of one run: if an older run of the same output folder has it,
    or the encoder's, this run gets another one, with a warning.
    """
    path = directory / FILE
    if found := _noted(path, name):
        return found
    asked = os.environ.get("WANDB_RUN_ID")
    drawn = asked or secrets.token_hex(8)
    with suppress(KeyError, TypeError):
        if saved and saved["config"]["name"] == name and _USABLE.fullmatch(saved["run_id"]):
            drawn = str(saved["run_id"])
    if not _USABLE.fullmatch(drawn):
        raise ConfigError(f"WANDB_RUN_ID={drawn} is not an id; use up to 64 of a-z A-Z 0-9 _ -")
    _note(path, name, drawn)
    # Noted first: of two runs that start together, the one that wrote later sees the other.
    if drawn == asked and (owner := "the encoder" if drawn == encoder else _elder(path, drawn)):
        drawn = f"{drawn[:47]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        sentence = "WANDB_RUN_ID=%s is the id of %s; this run has the id %s at W&B"
        logger.warning(sentence, asked, owner, drawn)
        _note(path, name, drawn)
    return drawn


def _note(path: Path, name: str, drawn: str) -> None:
    with output_errors(path):
        replace(path, json.dumps({"name": name, "id": drawn}) + "\n")


def _noted(path: Path, name: str) -> str | None:
    """Return the id in a file if it is that of the run `name`."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text())
        if found["name"] == name and _USABLE.fullmatch(found["id"]):
            return str(found["id"])
    return None


def _elder(path: Path, drawn: str) -> str | None:
    """Return an older run directory next to that of `path` whose run has this id, or None."""

    def age(file: Path) -> tuple[int, str]:
        return file.stat().st_mtime_ns, file.parent.name

    for other in path.parent.parent.glob(f"*/{FILE}"):
        with suppress(OSError):
            if age(other) < age(path) and _noted(other, other.parent.name) == drawn:
                return shown(other.parent)
    return None


def group(name: str, state: Mapping[str, Any]) -> str:
    """Return the group of the pretraining run `name`, from the state of its checkpoint."""
    with suppress(KeyError, TypeError):
        return f"{state['config']['name']}-{state['run_id']}"
    return name
