"""Requests to end a run early: signals, a file STOP in the run directory, a time limit.

A request is a number that the processes agree on between two steps (`agreement.py`). Signals reach
a thread through a pipe, so that a second signal, or the end of the grace period, ends a process
even if its main thread hangs in a collective.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from moco_dist.errors import InterruptedRunError, PeerError, StoppedError, UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Requests besides the numbers of signals. FAILED: a save in the background, or reading an image.
STOP_FILE, TIME_LIMIT, FAILED = 1001, 1002, 1003
ECHO_SECONDS = 2.0  # in which launchers and Slurm may repeat a signal
MARGIN_SECONDS = 1.0  # that exiting needs besides a step and a save
START_SECONDS = 1.0  # from a signal to the exit during startup, when there is nothing to save
LOOK_SECONDS = 1.0  # between two looks at the run directory


def reason(request: int) -> str:
    """Return a request in words: 'SIGTERM', 'the file STOP'."""
    words = {STOP_FILE: "the file STOP", TIME_LIMIT: "the time limit"}
    return words.get(request) or signal.Signals(request).name


def error(request: int, text: str) -> StoppedError:
    """Return the error that ends a run on a request; `text` says where the run is."""
    kind = InterruptedRunError if request == signal.SIGINT else StoppedError
    stopped = kind(f"stopped by {reason(request)} {text}")
    stopped.again = stopped.again and request != STOP_FILE  # a person made the file
    return stopped


def hangs_up() -> bool:
    """Return whether SIGHUP ends this process: not under nohup, unless its launcher ends it then.

    torchelastic obeys SIGHUP under nohup too: it passes it on, and later kills what is left.
    """
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        return True
    passed_on = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGHUP")
    return "TORCHELASTIC_RUN_ID" in os.environ and "SIGHUP" in passed_on


class StopRequests:
    """The requests to this process; `poll` is cheap enough for each step."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.request = 0
        self.grace = 25.0
        # During startup a signal ends the run where it is: there is nothing to save.
        self.at_once = True
        self.saving = False  # a save may outlast the grace period
        # Where to look for STOP; None on processes other than the first.
        self.directory: Path | None = None
        self.end: float | None = None
        # Seconds from a request to the end: twice a step and a save.
        self.needs = 0.0
        # Called before an error ends the process; waits a limited time for a save in flight.
        self.flush: Callable[[], None] = lambda: None
        # Called when the process ends, from any thread, with the exit status, the sentence, and
        # whether a machine may start the same command again.
        self.on_end: Callable[[int, str, bool], None] = lambda status, text, again: None
        self._first: float | None = None
        self._raised = False
        self._looked = 0.0

    def listen(self) -> None:
        """Handle the signals of this process; call it in the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or hangs_up():
                signal.signal(number, self._in_main_thread)
        threading.Thread(target=self._watch, args=[reader], daemon=True).start()

    def limit(
        self, directory: Path | None, max_hours: float, grace: float, job_end: float | None = None
    ) -> None:
        """Set the grace period, in seconds; with a run directory, look there and at the clock.

        `job_end` is when the job around this process ends, in seconds since 1970.
        """
        self.directory, self.grace = directory, grace
        ends = [self.began + 3600 * max_hours] if max_hours else []
        if job_end is not None:
            ends.append(time.monotonic() + job_end - time.time())
        self.end = min(ends, default=None) if directory else None

    def poll(self) -> int:
        """Return the request, 0 if there is none."""
        now = time.monotonic()
        if self.request:
            return self.request
        if self.end is not None and now + self.needs + MARGIN_SECONDS > self.end:
            self.request = TIME_LIMIT
        elif self.directory and now - self._looked > LOOK_SECONDS:
            self._looked = now
            if (self.directory / "STOP").exists():
                self.request = STOP_FILE
        return self.request

    def raise_at_once(self) -> None:
        """Raise StoppedError for a signal whose exception may have been lost."""
        if self.at_once and self.request:
            raise error(self.request, "before the first step")

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        self.request = self.request or number
        if not self._raised:
            self._raised = True
            self.raise_at_once()

    def _watch(self, reader: int) -> None:
        while True:
            if self._first is not None and self.at_once:
                # The main thread may wait for a process that has ended, and see no exception.
                if time.monotonic() > self._first + START_SECONDS:
                    ended = error(self.request, "before the first step")
                    self._leave(ended, str(ended))
                select.select([], [], [], 0.1)
                continue
            left = None if self._first is None else self._first + self.grace - time.monotonic()
            if left is not None and left <= 0:
                if not self.saving:
                    late = f"still busy {self.grace:g} s after {reason(self.request)}"
                    self._end(PeerError(f"{late}, which is too long"))
                left = 0.2
            if select.select([reader], [], [], left)[0]:
                for number in filter(SIGNALS.__contains__, os.read(reader, 64)):
                    self.request, now = self.request or number, time.monotonic()
                    if self._first is None:
                        self._first = now
                    # A terminal that closes hangs up as often as it likes.
                    elif now - self._first > ECHO_SECONDS and number != signal.SIGHUP:
                        self._end(InterruptedRunError("ended at once by a second signal"))

    def _end(self, error: UserError) -> None:
        saved = "nothing was saved since the last checkpoint, which stands"
        self._leave(error, f"error: {error}: {saved}")

    def _leave(self, error: UserError, shown: str) -> None:
        self.on_end(error.exit_status, str(error), error.again)
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"{shown}\n".encode(errors="backslashreplace"))
        os._exit(error.exit_status)
