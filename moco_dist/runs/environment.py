"""The machine and the libraries that a run uses, and its memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import accelerate
import torch
import torchvision

import moco_dist
from moco_dist.distributed import comms

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_GIGABYTE = 2**30


def environment() -> dict[str, Any]:
    """Return the machine, the libraries and the command line of this launch."""
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


def memory_gb(device: torch.device) -> float:
    """Return this process's peak memory in 10^9 bytes: of tensors on a GPU, otherwise its RSS."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes in what getrusage counts
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def forget_peak_memory() -> None:
    """Let `memory_gb` of a CPU tell only of what comes, where Linux and glibc allow that."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that glibc keeps
        Path("/proc/self/clear_refs").write_bytes(b"5")


def keep_freed_memory() -> None:
    """Have glibc keep up to a gigabyte of freed memory; does nothing without glibc.

    Otherwise glibc returns large freed tensors to the system, which clears the same memory again:
    a sixth of a training step on a CPU. Peak memory does not change.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _GIGABYTE)
        libc.mallopt(_TRIM_THRESHOLD, _GIGABYTE)
        libc.mallopt(_TOP_PAD, 64 * 2**20)
