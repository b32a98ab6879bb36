"""What a start of a run ran on and with."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from typing import Any

import accelerate
import torch
import torchvision

import moco_dist
from moco_dist.distributed import comms


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


def memory_gb(device: torch.device) -> float:
    """Return the most memory that this process has had, in 10^9 bytes: of its GPU, else resident.

    Of a GPU it is what PyTorch has handed out to tensors.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes in what getrusage counts
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
