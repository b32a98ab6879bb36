"""The guard against a job that is requeued for ever, and its notes in requeues.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moco_dist.runs.slurm_job import MAX_RESTARTS, REQUEUE, end

SAVED = {"exit_status": 75, "reason": "stopped by SIGUSR1", "again": True}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    (tmp_path / "checkpoints" / "step_00000010").mkdir(parents=True)
    return tmp_path


def line(job: str = "5", step: Any = 10) -> bytes:
    return json.dumps({"job": job, "restart": 0, "step": step, "reason": ""}).encode() + b"\n"


@pytest.mark.parametrize(
    ("noted", "left"),
    [
        (b"", 3),
        (line(), 2),
        (line("4") * 9, 3),  # another job's
        (line(step=5) * 9, 3),  # there has been a checkpoint since
        (b'{"job": "5", "restart": 0, "st', 2),  # cut short by a full disk
        (b'{"job": "5", "restart": 0, "st\n' + line(), 1),
        (bytes(40) + b"\n", 2),  # as a machine that lost its power leaves it
        (b"[5]\n7\n{}\n", 0),
        (line(step="much"), 2),
    ],
)
def test_a_job_is_requeued_three_times_without_a_checkpoint_whatever_is_damaged(
    run: Path, noted: bytes, left: int
) -> None:
    """Damage counts as one restart: it may end a loop early, but not keep it going."""
    (run / "requeues.jsonl").write_bytes(noted)
    statuses = [end(run, SAVED, "RUNNING")[0] for _ in range(MAX_RESTARTS + 2)]
    assert statuses == [REQUEUE] * left + [70] * (MAX_RESTARTS + 2 - left)
    whole = (run / "requeues.jsonl").read_bytes().removeprefix(noted).splitlines()
    assert [json.loads(each)["step"] for each in whole if each] == [10] * left


def test_a_new_checkpoint_gives_new_restarts(run: Path) -> None:
    for _ in range(MAX_RESTARTS):
        assert end(run, SAVED, "RUNNING")[0] == REQUEUE
    (run / "checkpoints" / "step_00000020").mkdir()
    assert end(run, SAVED, "RUNNING") == (REQUEUE, "to be requeued at step 20: stopped by SIGUSR1")


def test_a_restart_that_cant_be_noted_does_not_happen(run: Path) -> None:
    (run / "requeues.jsonl").mkdir()
    status, sentence = end(run, SAVED, "RUNNING")
    assert status == 74
    assert sentence.startswith(f"{run}/requeues.jsonl: can't be written (Is a directory)")
    assert sentence.endswith("stopped by SIGUSR1")
