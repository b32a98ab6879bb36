"""The small files of a run directory: how the run stands, and what it ran on and with."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import accelerate
import torch
import torchvision

import moco_dist
from moco_dist import comms, peers


def write_status(directory: Path, state: str, status: int | None, reason: str) -> None:
    """Write status.json: the state in a word, the exit state, where the run stands and why."""
    path = directory / "status.json"
    with suppress(OSError, ValueError):
        if state == "done" and json.loads(path.read_text())["state"] == "done":
            return  # nothing was left to do
    content = {
        "state": state,
        "exit_status": status,
        "step": peers.me.step,
        "reason": reason,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    replace(path, json.dumps(content, indent=1) + "\n")


def replace(path: Path, text: str) -> None:
    """Write a small text file so that it is whole or as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def shared_environment() -> dict[str, Any]:
    """Return what `environment` does, without the command line."""
    return {key: value for key, value in environment().items() if key != "arguments"}


def environment() -> dict[str, Any]:
    """Return what this start of the run ran on and with."""
    cuda = torch.cuda.is_available()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "arguments": sys.argv[1:],
        "processes": comms.world_size(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "moco_dist": moco_dist.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "accelerate": accelerate.__version__,
        "cuda": torch.version.cuda if cuda else None,
    }
