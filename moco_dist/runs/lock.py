"""One writer for each run directory, on local and shared file systems.

The lock is flock on the file `.lock`, and a record in it of who holds it, rewritten every few
seconds: some file systems have no flock, and with others it ends at the edge of the machine.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from moco_dist.distributed.machine import BOOT
from moco_dist.errors import InUseError, OutputError

logger = logging.getLogger(__name__)

HEARTBEAT = 5.0  # seconds between two writings of the record
STALE = 30.0  # seconds without one after which an owner on another machine counts as gone
SETTLE = 0.5  # seconds after which starters without flock have seen each other's record
SIZE = 1024  # bytes, always the same: a reader never meets the end of a longer, older record
FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
TRIES, PAUSE = 20, 0.05  # another starter holds flock for moments only, to read the record


@dataclass(frozen=True)
class _Record:
    host: str = ""
    boot: str = ""
    pid: int = 0
    started: int = 0
    job: str = ""
    token: str = ""
    since: int = 0
    flock: bool = False
    beat: int = 0


class RunLock:
    """The sole right to write to a run directory, from here to `release` or the process's end.

    Raises InUseError if another process has it, OutputError if that can't be found out. A forked
    child does not hold it: a worker that outlives the run keeps nothing locked.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._path, self._descriptor = directory, directory / ".lock", -1
        self._tries, self._watched = 0, (0.0, _Record())
        pid, job = os.getpid(), os.environ.get("SLURM_JOB_ID", "")[:32]
        who = (socket.gethostname()[:64], BOOT, pid, _started(pid), job)
        self._record = _Record(*who, secrets.token_hex(8), int(time.time()))
        self._lost, self._stop = "", threading.Event()  # `_lost` tells who has taken it meanwhile
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        try:
            self._acquire()
        except BaseException as error:
            self._close()
            if isinstance(error, OSError):
                raise OutputError(
                    f"{self._path}: must be a plain file that can be locked "
                    f"({error.strerror or error}); free or remove it, or choose output=FOLDER"
                ) from error
            raise
        self._thread.start()

    def check(self) -> None:
        """Raise InUseError if another process has taken the directory meanwhile."""
        with suppress(OSError):  # one that matters also stops what is to be written
            if self._descriptor >= 0 and not self._lost:
                owner = None if self._replaced() else _read(self._descriptor)
                if owner is None or owner.token != self._record.token:
                    self._lost = self._in_use(owner)
        if self._lost:
            raise InUseError(self._lost)

    def release(self) -> None:
        """Leave the directory to others; nothing happens if that has been done."""
        if self._descriptor >= 0:
            self._stop.set()
            self._thread.join()
            with suppress(InUseError, OSError):
                self.check()
                os.ftruncate(self._descriptor, 0)
            self._close()

    def _acquire(self) -> None:
        while pause := self._attempt():
            # Opened anew for each attempt: only then does NFS ask for the current content, and
            # it must not be opened beside a lock, which closing the other descriptor could end.
            self._close()
            time.sleep(pause)
        self._write()
        if not self._record.flock:
            time.sleep(SETTLE)
            self.check()

    def _attempt(self) -> float:
        """Try to get the lock; return 0 if it is ours, else the seconds until the next attempt."""
        self._descriptor = os.open(self._path, FLAGS, 0o666)
        _open.add(self)
        blocked, flock = False, True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            blocked, flock = isinstance(error, BlockingIOError), False
            if not blocked and error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
        owner, mine = _read(self._descriptor), self._record
        here = owner is not None and (owner.host, owner.boot) == (mine.host, mine.boot)
        alive = here and owner is not None and _started(owner.pid) in (0, owner.started)
        # A lock on a file that was removed meanwhile would keep nobody out.
        if blocked or not os.path.lexists(self._path) or self._replaced():
            self._tries += 1
            if (blocked and alive) or self._tries == TRIES:
                raise InUseError(self._in_use(owner))
            return PAUSE
        self._tries, self._record = 0, replace(mine, flock=flock)
        # An owner that had flock on this machine is gone, or we would not have it.
        if owner is None or (here and ((owner.flock and flock) or not alive)):
            return 0
        now = time.monotonic()
        since, first = self._watched = self._watched if self._watched[0] else (now, owner)
        if here or owner != first:
            raise InUseError(self._in_use(owner))
        if now - since < STALE:
            return HEARTBEAT / 2
        logger.warning("%s: taken over from %s, now gone", self._directory, self._name(owner))
        return 0

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            with suppress(InUseError, OSError):  # a full disk may have room at the next beat
                self.check()
                self._record = replace(self._record, beat=self._record.beat + 1)
                self._write()

    def _write(self) -> None:
        os.pwrite(self._descriptor, json.dumps(asdict(self._record)).encode().ljust(SIZE), 0)
        os.fsync(self._descriptor)

    def _replaced(self) -> bool:
        there = os.stat(self._path, follow_symlinks=False)
        return not os.path.samestat(there, os.fstat(self._descriptor))

    def _in_use(self, owner: _Record | None) -> str:
        who = self._name(owner) if owner else "another process"
        way_out = "wait for it, end it, or choose name=... for another run"
        return f"{self._directory} is in use by {who}; {way_out}"

    def _name(self, owner: _Record) -> str:
        return _name(owner, os.fstat(self._descriptor).st_mtime)

    def _close(self) -> None:
        _open.discard(self)
        descriptor, self._descriptor = self._descriptor, -1
        with suppress(OSError):  # not open, or a write that NFS had put off
            os.close(descriptor)


class Owner(NamedTuple):
    """Who holds a run directory, or held it and left no word."""

    name: str
    pid: int
    alive: bool


def owner(directory: Path) -> Owner | None:
    """Return who the lock of a run directory names, None for nobody; for readers, it only looks."""
    try:
        descriptor = os.open(directory / ".lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found, beat = _read(descriptor), os.fstat(descriptor).st_mtime
    except OSError:
        return None
    finally:
        os.close(descriptor)
    if found is None:
        return None
    if (found.host, found.boot) == (socket.gethostname()[:64], BOOT):
        alive = _started(found.pid) in (0, found.started)
    else:  # twice the time: the clock is another machine's
        alive = time.time() - beat < 2 * STALE
    return Owner(_name(found, beat), found.pid, alive)


def _name(owner: _Record, seen: float) -> str:
    job = f"Slurm job {owner.job}, " if owner.job else ""
    ago = f"started {_ago(owner.since)}, seen {_ago(seen)}"
    return f"process {owner.pid} on {owner.host} ({job}{ago})"


def _read(descriptor: int) -> _Record | None:
    for _ in range(3):  # the owner may be writing at this moment
        with suppress(AttributeError):  # macOS
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # NFS's copy may be old
        if not (content := os.pread(descriptor, SIZE, 0).strip(b"\0 ")):
            return None
        with suppress(ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            values = json.loads(content).items()
            owner = _Record(**{key: type(getattr(_Record, key))(v) for key, v in values})
            sound = 0 < owner.pid < 2**31 and owner.since < 2**40
            if sound and owner.token and f"{owner.host}{owner.job}".isprintable():
                return owner
        time.sleep(PAUSE)
    return None


def _started(pid: int) -> int:
    """Return when a process started, in clock ticks; 0 if that is hidden, -1 if it is gone."""
    with suppress(OSError):
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return -1 if state in "ZX" else int(others[18])
    try:
        os.kill(pid, 0)
    except OSError as error:
        return -1 if isinstance(error, ProcessLookupError) else 0
    return 0


def _ago(moment: float) -> str:
    seconds = max(0, int(time.time() - moment))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def _leave_to_parent() -> None:
    for lock in list(_open):
        lock._close()


_open: set[RunLock] = set()
os.register_at_fork(after_in_child=_leave_to_parent)
