"""A run followed through its files looks as it does on its own console."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moco_dist.runs import lock as runs_lock
from moco_dist.tracking import follow
from tests import terminal
from tests.test_launch import TINY, python


def entry(step: int, **metrics: float | str) -> str:
    """Return a line of metrics as a run writes it, of 5 steps an epoch."""
    content = {"step": step, "time": 1_700_000_000 + step, "epoch": step / 5, **metrics}
    return json.dumps(content) + "\n"


def loss(step: int, value: float = 4.0) -> str:
    return entry(step, **{"train/loss": value, "queue/fill": 1.0})


def status(directory: Path, state: str, reason: str = "") -> None:
    content = {"state": state, "exit_status": None, "step": 0, "reason": reason, "pid": os.getpid()}
    (directory / "status.json").write_text(json.dumps(content))


def followed(directory: Path, *acts: Callable[[], Any]) -> list[str]:
    """Return the lines of following a run without time stamps; `acts` come after each look."""
    file, left = io.StringIO(), list(acts)
    console = Console(file=file, width=80)
    follow.follow(directory, console, wait=lambda seconds: left.pop(0)())
    assert not left
    return [line[12:].strip() for line in file.getvalue().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 4 epochs of 5 steps."""
    text = "epochs: 4\nstop_at_step: 0\nmoco:\n  queue_size: 40\nknn:\n  every_epochs: 2\n"
    (tmp_path / "config.yaml").write_text(text)
    return tmp_path


def test_lines_come_as_they_are_written_and_the_end_ends_it(run: Path) -> None:
    metrics = run / "metrics.jsonl"
    metrics.write_text('{"schema": 1}\n' + loss(5) + loss(10)[:20])
    status(run, "running")

    def end() -> None:
        metrics.write_text(metrics.read_text() + loss(20))
        status(run, "done")

    acts = [
        lambda: metrics.write_text('{"schema": 1}\n' + loss(5) + loss(10)),
        lambda: metrics.write_text(metrics.read_text() + entry(10, **{"knn/top1": 0.25})),
        end,
    ]
    lock = runs_lock.RunLock(run)
    lines = followed(run, *acts)
    lock.release()
    assert lines == [
        "5/20 epoch   1.0 loss 4.000",
        f"{run}: running",
        "10/20 epoch   2.0 loss 4.000 10s left",  # ten steps, a second each
        "10/20 epoch   2.0 kNN 25.0%",
        "20/20 epoch   4.0 loss 4.000 0s left",  # its evaluation is to come
        f"{run}: done",
    ]


def test_a_run_that_was_killed_and_started_again_repeats_no_line(run: Path) -> None:
    metrics = run / "metrics.jsonl"
    metrics.write_text(loss(5) + loss(10, 3.0) + loss(15, 2.0))
    status(run, "running")

    def again() -> None:
        """Cut back to step 10 and written on, faster than anyone has looked."""
        metrics.write_text(loss(5) + loss(10, 3.0) + loss(12, 2.5) + loss(15, 2.25) + loss(20, 1.0))
        status(run, "done")

    lines = followed(run, again)
    shown = [line.split(" loss ") for line in lines if " loss " in line]
    assert [(place.split("/")[0], value.split()[0]) for place, value in shown] == [
        *(("5", "4.000"), ("10", "3.000"), ("15", "2.000")),
        *(("12", "2.500"), ("15", "2.250"), ("20", "1.000")),
    ]
    assert "10/20 started again from here" in lines
    assert any("gone: process" in line and "waiting for it to resume" in line for line in lines)


@pytest.mark.parametrize("keep", [0, 1, 7, 12])
def test_a_file_cut_back_anywhere_is_read_again_from_there(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "lines"
    before = [b"%d\n" % (100 + number) for number in range(12)]
    tail = follow.Tail(path)
    assert tail.read() == (False, [], [])
    path.write_bytes(b"".join(before) + b"12")
    assert tail.read() == (False, [], before)
    after = [*before[:keep], *(b"%d\n" % (500 + number) for number in range(20))]
    path.write_bytes(b"".join(after))
    assert tail.read() == (keep < 12, before[:keep] if keep < 12 else [], after[keep:])
    path.unlink()
    assert tail.read() == (False, [], [])


def test_it_waits_for_a_run_that_is_not_there_yet(tmp_path: Path) -> None:
    run = tmp_path / "later"

    def begin() -> None:
        run.mkdir()
        (run / "metrics.jsonl").write_text(entry(3, alarm="collapse", text="all alike; lower lr"))
        status(run, "done")

    lines = followed(run, lambda: None, begin)
    assert lines == [
        f"{run}: nothing is there yet: waiting, Ctrl-C ends",
        "3/? ALARM collapse: all alike; lower lr",
        f"{run}: done",
    ]


def test_a_finished_run_shows_what_its_own_console_showed(tmp_path: Path) -> None:
    result = python("pretrain", *TINY, f"output={tmp_path}", "runtime.device=cpu")
    assert result.returncode == 0, result.stderr
    shown = python("report", str(tmp_path / "pretrain"), "--follow")
    assert shown.returncode == 0, shown.stderr

    def plain(text: str) -> list[str]:
        """Only what the files can tell: neither the minute nor the time left, which may round."""
        lines = (line[12:] for line in text.splitlines() if re.match(r"\d\d-\d\d ", line))
        return [re.sub(r" \S+ left$", "", line) for line in lines]

    own = plain(result.stdout)
    assert len(own) == 10
    assert plain(shown.stdout) == [*own, f"{tmp_path / 'pretrain'}: done"]
    command = [sys.executable, "-m", "moco_dist.report", str(tmp_path / "pretrain"), "--follow"]
    status, screen = terminal.run(command)
    assert status == 0
    lines = [line.rstrip() for line in screen.lines]
    assert [line[12:] for line in lines if " kNN " in line][:3] == [x for x in own if "kNN" in x]
    assert sum(line.startswith("10/10 ") for line in lines) == 1
    assert sum(line.startswith("kNN  ") for line in lines) == 1
    assert screen.cursor


def test_ctrl_c_ends_it_with_130(run: Path) -> None:
    command = [sys.executable, "-m", "moco_dist.report", str(run), "--follow"]
    with subprocess.Popen(command, cwd=terminal.ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "waiting" in process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stdout.read() == ""
