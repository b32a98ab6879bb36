"""How this process asks the system for memory."""

from __future__ import annotations

import ctypes
import platform

# Parameters of mallopt, from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_GIGABYTE, _PAD = 2**30, 64 * 2**20


def keep_freed() -> None:
    """Have glibc keep freed memory for what is asked for next, up to a gigabyte.

    By itself it gives large tensors back to the system when they are freed, and a step of training
    on a CPU then waits for the system to clear the same memory anew: a sixth of its time, and half
    of that of the views. Without glibc nothing is done. The most memory that is in use stays as it
    is.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in (
            (_MMAP_THRESHOLD, _GIGABYTE),
            (_TRIM_THRESHOLD, _GIGABYTE),
            (_TOP_PAD, _PAD),
        ):
            libc.mallopt(parameter, value)
