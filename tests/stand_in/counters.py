"""What the stand-in has counted in this process, and where it was waited for."""

from __future__ import annotations

import ctypes
import os
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

library = ctypes.CDLL(os.path.join(os.environ["STAND_IN"], "libfakecuda.so"))
library.fake_dump.restype = ctypes.c_char_p
library.fake_number.restype = ctypes.c_long
# The order of `fake_number`.
NAMES = (
    "kernels",
    "waits",
    "library",
    "mallocs",
    "h2d",
    "d2h",
    "d2d",
    "memsets",
    "nccl",
    "hostalloc",
)
# All that is put on a stream.
LAUNCHED = ("kernels", "library", "h2d", "d2h", "d2d", "memsets", "nccl")
WAIT, COPY = 1, 5  # kinds of a callback

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p)


def counted() -> dict[str, int]:
    """Return all numbers since the last `reset`, and `launches`, their sum on streams."""
    numbers = {name: library.fake_number(place) for place, name in enumerate(NAMES)}
    return numbers | {"launches": sum(numbers[name] for name in LAUNCHED)}


def names() -> Counter[str]:
    """Return how often each kernel, call of a library and copy was launched since `reset`."""
    lines = (line.split("\t") for line in library.fake_dump().decode().splitlines())
    return Counter({name: int(number) for number, name in lines})


def reset() -> None:
    """Set all numbers to 0."""
    library.fake_reset()


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """Count waits, and copies from pageable memory, which wait too, by their lines."""
    found = Counter[str]()

    def note(kind: int, what: bytes) -> None:
        if kind == COPY and what == b"pinned":
            return
        frames = [f for f in traceback.extract_stack()[:-1] if "moco_dist" in f.filename]
        lines = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-4:]))
        found[f"{what.decode()} at {lines}"] += 1

    callback = _CALLBACK(note)
    library.fake_callback(callback, 1 << WAIT | 1 << COPY)
    try:
        yield found
    finally:
        library.fake_callback(_CALLBACK(), 0)
