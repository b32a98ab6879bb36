"""Services beside metrics.jsonl, each fed by a thread of its own: training never waits for one.

metrics.jsonl is the truth. A start of a run first gives a service the lines that it lacks of those
that hold, up to the checkpoint, then each new one. A service gets one row for each step, and only
when it is complete: when a later step has begun, or at the end.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from moco_dist.distributed import peers

logger = logging.getLogger(__name__)

# Seconds that the end of a run waits for a service: at its own end, and when it was stopped.
END_SECONDS, HURRY_SECONDS, KILL_SECONDS = 60.0, 8.0, 3.0


class Service(Protocol):
    """Where rows of metrics go; all but `kill` are called in one thread."""

    name: str
    # Whether each start gives it the whole history anew.
    anew: bool

    def begin(self) -> int:
        """Start; return the first step that the service wants."""

    def row(self, step: int, metrics: Mapping[str, float], known: bool) -> None:
        """Take what holds after `step` steps, in their order, each once; some is `known`."""

    def conclude(self, results: Mapping[str, float], encoder: Path | None) -> None:
        """Take the final figures, and the folder of an encoder to upload."""

    def finish(self, status: int) -> None:
        """Bring everything to its place; `status` is the exit state of the run."""

    def kill(self) -> None:
        """End it, from any thread, whatever it is doing; return at once."""

    def leave(self) -> None:
        """Clean up after it has failed or was killed."""


class Feed:
    """The thread that feeds one service from metrics.jsonl and from `log`."""

    def __init__(self, service: Service, path: Path) -> None:
        self.service, self.path = service, path
        # The lines of the starts before this one; later ones come by `log`.
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
            own = dict(metrics)
            self._work.put(lambda: self._add(step, own))

    def conclude(self, results: Mapping[str, float], encoder: Path | None) -> None:
        """Hand on the final figures; return at once."""
        self._work.put(self._flush)
        self._work.put(lambda: self.service.conclude(results, encoder))

    def close(self, status: int, complete: bool, hurry: bool) -> None:
        """Finish, in bounded time; the newest row goes too, if it is `complete` or goes again."""
        self._work.put(lambda: self._finish(status, complete))
        end = time.monotonic() + (HURRY_SECONDS if hurry else END_SECONDS)
        while self._thread.is_alive() and time.monotonic() < end:
            self._thread.join(0.25)
            peers.me.mark(peers.me.step, f"finishing {self.service.name}")
        if self._thread.is_alive():
            self._fail("does not come to its end")
            self.service.kill()
            self._thread.join(KILL_SECONDS)

    def _run(self) -> None:
        try:
            self._first = self.service.begin()
            for step, metrics in _lines(self.path, self._before):
                self._add(step, metrics)
            while not self._ended:
                self._work.get()()
        except BaseException as error:  # whatever a library raises, the training goes on
            reason = " ".join(str(error).split()) or type(error).__name__
            self._fail(reason[:300])
            self.service.kill()
            self.service.leave()

    def _fail(self, reason: str) -> None:
        if not self.dead:
            self.dead = True
            logger.warning(
                "%s: %s; the run and its metrics.jsonl go on without it", self.service.name, reason
            )

    def _add(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._row and self._row[0] < step:
            self._flush()
        row = self._row[1] if self._row else {}
        self._row = step, row | dict(metrics)

    def _flush(self) -> None:
        if self._row:
            self.service.row(*self._row, known=self._row[0] < self._first)
        self._row = None

    def _finish(self, status: int, complete: bool) -> None:
        if complete or self.service.anew:
            self._flush()
        self.service.finish(status)
        self._ended = True


def _lines(path: Path, size: int) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and metrics of the lines in the first `size` bytes of metrics.jsonl."""
    with path.open("rb") as file:
        while file.tell() < size:
            line: dict[str, Any] = {}
            with suppress(ValueError):
                line = json.loads(file.readline())
            step = line.pop("step", None)
            line.pop("time", None)
            if step is not None:
                yield int(step), line
