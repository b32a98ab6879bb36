"""What the processes of a run tell one another besides tensors: errors, and who is alive.

Each process posts a heartbeat on a board every half second. When a collective fails, the others
read there which process died, stalled or failed, where it ran and at which step. A collective on
GPUs does not fail, but never returns: the thread that posts the heartbeat reads the board instead
once the main thread has stood still for some seconds.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from moco_dist.distributed import comms
from moco_dist.distributed.machine import BOOT
from moco_dist.errors import PeerError, UserError

Result = TypeVar("Result")

BEAT_SECONDS = 0.5
SILENT_SECONDS = 3.0  # without a heartbeat, after which a process is gone if a collective failed
STILL_SECONDS = 3.0  # of the main thread, after which it may wait for a process that is gone
# Without a heartbeat of a process of another machine, after which the others no longer wait for it.
CUT_OFF_SECONDS = 30.0
NEAR = 64  # processes in a run, up to which each looks after all of its machine


def _give_up(error: PeerError) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(error.exit_status)


class Peers:
    """The heartbeat of this process and its view of the others; there is one object."""

    def __init__(self) -> None:
        self.step, self.doing = 0, "starting"
        self.timeout = 300.0
        self.training = False
        self._moved = time.monotonic()
        self._marks = self._beats = self._meetings = 0
        self._beaten = -BEAT_SECONDS
        # The process that `blame` found, and whether that one has reported its error to the user.
        self._blamed, self._told = -1, False
        self._boards = threading.local()  # one for each thread
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        # Called by the heartbeat's thread with the reason why the main thread waits in vain.
        self.give_up: Callable[[PeerError], None] = _give_up
        # Held by the thread that ends the process.
        self.ending = threading.RLock()
        # First heartbeats of processes that may run on this machine.
        self._near: dict[int, Any] = {}
        # The last heartbeat of the next process, and how many looks it has been the same.
        self._next: tuple[Any, int] = None, 0

    def join(self, timeout: float) -> None:
        """Start the heartbeat; `timeout` is the longest stall, in seconds."""
        self.timeout = timeout
        if comms.world_size() > 1 and self._board is None:
            self._boards.mine = comms.Board()
            self._beat()
            board = comms.Board()
            self._thread = threading.Thread(target=self._keep_beating, args=[board], daemon=True)
            self._thread.start()

    @property
    def _board(self) -> comms.Board | None:
        board: comms.Board | None = getattr(self._boards, "mine", None)
        return board

    def part(self) -> None:
        """Stop the heartbeat, whose thread must not outlive the interpreter."""
        self._post(f"done/{comms.rank()}", "")
        self._ended.set()
        if self._thread:
            self._thread.join()

    def mark(self, step: int, doing: str) -> None:
        """Note that `step` steps are done, and what this process is `doing` now."""
        self.step, self.doing = step, doing
        self._marks += 1
        self._moved = time.monotonic()

    def leave(self, reason: str | None, speaks: bool) -> None:
        """Tell the others that this process ends, for its own `reason` or None for theirs.

        If it `speaks`, it reports the reason to the user, and the others need not.
        """
        if reason:
            self._post(f"fault/{comms.rank()}", f"!{reason}" if speaks else reason)
            self._post("lost", json.dumps([comms.rank(), "failed"]))
        else:
            self._post(f"left/{comms.rank()}", "")

    def meet(self) -> None:
        """Wait for all processes, however long they work, as long as they are alive."""
        if not self._board:
            return
        self._meetings += 1
        everyone = range(comms.world_size())
        keys = [f"meeting {self._meetings}/{rank}" for rank in everyone]
        looked, pause = time.monotonic(), 0.001
        beats: dict[int, tuple[Any, float]] = {}
        try:
            self._board.post(keys[comms.rank()], "")
            while not self._board.has(keys):
                if time.monotonic() - looked > 1:
                    looked = time.monotonic()
                    missing = [r for r in everyone if not self._board.has([keys[r]])]
                    self._look_after(missing, beats)
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
                self._moved = time.monotonic()
        except RuntimeError as error:
            raise PeerError(self.blame()) from error

    def blame(self) -> str:
        """Return a sentence that names the process that made a collective fail."""
        others = [rank for rank in range(comms.world_size()) if rank != comms.rank()]
        before = {rank: self._read_beat(rank) for rank in others}
        deadline = time.monotonic() + SILENT_SECONDS
        while time.monotonic() < deadline:
            for rank in others:
                if sentence := self._known_fault(rank, before[rank]):
                    return sentence
            time.sleep(0.1)
            with suppress(RuntimeError):
                self._beat()  # the thread that does so otherwise may be the one that is here
        now = {rank: self._read_beat(rank) for rank in others}
        place = f"at step {self.step} ({self.doing})"
        if self._board is None or not any(now.values()):
            return f"the processes lost one another {place}, process 0 most likely died; {RESUMES}"
        for rank in others:
            if now[rank] == before[rank] and not self._has_left(rank):
                return self._sentence(rank, now[rank], "has given no sign of life")
        marks = {rank: beat["marks"] + beat["calls"] for rank, beat in now.items() if beat}
        last = min(marks, key=lambda rank: marks[rank])
        if marks[last] < self._marks + comms.calls:
            return self._sentence(last, now[last], f"kept the others waiting for {self.timeout} s")
        return f"process {comms.rank()} ({socket.gethostname()}) lost the others {place}; {RESUMES}"

    def speaks(self) -> bool:
        """Return whether this is the first of the remaining processes, which tells the user."""
        before = [rank for rank in range(comms.rank()) if rank != self._blamed]
        here = (self._has_left(r) or self._gone(self._read_beat(r)) is None for r in before)
        return not any(here) and not self._told

    def _known_fault(self, rank: int, beat: Any) -> str | None:
        if reason := self._posted(f"fault/{rank}"):
            self._told = reason.startswith("!")
            failed = f"failed: {reason.removeprefix('!')}"
            return self._sentence(rank, self._read_beat(rank), failed)
        if (what := self._gone(beat)) and not self._has_ended(rank):
            return self._sentence(rank, beat, what)
        return None

    def _waits_in_vain(self) -> str | None:
        """Return a sentence that names a process that will never come to a collective, if any.

        Called after each heartbeat while the main thread stands still. It asks the board for
        little, which serves hundreds of processes.
        """
        if told := self._posted("lost"):
            rank, what = json.loads(told)
            beat = self._read_beat(rank)
            return self._known_fault(rank, beat) or self._sentence(rank, beat, what)
        self._near = self._near or self._read_near()
        for rank, first in self._near.items():
            if self._gone(first) == "died" and not self._has_ended(rank):
                self._post("lost", json.dumps([rank, "died"]))
                return self._known_fault(rank, self._read_beat(rank) or first)
        return self._cut_off() if self.training else None

    def _cut_off(self) -> str | None:
        """Return a sentence if the next process has given no sign of life for long."""
        rank = (comms.rank() + 1) % comms.world_size()
        beat, (before, looks) = self._read_beat(rank), self._next
        # Looks are counted, and no seconds: this process may itself have been stopped.
        self._next = beat, looks + 1 if beat == before else 0
        silent = self._next[1] * BEAT_SECONDS
        if silent < min(CUT_OFF_SECONDS, self.timeout) or self._has_ended(rank):
            return None
        if beat is None:
            return self.blame()
        if self._gone(beat):
            return None  # stopped, which it may be as long as `timeout`
        what = f"has given no sign of life for {silent:g} s"
        self._post("lost", json.dumps([rank, what]))
        return self._sentence(rank, beat, what)

    def _read_near(self) -> dict[int, Any]:
        """Return heartbeats of the processes of this machine, as far as they are known."""
        ranks = range(comms.world_size())
        if len(ranks) > NEAR:
            first = comms.rank() - comms.local_rank()
            size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            ranks = ranks[first : first + size]
        beats = {rank: self._read_beat(rank) for rank in ranks if rank != comms.rank()}
        return beats if all(beats.values()) else {}

    def _post(self, key: str, text: str) -> None:
        with suppress(RuntimeError):
            if self._board:
                self._board.post(key, text)

    def _gone(self, beat: Any) -> str | None:
        """Return what happened to a process of this machine, None if it runs or is elsewhere."""
        if not beat or (beat["host"], beat["boot"]) != (socket.gethostname(), BOOT):
            return None
        try:
            state = Path(f"/proc/{beat['pid']}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            state = "Z" if Path("/proc/self/stat").exists() else "R"
        return {"Z": "died", "X": "died", "T": "is stopped (SIGSTOP)"}.get(state)

    def _look_after(self, missing: list[int], beats: dict[int, tuple[Any, float]]) -> None:
        """Raise PeerError if one of the `missing` processes will not come."""
        for rank in missing:
            beat = self._read_beat(rank)
            if rank not in beats or beats[rank][0] != beat:
                beats[rank] = beat, time.monotonic()
            silent = time.monotonic() - beats[rank][1]
            if silent > self.timeout:
                raise PeerError(self._sentence(rank, beat, "has given no sign of life"))
            died = silent > SILENT_SECONDS and self._gone(beat) == "died"
            if sentence := self._known_fault(rank, beat if died else None):
                raise PeerError(sentence)

    def _posted(self, key: str) -> str | None:
        with suppress(RuntimeError):
            return self._board.read(key) if self._board else None
        return None

    def _has_left(self, rank: int) -> bool:
        return self._posted(f"left/{rank}") is not None

    def _has_ended(self, rank: int) -> bool:
        """Return whether a process has ended in order."""
        return self._has_left(rank) or self._posted(f"done/{rank}") is not None

    def _read_beat(self, rank: int) -> Any:
        text = self._posted(f"beat/{rank}")
        return json.loads(text) if text else None

    def _sentence(self, rank: int, beat: Any, what: str) -> str:
        self._blamed = rank
        if beat is None:
            return f"process {rank} {what}; {RESUMES}"
        where = f"(host {beat['host']}, pid {beat['pid']})"
        # All are in the same step, and the heartbeat may be half a second old.
        step, doing = max((beat["step"], beat["doing"]), (self.step, self.doing))
        return f"process {rank} {where} {what}, at step {step}, {doing}; {RESUMES}"

    def _beat(self) -> None:
        """Post a heartbeat unless there was one just now."""
        if not self._board or time.monotonic() < self._beaten + BEAT_SECONDS / 2:
            return
        self._beaten = time.monotonic()
        self._beats += 1
        sign = {
            "beats": self._beats,
            "host": socket.gethostname(),
            "boot": BOOT,
            "pid": os.getpid(),
            "step": self.step,
            "doing": self.doing,
            "marks": self._marks,
            "calls": comms.calls,
        }
        self._board.post(f"beat/{comms.rank()}", json.dumps(sign))

    def _keep_beating(self, board: comms.Board) -> None:
        self._boards.mine = board
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(RuntimeError):
                self._beat()
            sentence, still = None, time.monotonic() - self._moved
            if self.training and still > self.timeout + 10:
                sentence = self.blame()
            elif still > STILL_SECONDS and (self.training or self.give_up is not _give_up):
                sentence = self._waits_in_vain()
            if sentence and not self._ended.is_set():
                self.give_up(PeerError(sentence))


RESUMES = "all processes end, and the same command resumes from the last checkpoint"

me = Peers()


def together(work: Callable[[], Result]) -> Result:
    """Return `work()`, however long it takes; a UserError on any process is raised on all."""
    result: Result | None = None
    error: UserError | None = None
    try:
        result = work()
    except UserError as raised:
        error = raised.on_all()
    me.meet()
    for first in comms.gather_objects(error):
        if first is not None:
            raise first
    return result  # type: ignore[return-value]  # None only where work() returned it


def from_main(work: Callable[[], Result]) -> Result:
    """Return on every process what `work()` returns on process 0, the only one to call it."""
    mine = together(lambda: work() if comms.is_main() else None)
    first: Result = comms.gather_objects(mine)[0]
    return first


def same_everywhere(
    what: str, value: Any, fix: str = "start all of them with the same command and files"
) -> None:
    """Raise UserError, naming values, keys of dicts and processes, where `value` differs."""
    values = comms.gather_objects((socket.gethostname(), value))
    if all(other == value for _, other in values):
        return
    if isinstance(value, dict):
        keys = sorted(set().union(*(each for _, each in values)))
        tables = {key: [each.get(key) for _, each in values] for key in keys}
        parts = [f"{k} is {_shared(v)}" for k, v in tables.items() if any(x != v[0] for x in v)]
    else:
        parts = [f"it is {_shared([each for _, each in values])}"]
    hosts = ", ".join(f"{rank} on {host}" for rank, (host, _) in enumerate(values))
    differs = f"differs between the processes: {'; '.join(parts)} (process {hosts})"
    raise UserError(f"{what} {differs}; {fix}").on_all()


def _shared(values: list[Any]) -> str:
    """Return 'a on process 0, 2 and b on process 1' for [a, b, a]."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(str(rank))
    return " and ".join(f"{value} on process {', '.join(r)}" for value, r in ranks.items())
