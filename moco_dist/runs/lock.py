"""One writer for each run directory, on local and shared file systems.

filelock's SoftFileLease creates `.lease`, the claim; its modification time is the owner's
heartbeat. `.owner` describes the owner in JSON, under the claim's token.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from moco_dist.distributed.machine import BOOT
from moco_dist.errors import InUseError, OutputError
from moco_dist.runs.status import replace

logger = logging.getLogger(__name__)

LEASE, OWNER = ".lease", ".owner"
HEARTBEAT = 5.0  # seconds
STALE = 30.0  # seconds without a heartbeat after which an owner on another machine counts as gone
POLL = 0.2  # seconds between two attempts


class RunLock:
    """The sole right to write to a run directory, until `release` or the end of the process.

    Raises InUseError if another process holds it, OutputError if the claim can't be written. A
    forked child does not hold it: a worker that outlives the run keeps nothing locked.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._path = directory, directory / LEASE
        self._lease = _lease(directory)
        try:
            self._acquire()
            who = {"token": self._lease.token, "host": socket.gethostname(), "boot": BOOT}
            job = {"started": _started(os.getpid()), "job": os.environ.get("SLURM_JOB_ID", "")}
            replace(directory / OWNER, json.dumps(who | job))
        except OSError as error:
            with suppress(OSError):
                self._lease.release()
            raise OutputError(
                f"{self._path}: must be a plain file that can be written "
                f"({error.strerror or error}); free or remove it, or choose output=FOLDER"
            ) from error

    def check(self) -> None:
        """Raise InUseError if this process has lost its claim."""
        lost = self._lease.compromise is not None
        with suppress(OSError):  # a fault that matters also stops what is to be written
            if self._lease.is_locked and not lost:
                found = self._lease.owner
                lost = found.token != self._lease.token if found else not self._path.exists()
        if lost:
            taker = owner(self._directory)
            raise InUseError(
                self._in_use(taker)
                if taker
                else f"{self._path} was removed, so this run no longer has {self._directory} to "
                "itself; make sure that no other process writes there and start the run again"
            )

    def release(self) -> None:
        """Release the directory; does nothing the second time."""
        with suppress(InUseError, OSError):
            if self._lease.is_locked:
                self.check()
                (self._directory / OWNER).unlink(missing_ok=True)
        with suppress(OSError):
            self._lease.release()

    def _acquire(self) -> None:
        first, end = None, time.monotonic() + STALE
        while True:
            if self._path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            claim, found = _identity(self._path), owner(self._directory)
            first, here = first or claim, found is not None and found.here
            if claim and (claim != first or (found and here and found.alive)):
                raise InUseError(self._in_use(found))
            # filelock can't tell two machines of the same name apart, so it is not asked before.
            if claim and not here and time.monotonic() < end:
                time.sleep(POLL)
                continue
            if claim and found and not here:
                logger.warning("%s: taken over from %s", self._directory, found.name)
            with suppress(Timeout, LeaseSettingsMismatch):
                self._lease.acquire()
                return
            self._remove(claim)

    def _remove(self, claim: tuple[int, int] | None) -> None:
        """Remove the claim of an owner that is gone.

        filelock replaces it by itself where two names can be exchanged, which NFS can't do.
        """
        aside = self._path.with_name(f"{LEASE}.{secrets.token_hex(8)}")
        if claim and _identity(self._path) == claim:
            with suppress(FileNotFoundError):
                self._path.rename(aside)
                if _identity(aside) != claim:  # the claim of a process that was faster
                    with suppress(FileExistsError):
                        os.link(aside, self._path)
                aside.unlink()

    def _in_use(self, found: Owner | None) -> str:
        who = found.name if found else "another process"
        fix = "wait for it, end it, or choose name=... for another run"
        return f"{self._directory} is in use by {who}; {fix}"


class Owner(NamedTuple):
    """The process that holds a run directory, or ended without releasing it."""

    name: str
    pid: int
    alive: bool
    # Whether it is a process of this machine and container.
    here: bool


def owner(directory: Path) -> Owner | None:
    """Return who claims a run directory, or None; changes no file."""
    claim = _lease(directory).owner
    try:
        seen = (directory / LEASE).stat().st_mtime
    except OSError:
        return None
    if claim is None:
        return None
    alive = time.time() - seen < 2 * STALE  # twice, because another machine's clock may differ
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        told = json.loads((directory / OWNER).read_text())
        host, job = told["host"], told["job"]
        # Another token is the previous owner's: this one has only just made its claim.
        if told["token"] == claim.token and f"{host}{job}".isprintable():
            if here := (host, told["boot"]) == (socket.gethostname(), BOOT):
                alive = _started(claim.pid) in (0, told["started"])
            slurm = f"Slurm job {job}, " if job else ""
            beat = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seen))
            name = f"process {claim.pid} on {host} ({slurm}last seen {beat})"
            return Owner(name, claim.pid, alive, here)
    return Owner("another process", claim.pid, alive, False)


def _lease(directory: Path) -> SoftFileLease:
    return SoftFileLease(
        directory / LEASE,
        timeout=0,
        thread_local=False,  # a run may be ended by another thread than the one that began it
        lease_duration=STALE,
        heartbeat_interval=HEARTBEAT,
    )


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        stat = path.lstat()
        return stat.st_ino, stat.st_mtime_ns
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
