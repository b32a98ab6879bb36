"""A process that decodes images for a trainer.

It reads requests, each a line of JSON followed by numbers, from standard input, writes pixels to
memory shared with the trainer, and answers with a line of JSON. It ends when its input ends, and so
with the trainer, however that ends.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from moco_dist.data import image_file
from moco_dist.data.image_file import Place, Recipe
from moco_dist.errors import shown
from moco_dist.method.slots import CROP_NUMBERS

# Why a file is set aside that was removed.
GONE = "it is gone"

# Signals that Slurm, a terminal or a launcher send to every process of a run.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Answer(NamedTuple):
    """What is wrong with the images of a request."""

    # Number in the request, and why, of each image that is gone or is none.
    bad: list[tuple[int, str]]
    # A sentence about a fault of the machine, after which nothing else was done.
    fault: str = ""


def answer(request: dict[str, Any], numbers: bytes, memory: mmap.mmap) -> Answer:
    """Fulfil a request, but for images that can't be read; return what is wrong."""
    recipe = Recipe(*request["recipe"])
    places = [Place(*place) for place in request["places"]]
    pixels = np.ndarray((len(places), *recipe.shape), np.uint8, memory)
    drawn = np.frombuffer(numbers)
    rows = drawn.reshape(len(places), -1, CROP_NUMBERS).tolist() if recipe.views else []
    bad: list[tuple[int, str]] = []
    for number, place in enumerate(places):
        try:
            content = image_file.read(place)
        except (OSError, ValueError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or error
            if lost(place, error):
                is_gone = isinstance(error, FileNotFoundError)
                bad.append((number, GONE if is_gone else shown(reason)))
                continue
            text = f"{shown(place, 4096)}: can't be read ({shown(reason)}); put it back as it was"
            return Answer(bad, text)
        try:
            if recipe.views:
                found = image_file.crops(content, rows[number], recipe)
            else:
                found = [image_file.square(content, recipe)[0]]
        except MemoryError:
            text = f"{shown(place, 4096)}: needs more memory than is free; lower data.workers"
            return Answer(bad, text)
        except Exception as error:
            # Decoders raise errors of many kinds for bytes that are no image.
            bad.append((number, shown(str(error) or type(error).__name__)))
            continue
        for view, each in enumerate(found):
            pixels[number, view] = each.transpose(2, 0, 1)
    return Answer(bad)


def lost(place: Place, error: Exception) -> bool:
    """Return whether a file is missing, or ends early, by itself: its folder has others.

    A disk that is not mounted is a fault of the machine, and so is a tar that is gone or was cut.
    """
    if place.name or not isinstance(error, FileNotFoundError | ValueError):
        return False
    try:
        with os.scandir(os.path.dirname(place.path)) as others:
            return next(others, None) is not None
    except OSError:
        return False


def serve(requests: BinaryIO, replies: BinaryIO, file: int, slot_bytes: int) -> None:
    """Fulfil requests until the input ends; `file` is the shared memory, divided into slots."""
    slots: dict[int, mmap.mmap] = {}
    while line := requests.readline():
        request = json.loads(line)
        numbers = requests.read(request["bytes"])
        if len(numbers) < request["bytes"]:
            return  # the trainer ended while it wrote
        slot = request["slot"]
        if slot not in slots:
            slots[slot] = mmap.mmap(file, slot_bytes, offset=slot * slot_bytes)
        found = answer(request, numbers, slots[slot])
        replies.write(json.dumps(found).encode() + b"\n")
        replies.flush()


def main() -> None:
    """Serve the trainer, which started this process with the signals blocked."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, IGNORED)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that nothing else is printed between replies
    try:
        serve(sys.stdin.buffer, replies, int(sys.argv[1]), int(sys.argv[2]))
    except BrokenPipeError:
        os._exit(0)  # the trainer has ended


if __name__ == "__main__":
    main()
