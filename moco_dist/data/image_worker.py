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
from typing import Any, BinaryIO

import numpy as np

from moco_dist.data import image_file
from moco_dist.data.image_file import Place, Recipe
from moco_dist.errors import shown
from moco_dist.method.slots import CROP_NUMBERS

# Signals that Slurm, a terminal or a launcher send to every process of a run.
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def answer(request: dict[str, Any], numbers: bytes, memory: mmap.mmap) -> str:
    """Fulfil a request; return what is wrong with one of its images, or an empty text."""
    recipe = Recipe(*request["recipe"])
    places = [Place(*place) for place in request["places"]]
    shape = len(places), max(1, len(recipe.views)), recipe.channels, recipe.size, recipe.size
    pixels = np.ndarray(shape, np.uint8, memory)
    drawn = np.frombuffer(numbers)
    rows = drawn.reshape(len(places), -1, CROP_NUMBERS).tolist() if recipe.views else []
    for number, place in enumerate(places):
        try:
            content = image_file.read(place)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            return f"{shown(place, 4096)}: can't be read ({shown(reason)}); put it back as it was"
        try:
            if recipe.views:
                found = image_file.crops(content, rows[number], recipe)
            else:
                found = [image_file.square(content, recipe)[0]]
        except Exception as error:
            # Decoders raise errors of many kinds for bytes that are no image.
            reason = shown(str(error) or type(error).__name__)
            return (
                f"{shown(place, 4096)}: not a readable image ({reason}); "
                "replace or remove this file"
            )
        for view, each in enumerate(found):
            pixels[number, view] = each.transpose(2, 0, 1)
    return ""


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
        wrong = answer(request, numbers, slots[slot])
        replies.write(json.dumps(wrong).encode() + b"\n")
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
