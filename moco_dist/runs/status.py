"""How a run stands and how it ended, in small JSON files for people and job schedulers."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from moco_dist.errors import STATES

# Names a file that also gets how the run ended: a start that is refused may write to no run.
OUTCOME = "MOCO_DIST_OUTCOME"


def write_status(
    directory: Path, status: int | None, step: int, reason: str, again: bool = False
) -> None:
    """Write status.json: the state in a word, the exit state (None: it runs), the step and why.

    `again` is whether the same command, started again by a machine, is likely to go on.
    """
    path = directory / "status.json"
    with suppress(OSError, ValueError):
        if status == 0 and json.loads(path.read_text())["exit_status"] == 0:
            return  # nothing was left to do
    replace(path, _content(status, step, reason, again))


def note_outcome(status: int, step: int, reason: str, again: bool) -> None:
    """Write the same to the file that the environment names, if it names one."""
    if path := os.environ.get(OUTCOME):
        with suppress(OSError):
            replace(Path(path), _content(status, step, reason, again))


def _content(status: int | None, step: int, reason: str, again: bool) -> str:
    content = {
        "state": "running" if status is None else STATES[status],
        "exit_status": status,
        "step": step,
        "reason": reason,
        "again": again,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
    }
    return json.dumps(content, indent=1) + "\n"


def replace(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds either all of it or what was there before."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    temporary.replace(path)
