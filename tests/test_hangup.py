"""A terminal that closes, really: the run saves and ends, or goes on where SIGHUP is ignored."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from moco_dist.runs import checkpoint
from tests.faults.jobs import HUP, KILL, TERM, TINY, Job, alive, last_step, status
from tests.faults.stops import BIN, LONG, ROOT, family, slow_steps


class Terminal:
    """A pseudo-terminal whose output is read, until it is closed as a lost connection closes it."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        self.name, self.output, self._open = os.ttyname(self.slave), b"", True
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while self._open:
            if select.select([self.master], [], [], 0.05)[0]:
                self.output += os.read(self.master, 65536)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._reader.join()
            os.close(self.slave)
            os.close(self.master)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    yield opened
    opened.close()


def in_terminal(name: str, ignores: bool, rank: int) -> None:
    """Plant: the process leads a session of its own at a terminal; `ignores` is what nohup does."""
    slow_steps(0.03, rank)
    signal.signal(HUP, signal.SIG_IGN if ignores else signal.SIG_DFL)
    os.setsid()
    opened = os.open(name, os.O_RDWR)
    fcntl.ioctl(opened, termios.TIOCSCTTY, 0)
    for stream in (0, 1, 2):
        os.dup2(opened, stream)


def test_a_closed_terminal_saves_and_the_same_command_resumes(
    tmp_path: Path, terminal: Terminal
) -> None:
    with Job(tmp_path, *LONG, plant=partial(in_terminal, terminal.name, False)) as job:
        job.until_step(7)
        terminal.close()
        assert job.wait(60) == [75], terminal.output
        done = last_step(job.run)
        saved = checkpoint.newest(job.run)
        assert saved is not None
        assert saved.step == done >= 7
        told = status(job.run)
        assert (told["state"], told["again"], told["step"]) == ("stopped", True, done)
        assert told["reason"].startswith(f"stopped by SIGHUP at step {done}: saved after step")
    with Job(tmp_path, *LONG) as job:
        assert job.wait(60) == [0], job.text()
        assert last_step(job.run) == 100


def test_a_run_that_ignores_the_hangup_goes_on_without_its_terminal(
    tmp_path: Path, terminal: Terminal
) -> None:
    """Under nohup, or disowned: all that is printed from then on is an error of the terminal."""
    with Job(tmp_path, *TINY, plant=partial(in_terminal, terminal.name, True)) as job:
        job.until_step(7)
        terminal.close()
        job.send(HUP)
        job.wait(60)
        assert (job.run / "DONE").exists(), terminal.output
        assert (last_step(job.run), status(job.run)["state"]) == (60, "done")


def test_hangups_after_the_first_do_not_end_a_save(tmp_path: Path) -> None:
    with Job(tmp_path, *LONG, plant=partial(slow_steps, 4.0)) as job:
        job.until(lambda: (job.run / "metrics.jsonl").exists())
        for _ in range(2):
            job.send(HUP)
            time.sleep(2.5)  # longer than the echo of other signals
        assert job.wait(60) == [75], job.text()
        assert "second signal" not in job.text()


@pytest.mark.slow
@pytest.mark.parametrize("caught", [True, False])
def test_a_launcher_under_nohup_ends_with_a_save_unless_it_is_told_to_leave_hangups(
    tmp_path: Path, caught: bool
) -> None:
    launcher = f"{BIN}/accelerate launch --multi_gpu --num_processes 2 --main_process_port 0"
    settings = [*LONG, "epochs=200", f"output={tmp_path}", "name=run"]
    own = {} if caught else {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGQUIT"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            ["nohup", *launcher.split(), "-m", "moco_dist.pretrain", *settings],
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **own},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    run, pids = tmp_path / "run", [process.pid]
    try:
        deadline = time.monotonic() + 120
        while last_step(run) < 5:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        pids = family(process.pid)
        before = last_step(run)
        os.killpg(process.pid, HUP)
        if not caught:
            while last_step(run) < before + 5:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
            os.killpg(process.pid, TERM)
        process.wait(60)
        saved = checkpoint.newest(run)
        assert saved is not None
        assert saved.step == last_step(run), (tmp_path / "log").read_text()
        told = status(run)
        assert (told["state"], told["step"]) == ("stopped", saved.step)
        assert told["reason"].startswith(f"stopped by {'SIGHUP' if caught else 'SIGTERM'}")
    finally:
        for pid in [*pids, *family(process.pid)]:
            if alive(pid):
                os.kill(pid, KILL)
        process.wait(10)
