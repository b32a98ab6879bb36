"""The state of a run and how it ended, in small JSON files for people and job schedulers."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moco_dist.errors import STATES

# Names a file that also gets the outcome: a launch that is refused may not write to the run.
OUTCOME = "MOCO_DIST_OUTCOME"


def write_status(
    directory: Path, status: int | None, step: int, reason: str, again: bool = False
) -> None:
    """Write status.json: state, exit status (None while it runs), step, reason, and `again`.

    `again` is whether the same command is likely to resume the run if a machine starts it again.
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
    """Write a file so that readers see the old or the new content, whole."""
    with written_whole(path) as temporary:
        temporary.write_bytes(
            content.encode(errors="backslashreplace") if isinstance(content, str) else content
        )


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a file next to `path` to write to; without an error it replaces `path`."""
    # Other machines may write the same file of a shared cache.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
