"""A run directory has one writer at a time, and is free again when that one is gone."""

from __future__ import annotations

import fcntl
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
from typing import Any, NoReturn

import pytest

from moco_dist.errors import InUseError, OutputError
from moco_dist.runs import lock as runs_lock
from moco_dist.runs.lock import RunLock

START = """
import errno, fcntl, os, sys, time
from pathlib import Path
from moco_dist.errors import InUseError
from moco_dist.runs.lock import RunLock
run = Path(sys.argv[1])
def without(*arguments):
    raise OSError(errno.ENOSYS, "no flock")
"""
HOLD = """
lock = RunLock(run)
print(os.getpid(), flush=True)
sys.stdin.read()
lock.release()
"""
WITHOUT_FLOCK = "fcntl.flock = without\n"


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
    """A process that holds `run`, killed in the end if it is still there."""
    with start(script, run) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline().strip() == str(process.pid)
            yield process
        finally:
            process.kill()


# Seconds on a busy machine; an owner elsewhere is waited for three times as long.
AT_ONCE = runs_lock.STALE / 3


def taken(run: Path) -> float:
    """Take and release `run` here; return the seconds that taking it took."""
    begin = time.monotonic()
    lock = RunLock(run)
    seconds = time.monotonic() - begin
    lock.check()
    lock.release()
    return seconds


def record(run: Path, **changes: Any) -> None:
    """Write the record of a living owner on another machine, with `changes`."""
    owner = {"host": "elsewhere", "boot": "b", "pid": 2231, "started": 7, "job": "8812"}
    others = {"token": "theirs", "since": int(time.time()) - 7300, "flock": True, "beat": 3}
    (run / ".lock").write_text(json.dumps({**owner, **others, **changes}))


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> NoReturn:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_lock, "HEARTBEAT", 0.1)
    monkeypatch.setattr(runs_lock, "STALE", 2.0)


@pytest.mark.parametrize("flock", ["", WITHOUT_FLOCK], ids=["flock", "no flock"])
def test_a_second_process_is_refused_while_the_first_holds_it(tmp_path: Path, flock: str) -> None:
    other = "try: RunLock(run)\nexcept InUseError as e: print(e.exit_status, e)"
    with holder(tmp_path, flock + HOLD) as first:
        begin = time.monotonic()
        with start(flock + other, tmp_path) as second:
            answer, _ = second.communicate(timeout=10)
        assert time.monotonic() - begin < 4
    status, _, sentence = answer.strip().partition(" ")
    assert status == "73"
    who = f"process {first.pid} on {socket.gethostname()} (Slurm job 8812, started "
    assert sentence.startswith(f"{tmp_path} is in use by {who}")
    assert sentence.endswith(" s ago); wait for it, end it, or choose name=... for another run")


def test_a_second_lock_in_the_same_process_is_refused(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(InUseError, match=f"process {os.getpid()} "):
        RunLock(tmp_path)
    lock.check()
    lock.release()
    lock.release()
    assert taken(tmp_path) < AT_ONCE


@pytest.mark.parametrize("flock", ["", WITHOUT_FLOCK], ids=["flock", "no flock"])
def test_it_is_free_at_once_when_the_owner_was_killed(
    tmp_path: Path, request: pytest.FixtureRequest, flock: str
) -> None:
    if flock:
        request.getfixturevalue("no_flock")
    with holder(tmp_path, flock + HOLD) as owner:
        owner.kill()
        os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # a zombie is gone, too
        assert (tmp_path / ".lock").read_text().strip()
        assert taken(tmp_path) < AT_ONCE


def test_it_is_free_at_once_after_a_release_and_the_file_stays(tmp_path: Path) -> None:
    with holder(tmp_path) as owner:
        owner.communicate("")
        assert owner.returncode == 0
    assert (tmp_path / ".lock").read_bytes() == b""
    assert taken(tmp_path) < AT_ONCE


def test_one_of_two_that_start_at_the_same_moment_gets_it(tmp_path: Path) -> None:
    script = """
for round in range(50):
    (go, ready), (answers, answer), (end, ending) = os.pipe(), os.pipe(), os.pipe()
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os.close(ready), os.close(ending)
            os.read(go, 1)
            try:
                RunLock(run)
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
    print(sum(found) - 2 * ord("0"), end=" ")
"""
    with start(script, tmp_path) as process:
        counts, _ = process.communicate(timeout=60)
    assert counts.split() == ["1"] * 50


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
            assert taken(tmp_path) < AT_ONCE
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("here", [{}, {"host": socket.gethostname()}], ids=["machine", "boot"])
def test_another_machine_that_reports_is_in_use(tmp_path: Path, here: dict[str, str]) -> None:
    record(tmp_path, **here)
    timer = threading.Timer(0.2, record, [tmp_path], {"beat": 4, **here})
    timer.start()
    with pytest.raises(InUseError) as error:
        RunLock(tmp_path)
    timer.join()
    host = here.get("host", "elsewhere")
    assert str(error.value) == (
        f"{tmp_path} is in use by process 2231 on {host} "
        "(Slurm job 8812, started 2 h ago, seen 0 s ago); "
        "wait for it, end it, or choose name=... for another run"
    )


@pytest.mark.usefixtures("soon")
def test_another_machine_that_is_silent_is_taken_over_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert 2 <= taken(tmp_path) < 15
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}: taken over from process 2231 on elsewhere")


def test_another_machine_that_releases_it_meanwhile_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_lock, "HEARTBEAT", 0.1)
    record(tmp_path)
    timer = threading.Timer(0.15, (tmp_path / ".lock").write_text, [""])
    timer.start()
    assert taken(tmp_path) < AT_ONCE
    timer.join()


@pytest.mark.usefixtures("no_flock")
def test_without_flock_the_later_of_two_writers_gets_it(tmp_path: Path) -> None:
    def overwrite() -> None:
        while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_text():
            time.sleep(0.01)
        record(tmp_path)

    thread = threading.Thread(target=overwrite)
    thread.start()
    with pytest.raises(InUseError, match="process 2231 on elsewhere"):
        RunLock(tmp_path)
    thread.join()
    assert "theirs" in (tmp_path / ".lock").read_text()


@pytest.mark.usefixtures("soon")
def test_the_owner_reports_and_notices_who_took_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    path = tmp_path / ".lock"
    first = json.loads(path.read_text())
    time.sleep(0.35)
    lock.check()
    assert json.loads(path.read_text()) == {
        **first,
        "beat": pytest.approx(first["beat"] + 3, abs=2),
    }
    assert json.loads(path.read_text())["beat"] > first["beat"]
    record(tmp_path)
    time.sleep(0.3)
    with pytest.raises(InUseError, match="process 2231 on elsewhere"):
        lock.check()
    lock.release()
    assert json.loads(path.read_text())["token"] == "theirs"


def test_the_owner_notices_another_file_in_its_place(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    (tmp_path / ".lock").unlink()
    lock.check()  # nobody has taken it
    with holder(tmp_path), pytest.raises(InUseError, match="is in use by another process;"):
        lock.check()
    lock.release()


def test_a_file_removed_between_opening_and_locking_is_not_what_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, path = fcntl.flock, tmp_path / ".lock"
    removals = [True, False]  # with a new file in its place, and without

    def remove_and_lock(descriptor: int, operation: int) -> None:
        if removals:
            path.unlink()
            if removals.pop():
                path.touch()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_and_lock)
    lock = RunLock(tmp_path)
    assert not removals
    with pytest.raises(InUseError, match=f"process {os.getpid()} "):
        RunLock(tmp_path)
    lock.release()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 900,
        b"{",
        b"\xff\xfe",
        b"[" * 5000,
        b"7",
        b'{"pid": "x"}',
        b'{"colour": 1}',
        b"{}",
    ],
)
def test_a_damaged_record_is_nobodys(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".lock").write_bytes(content)
    assert taken(tmp_path) < AT_ONCE


@pytest.mark.parametrize("changes", [{"job": "\x1b[2J"}, {"pid": 0}, {"since": 10**300}])
def test_a_record_with_impossible_values_is_nobodys(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    record(tmp_path, **changes)
    assert taken(tmp_path) < AT_ONCE


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_what_is_no_plain_file_is_refused_and_left_alone(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / ".lock", tmp_path / "precious"
    if kind == "link":
        target.write_text("kept")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    with pytest.raises(OutputError) as error:
        RunLock(tmp_path)
    assert str(error.value).startswith(f"{path}: must be a plain file that can be locked (")
    assert str(error.value).endswith("); free or remove it, or choose output=FOLDER")
    assert (target.read_text() == "kept") if kind == "link" else not target.exists()


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_the_files_mode_follows_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        taken(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / ".lock").stat().st_mode & 0o777 == 0o666 & ~umask


def test_it_starts_without_torch(tmp_path: Path) -> None:
    with start("print('torch' in sys.modules)", tmp_path) as process:
        assert process.communicate(timeout=60)[0].strip() == "False"
