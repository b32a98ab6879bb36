"""The id of a run for its whole life, and its group."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from moco_dist.errors import ConfigError, output_errors
from moco_dist.runs.status import replace

# An id is part of the names of folders, and may come from a stranger's checkpoint.
_USABLE = re.compile(r"[A-Za-z0-9_-]{1,64}")


def run_id(directory: Path, name: str, saved: Mapping[str, Any] | None) -> str:
    """Return the id of the run, which the first launch draws and later ones keep.

    `saved` is the state of the checkpoint that the run resumes from. A copy of a run directory
    that continues under another name gets another id.
    """
    path = directory / "run_id.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text())
        if found["name"] == name and _USABLE.fullmatch(found["id"]):
            return str(found["id"])
    drawn = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(8)
    with suppress(KeyError, TypeError):
        if saved and saved["config"]["name"] == name and _USABLE.fullmatch(saved["run_id"]):
            drawn = str(saved["run_id"])
    if not _USABLE.fullmatch(drawn):
        raise ConfigError(f"WANDB_RUN_ID={drawn} is not an id; use up to 64 of a-z A-Z 0-9 _ -")
    with output_errors(path):
        replace(path, json.dumps({"name": name, "id": drawn}) + "\n")
    return drawn


def group(name: str, state: Mapping[str, Any]) -> str:
    """Return the group of the pretraining run `name`, from the state of its checkpoint."""
    with suppress(KeyError, TypeError):
        return f"{state['config']['name']}-{state['run_id']}"
    return name
