"""Worker processes that decode images for training, and the memory they share with it."""

from __future__ import annotations

import atexit
import fcntl
import json
import math
import mmap
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from moco_dist.data.image_file import Place, Recipe
from moco_dist.data.image_worker import IGNORED, Answer
from moco_dist.distributed import peers
from moco_dist.errors import ConfigError, DataError, shown

# Bytes of a piece of shared memory, which occupies only what is written.
SLOT_BYTES = 2**24
# Bytes of pixels, and images, of a request, so small that waiting for one costs little.
REQUEST_BYTES, REQUEST_IMAGES = 2**21, 64
# Share of runtime.timeout_seconds after which an image is named, before other processes time out.
SHARE_OF_TIMEOUT = 0.8
# Bytes of requests that can queue for a worker, Linux's limit for a pipe; beyond it a write waits.
PIPE_BYTES = 2**20


@dataclass
class Ticket:
    """A request, and the slot of its pixels: uint8 (images, views, channels, size, size)."""

    places: Sequence[Place]
    shape: tuple[int, ...]
    worker: int
    slot: int
    done: bool = False
    # Once it is done: what is wrong.
    answer: Answer = field(default_factory=lambda: Answer([]))
    abandoned: bool = False


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    # In the order of their completion.
    tickets: deque[Ticket] = field(default_factory=deque)
    received: bytes = b""


def default_workers() -> int:
    """Return the number of this machine's cores per process of the run, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def images_of_request(recipe: Recipe) -> int:
    """Return how many images a request holds; ConfigError if one image is too large."""
    each = math.prod(recipe.shape)
    if each > SLOT_BYTES:
        limit = int((SLOT_BYTES / 6) ** 0.5)
        raise ConfigError(
            f"{recipe.size} pixels a side are too many for streaming; use data.size and "
            f"views.size of {limit} or less"
        )
    return min(REQUEST_IMAGES, max(1, REQUEST_BYTES // each))


class WorkerPool:
    """The workers of one process of a run, which start with the first request."""

    def __init__(self, workers: int) -> None:
        self.size = workers or default_workers()
        self._workers: list[_Worker] = []
        self._replies = selectors.DefaultSelector()
        self._memory = -1
        self._slots: list[mmap.mmap] = []
        self._free: list[int] = []

    def submit(self, places: Sequence[Place], recipe: Recipe, numbers: Tensor | None) -> Ticket:
        """Request what `recipe` cuts from the images at `places`, without waiting.

        Crops need `numbers`, rows of `views.crop_numbers`: float64 (images, views, CROP_NUMBERS).
        """
        self._start()
        self._receive(0.0)
        number = min(range(self.size), key=lambda n: len(self._workers[n].tickets))
        worker = self._workers[number]
        if not self._free:
            self._add_slot()
        ticket = Ticket(places, (len(places), *recipe.shape), number, self._free.pop())
        content = b"" if numbers is None else numbers.numpy().tobytes()
        request = {"slot": ticket.slot, "recipe": recipe, "places": places, "bytes": len(content)}
        worker.tickets.append(ticket)
        pipe = _pipe(worker.process.stdin)
        try:
            pipe.write(json.dumps(request).encode() + b"\n" + content)
            pipe.flush()
        except BrokenPipeError:
            self._lost(worker)
        return ticket

    def fetch(self, ticket: Ticket) -> Tensor:
        """Wait for a request; return its pixels, which are valid until `release`.

        Those of the images in `ticket.answer.bad` are undefined. Raises DataError for a fault of
        the machine, a dead worker or an image that takes too long.
        """
        began, most = time.monotonic(), SHARE_OF_TIMEOUT * peers.me.timeout
        while not ticket.done:
            self._receive(1.0)
            if time.monotonic() - began > most:
                process = self._workers[ticket.worker].process
                raise _passing(
                    f"no data for {most:g} s: the data worker with pid {process.pid} is "
                    f"still decoding {_range(self._workers[ticket.worker].tickets[0])}; check the "
                    "disk or file system (df, dmesg), or raise runtime.timeout_seconds"
                )
        if ticket.answer.fault:
            raise DataError(ticket.answer.fault)
        count = math.prod(ticket.shape)
        memory = torch.frombuffer(self._slots[ticket.slot], dtype=torch.uint8, count=count)
        return memory.view(ticket.shape)

    def release(self, ticket: Ticket) -> None:
        """Release a request's memory, at once or when its worker is done with it."""
        if ticket.done:
            self._free.append(ticket.slot)
        ticket.abandoned = not ticket.done

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            _pipe(worker.process.stdin).close()  # they end with their input
        for worker in self._workers:
            try:
                worker.process.wait(1.0)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
            _pipe(worker.process.stdout).close()
        self._workers.clear()
        self._replies.close()
        self._replies = selectors.DefaultSelector()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1
        self._slots.clear()
        self._free.clear()

    def pids(self) -> list[int]:
        """Return the process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def _start(self) -> None:
        if self._workers:
            return
        if hasattr(os, "memfd_create"):  # memory outside any file system's limit
            self._memory = os.memfd_create("moco_dist")
        else:
            with tempfile.TemporaryFile() as file:
                self._memory = os.dup(file.fileno())
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "moco_dist.data.image_worker"]
        # Workers start with the signals blocked until they ignore them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
        try:
            for _ in range(self.size):
                process = subprocess.Popen(
                    [*command, str(self._memory), str(SLOT_BYTES)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    pass_fds=[self._memory],
                    env={**os.environ, "PYTHONPATH": path},
                )
                worker = _Worker(process)
                self._workers.append(worker)
                self._replies.register(_pipe(process.stdout), selectors.EVENT_READ, worker)
                with suppress(OSError, AttributeError):
                    fcntl.fcntl(_pipe(process.stdin), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        atexit.register(self.close)

    def _add_slot(self) -> None:
        os.ftruncate(self._memory, (len(self._slots) + 1) * SLOT_BYTES)
        slot = mmap.mmap(self._memory, SLOT_BYTES, offset=len(self._slots) * SLOT_BYTES)
        self._free.append(len(self._slots))
        self._slots.append(slot)

    def _receive(self, seconds: float) -> None:
        """Mark requests that are done, waiting up to `seconds` for one."""
        for key, _ in self._replies.select(seconds):
            worker: _Worker = key.data
            received = os.read(key.fd, 2**16)
            if not received:
                self._lost(worker)
            *lines, worker.received = (worker.received + received).split(b"\n")
            for line in lines:
                ticket = worker.tickets.popleft()
                ticket.done, ticket.answer = True, Answer(*json.loads(line))
                if ticket.abandoned:
                    self._free.append(ticket.slot)

    def _lost(self, worker: _Worker) -> None:
        """Raise DataError for a worker that has ended."""
        status = worker.process.wait()
        by = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        where = f" at {_range(worker.tickets[0])}" if worker.tickets else ""
        memory = " (most likely for lack of memory)" if status == -signal.SIGKILL else ""
        raise _passing(
            f"the data worker with pid {worker.process.pid} was ended {by}{memory}{where}; the "
            "same command resumes from the last checkpoint; fewer data.workers need less memory"
        )


def _passing(sentence: str) -> DataError:
    """Return an error of the machine, not of the data, after which a new launch may succeed."""
    error = DataError(sentence)
    error.again = True
    return error


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "made with pipes"
    return pipe


def _range(ticket: Ticket) -> str:
    first = shown(ticket.places[0], 4096)
    return first if len(ticket.places) == 1 else f"{len(ticket.places)} images from {first} on"
