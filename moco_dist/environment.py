"""What a start of a run ran on and with."""

from __future__ import annotations

import os
import platform
import sys
import time
from typing import Any

import accelerate
import torch
import torchvision

import moco_dist
from moco_dist import comms


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


def shared_environment() -> dict[str, Any]:
    """Return what `environment` does, without the command line."""
    return {key: value for key, value in environment().items() if key != "arguments"}
