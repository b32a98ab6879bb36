"""A run directory has one writer at a time, and is free again when that one is gone."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock._filesystem import _exchange

from moco_dist.errors import InUseError, OutputError
from moco_dist.runs import lock as runs_lock
from moco_dist.runs.lock import RunLock

START = """
import errno, os, sys, time
from pathlib import Path
from filelock._filesystem import _exchange
from moco_dist.errors import InUseError
from moco_dist.runs.lock import RunLock
run = Path(sys.argv[1])
"""
HOLD = """
lock = RunLock(run)
print(os.getpid(), flush=True)
sys.stdin.read()
lock.release()
"""
# What NFS answers to a request to exchange two names.
LIKE_NFS = "_exchange._rename_call = lambda: (lambda *names: errno.EINVAL, 2)\n"


def start(script: str, run: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", START + script, str(run)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SLURM_JOB_ID": "8812"},
    )


@contextmanager
def holder(run: Path, script: str = HOLD) -> Iterator[subprocess.Popen[str]]:
    """A process that holds `run`, killed at the end if it is still there."""
    with start(script, run) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().strip() == str(process.pid)
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that this process has made while it waited for an owner."""
    made: list[float] = []
    pause = time.sleep

    def sleep(seconds: float) -> None:
        made.append(seconds)
        pause(seconds)

    monkeypatch.setattr("time.sleep", sleep)
    return made


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_lock, "HEARTBEAT", 0.1)
    monkeypatch.setattr(runs_lock, "STALE", 1.0)


@pytest.fixture(params=["", LIKE_NFS], ids=["exchange", "like NFS"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A script that makes another process's file system like this one's."""
    if request.param:
        monkeypatch.setattr(_exchange, "_rename_call", lambda: (lambda *names: errno.EINVAL, 2))
    return str(request.param)


def take(run: Path) -> None:
    lock = RunLock(run)
    lock.check()
    lock.release()


def claim(run: Path, host: str = "elsewhere", boot: str = "b", pid: int = 2231) -> None:
    """Write the claim of a living owner on another machine, as filelock and the lock do."""
    lines = ["filelock/2", f"pid={pid}", f"host={host}", "mode=lease", "token=theirs"]
    lines += [f"duration={runs_lock.STALE!r}", "start=7"]
    (run / "theirs").write_text("\n".join(lines) + "\n")
    (run / "theirs").rename(run / ".lease")
    told = {"token": "theirs", "host": host, "boot": boot, "started": 7, "job": "8812"}
    (run / ".owner").write_text(json.dumps(told))


def test_a_second_process_is_refused_while_the_first_holds_it(tmp_path: Path) -> None:
    other = "try: RunLock(run)\nexcept InUseError as e: print(e.exit_status, e)"
    with holder(tmp_path) as first, start(other, tmp_path) as second:
        answer, _ = second.communicate(timeout=60)
    who = f"process {first.pid} on {socket.gethostname()} (Slurm job 8812, last seen "
    assert answer.startswith(f"73 {tmp_path} is in use by {who}")
    assert answer.endswith("); wait for it, end it, or choose name=... for another run\n")


def test_a_second_lock_in_the_same_process_is_refused(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(InUseError, match=f"process {os.getpid()} "):
        RunLock(tmp_path)
    lock.check()
    lock.release()
    lock.release()
    take(tmp_path)


def test_it_is_free_at_once_when_the_owner_was_killed(
    tmp_path: Path, system: str, sleeps: list[float]
) -> None:
    for reaped in (False, True):  # a zombie is gone, too
        with holder(tmp_path, system + HOLD) as owner:
            owner.kill()
            os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)
            if reaped:
                owner.wait()
            assert (tmp_path / ".lease").exists()
            take(tmp_path)
    assert sleeps == []


def test_it_is_free_at_once_after_a_release(tmp_path: Path, sleeps: list[float]) -> None:
    with holder(tmp_path) as owner:
        owner.communicate("")
        assert owner.returncode == 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".lock").touch()  # what an older version leaves behind
    take(tmp_path)
    assert sleeps == []


@pytest.mark.parametrize("before", ["nobody", "killed"])
def test_one_of_two_that_start_at_the_same_moment_gets_it(
    tmp_path: Path, system: str, before: str
) -> None:
    script = """
for round in range(30):
    if DEAD and os.fork() == 0:
        RunLock(run)
        os._exit(0)
    if DEAD:
        os.wait()
    (go, ready), (answers, answer), (end, ending) = os.pipe(), os.pipe(), os.pipe()
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os.close(ready), os.close(ending)
            os.read(go, 1)
            try:
                lock = RunLock(run)
                os.write(answer, b"1")
            except InUseError:
                os.write(answer, b"0")
            os.read(end, 1)
            os._exit(0)
        children.append(child)
    os.close(ready)
    found = os.read(answers, 1) + os.read(answers, 1)
    os.close(ending)
    for child in children:
        os.waitpid(child, 0)
    for descriptor in (go, answers, answer, end):
        os.close(descriptor)
    print(sum(found) - 2 * ord("0"), end=" ", flush=True)
"""
    with start(f"DEAD = {before == 'killed'}\n{system}{script}", tmp_path) as process:
        counts, _ = process.communicate(timeout=120)
    assert counts.split() == ["1"] * 30


@pytest.mark.parametrize("action", ["pass", "lock.release()"])
def test_a_fork_that_outlives_the_owner_does_not_keep_it(tmp_path: Path, action: str) -> None:
    script = f"""
lock = RunLock(run)
child = os.fork()
if child == 0:
    {action}
    os.close(1)
    time.sleep(60)
    os._exit(0)
print(os.getpid(), flush=True)
print(child, flush=True)
sys.stdin.read()
"""
    with holder(tmp_path, script) as owner:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        try:
            with pytest.raises(InUseError, match=f"process {owner.pid} "):  # its parent's
                RunLock(tmp_path)
            owner.kill()
            owner.wait()
            os.kill(child, 0)
            take(tmp_path)
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("host", ["elsewhere", socket.gethostname()], ids=["machine", "namesake"])
def test_an_owner_that_reports_from_another_machine_keeps_it(tmp_path: Path, host: str) -> None:
    claim(tmp_path, host)
    timer = threading.Timer(0.5, os.utime, [tmp_path / ".lease"])
    timer.start()
    with pytest.raises(InUseError) as error:
        RunLock(tmp_path)
    timer.join()
    who = f"process 2231 on {host} (Slurm job 8812, last seen "
    assert str(error.value).startswith(f"{tmp_path} is in use by {who}")


@pytest.mark.usefixtures("soon")
def test_an_owner_on_another_machine_that_is_silent_loses_it_and_is_named(
    tmp_path: Path, system: str, sleeps: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    claim(tmp_path)
    with caplog.at_level(logging.WARNING):
        take(tmp_path)
    assert sum(sleeps) >= runs_lock.STALE
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}: taken over from process 2231 on elsewhere")


def test_a_release_on_another_machine_is_noticed(tmp_path: Path, sleeps: list[float]) -> None:
    claim(tmp_path)
    timer = threading.Timer(0.5, (tmp_path / ".lease").unlink)
    timer.start()
    take(tmp_path)
    timer.join()
    assert sum(sleeps) < runs_lock.STALE


@pytest.mark.usefixtures("soon")
def test_the_owner_reports_and_notices_who_took_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    path = tmp_path / ".lease"
    first = path.stat().st_mtime_ns
    deadline = time.monotonic() + 60
    while path.stat().st_mtime_ns == first and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.stat().st_mtime_ns > first
    lock.check()
    claim(tmp_path)
    with pytest.raises(InUseError, match="is in use by process 2231 on elsewhere"):
        lock.check()
    lock.release()
    assert "theirs" in path.read_text()
    assert "theirs" in (tmp_path / ".owner").read_text()


def test_the_owner_stops_when_its_claim_was_removed(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    (tmp_path / ".lease").unlink()
    with pytest.raises(InUseError, match=r"\.lease was removed, so this run no longer has "):
        lock.check()
    with holder(tmp_path) as other, pytest.raises(InUseError, match=f"process {other.pid} "):
        lock.check()
    lock.release()


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("content", [b"", b"\0" * 900, b"{", b"\xff\xfe", b"[" * 5000, b"7", b"{}"])
def test_damaged_files_keep_nobody_out(tmp_path: Path, content: bytes) -> None:
    claim(tmp_path)
    (tmp_path / ".owner").write_bytes(content)
    owner = runs_lock.owner(tmp_path)
    assert owner == ("another process", 2231, True, False)
    (tmp_path / ".lease").write_bytes(content)
    assert runs_lock.owner(tmp_path) is None
    take(tmp_path)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_what_is_no_plain_file_is_not_followed(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / ".lease", tmp_path / "precious"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    if kind == "link":
        target.write_text("kept")
    take(tmp_path)
    assert (target.read_text() == "kept") if kind == "link" else not target.exists()


def test_a_folder_in_its_place_has_its_sentence(tmp_path: Path) -> None:
    (tmp_path / ".lease").mkdir()
    with pytest.raises(OutputError, match=r"/\.lease: must be a plain file that can be written \("):
        RunLock(tmp_path)


def test_it_starts_without_torch(tmp_path: Path) -> None:
    with start("print('torch' in sys.modules)", tmp_path) as process:
        assert process.communicate(timeout=60)[0].strip() == "False"
