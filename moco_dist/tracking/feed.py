"""Services besides metrics.jsonl, each fed by its own thread, so that training never waits.

Each launch first sends a service the lines of metrics.jsonl that it lacks, then each new one. A
service gets one row for each step, once a later step has begun or at the end.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from moco_dist.distributed import peers
from moco_dist.runs import command, record

logger = logging.getLogger(__name__)

# Seconds that a run waits for a service at its end, and when it was stopped.
END_SECONDS, HURRY_SECONDS = 60.0, 8.0


class Service(Protocol):
    """Where rows of metrics go; all methods are called in one thread."""

    name: str
    # Whether each launch sends the whole history again.
    resends: bool

    def begin(self) -> int:
        """Start; return the first step that the service wants."""

    def row(self, step: int, metrics: Mapping[str, float], known: bool) -> None:
        """Log the metrics after `step` steps, in order of steps; the service has `known` ones."""

    def conclude(self, results: Mapping[str, float], encoder: Path | None) -> None:
        """Log the final figures, and upload the encoder in a folder."""

    def finish(self, status: int) -> None:
        """Send or write what is left; `status` is the exit status of the run."""

    def leave(self) -> None:
        """Clean up after a failure."""


class Feed:
    """The thread that feeds one service from metrics.jsonl and from `log`."""

    def __init__(self, service: Service, path: Path) -> None:
        self.service, self.path = service, path
        # Bytes of earlier launches; later lines come through `log`.
        self._before = path.stat().st_size
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._row: tuple[int, dict[str, float]] | None = None
        self._first = 0
        self._ended = self.dead = False
        self._thread = threading.Thread(target=self._run, name=service.name, daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add `metrics` to the row of `step`; return at once."""
        if not self.dead:
            self._work.put(partial(self._add, step, dict(metrics)))

    def conclude(self, results: Mapping[str, float], encoder: Path | None) -> None:
        """Pass on the final figures; return at once."""
        self._work.put(self._flush)
        self._work.put(partial(self.service.conclude, results, encoder))

    def close(self, status: int, complete: bool, hurry: bool) -> None:
        """Finish in bounded time, with the newest row if it is `complete` or will be sent again."""
        self._work.put(partial(self._finish, status, complete))
        end = time.monotonic() + (HURRY_SECONDS if hurry else END_SECONDS)
        while self._thread.is_alive() and time.monotonic() < end:
            self._thread.join(0.25)
            peers.me.mark(peers.me.step, f"finishing {self.service.name}")
        if self._thread.is_alive():
            self._fail("does not finish")
            # Runs before the handlers of the service, which wait.
            atexit.register(command.leave, status)

    def _run(self) -> None:
        try:
            self._first = self.service.begin()
            with self.path.open("rb") as file:
                texts = file.read(self._before).splitlines()
            for line in record.parse(texts):
                line.pop("time", None)
                self._add(line.pop("step"), line)
            while not self._ended:
                self._work.get()()
        except BaseException as error:  # whatever a library raises, the training continues
            reason = " ".join(str(error).split()) or type(error).__name__
            self._fail(reason[:300])
            self.service.leave()

    def _fail(self, reason: str) -> None:
        if not self.dead:
            self.dead = True
            text = "%s: %s; the run and its metrics.jsonl continue without it"
            logger.warning(text, self.service.name, reason)

    def _add(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._row and self._row[0] < step:
            self._flush()
        self._row = step, {**(self._row[1] if self._row else {}), **metrics}

    def _flush(self) -> None:
        if self._row:
            self.service.row(*self._row, known=self._row[0] < self._first)
        self._row = None

    def _finish(self, status: int, complete: bool) -> None:
        if complete or self.service.resends:
            self._flush()
        self.service.finish(status)
        self._ended = True
