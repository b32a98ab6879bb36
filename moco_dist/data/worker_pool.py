"""Processes that decode images for the training, and the memory they share with it."""

from __future__ import annotations

import atexit
import fcntl
import json
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

import numpy as np
import torch
from torch import Tensor

from moco_dist.data.image_file import Place, Recipe
from moco_dist.data.image_worker import IGNORED
from moco_dist.distributed import peers
from moco_dist.errors import ConfigError, DataError, shown

# Bytes of a piece of shared memory; only what is written to needs memory.
SLOT_BYTES = 2**24
# Bytes of pixels, and images, that make a request: one that is short is a small loss to wait for.
REQUEST_BYTES, REQUEST_IMAGES = 2**21, 64
# Share of runtime.timeout_seconds that an image may take: it is named before the others give up.
SHARE_OF_TIMEOUT = 0.8
# Bytes of requests that a worker has before it (Linux gives a pipe no more); else a write waits.
PIPE_BYTES = 2**20


@dataclass
class Ticket:
    """A request on its way, and where its pixels will lie."""

    places: Sequence[Place]
    # (images, views, channels, size, size)
    shape: tuple[int, ...]
    worker: int
    slot: int
    done: bool = False
    # What is wrong with an image of it.
    wrong: str = ""
    abandoned: bool = False


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    # In the order in which they are done.
    tickets: deque[Ticket] = field(default_factory=deque)
    received: bytes = b""


def default_workers() -> int:
    """Return how many cores there are for each process of a run on this machine, at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def images_of_request(recipe: Recipe) -> int:
    """Return how many images a request holds; ConfigError for those too large for one."""
    each = max(1, len(recipe.views)) * recipe.channels * recipe.size**2
    if each > SLOT_BYTES:
        limit = int((SLOT_BYTES / 6) ** 0.5)
        raise ConfigError(
            f"{recipe.size} pixels a side are too many to be streamed; use data.size and "
            f"views.size of {limit} or less"
        )
    return min(REQUEST_IMAGES, max(1, REQUEST_BYTES // each))


class WorkerPool:
    """The workers of one process of a run; they start with the first request."""

    def __init__(self, workers: int) -> None:
        self.size = workers or default_workers()
        self._workers: list[_Worker] = []
        self._replies = selectors.DefaultSelector()
        self._memory = -1
        self._slots: list[mmap.mmap] = []
        self._free: list[int] = []

    def submit(self, places: Sequence[Place], recipe: Recipe, numbers: Tensor | None) -> Ticket:
        """Ask for what `recipe` says of the images at `places`; return at once.

        `numbers` are rows of `views.crop_numbers`, float64 (images, views, CROP_NUMBERS), if crops
        are cut.
        """
        self._start()
        self._receive(0.0)
        number = min(range(self.size), key=lambda n: len(self._workers[n].tickets))
        worker = self._workers[number]
        if not self._free:
            self._add_slot()
        shape = len(places), max(1, len(recipe.views)), recipe.channels, recipe.size, recipe.size
        ticket = Ticket(places, shape, number, self._free.pop())
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
        """Wait for a request, return its pixels, uint8 `ticket.shape`, not copied.

        They are there until `release`. DataError names an image that can't be read, a worker that
        died, and an image that takes too long.
        """
        began, most = time.monotonic(), SHARE_OF_TIMEOUT * peers.me.timeout
        while not ticket.done:
            self._receive(1.0)
            if time.monotonic() - began > most:
                process = self._workers[ticket.worker].process
                raise _passing(
                    f"no data for {most:g} s: the data worker with pid {process.pid} is "
                    f"still at {_range(self._workers[ticket.worker].tickets[0])}; check the "
                    "disk or file system (df, dmesg), or raise runtime.timeout_seconds"
                )
        if ticket.wrong:
            raise DataError(ticket.wrong)
        count = int(np.prod(ticket.shape))
        memory = torch.frombuffer(self._slots[ticket.slot], dtype=torch.uint8, count=count)
        return memory.view(ticket.shape)

    def release(self, ticket: Ticket) -> None:
        """Give back a request's memory, at once or when its worker has done with it."""
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
        if hasattr(os, "memfd_create"):  # memory that belongs to no file system with a limit
            self._memory = os.memfd_create("moco_dist")
        else:
            with tempfile.TemporaryFile() as file:
                self._memory = os.dup(file.fileno())
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "moco_dist.data.image_worker"]
        # They start with the signals blocked, and ignore them from then on.
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
        """Note which requests are done; wait for one up to `seconds`."""
        for key, _ in self._replies.select(seconds):
            worker: _Worker = key.data
            received = os.read(key.fd, 2**16)
            if not received:
                self._lost(worker)
            *lines, worker.received = (worker.received + received).split(b"\n")
            for line in lines:
                ticket = worker.tickets.popleft()
                ticket.done, ticket.wrong = True, json.loads(line)
                if ticket.abandoned:
                    self._free.append(ticket.slot)

    def _lost(self, worker: _Worker) -> None:
        """Raise DataError: a worker has ended."""
        status = worker.process.wait()
        by = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        where = f" at {_range(worker.tickets[0])}" if worker.tickets else ""
        memory = " (a lack of memory, most likely)" if status == -signal.SIGKILL else ""
        raise _passing(
            f"the data worker with pid {worker.process.pid} was ended {by}{memory}{where}; the "
            "same command resumes from the last checkpoint; fewer data.workers need less memory"
        )


def _passing(sentence: str) -> DataError:
    """Return an error of the machine, not of the data: the same command may well succeed."""
    error = DataError(sentence)
    error.again = True
    return error


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None, "made with pipes"
    return pipe


def _range(ticket: Ticket) -> str:
    first = shown(ticket.places[0], 4096)
    return first if len(ticket.places) == 1 else f"{len(ticket.places)} images from {first} on"
