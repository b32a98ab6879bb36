"""A disk that is full in the middle of a save: a limit of the file size, and a small tmpfs."""

from __future__ import annotations

import resource
import shutil
import subprocess
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

from moco_dist.pretrain.trainer import Trainer
from tests.faults.jobs import TINY, Job, account, in_save, last_step, undisturbed
from tests.faults.kills import INTERVAL, saved
from tests.faults.table import Fault, Outcome


def limit_files(after: int, size: int, rank: int) -> None:
    """From step `after` on let this process write no file beyond `size` bytes."""
    train_step = Trainer.train_step

    def limited(trainer: Trainer, *arguments: Any) -> object:
        if trainer.step == after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return train_step(trainer, *arguments)

    Trainer.train_step = limited  # type: ignore[method-assign, assignment]


def file_size(folder: Path, times: int, random: Random) -> Outcome:
    """Let a save fail in the middle of a file; resume from the previous checkpoint."""
    worst = 0
    with undisturbed(folder / "reference", *TINY, processes=2) as expected:
        for number in range(times):
            after = random.randrange(7, 45)
            plant = partial(limit_files, after, random.randrange(20_000, 150_000))
            output = folder / str(number)
            with Job(output, *TINY, processes=2, plant=plant) as job:
                states = job.wait()
            worst = max(worst, failed(job, states, "File too large"))
            finish(output, expected)
    return Outcome(times, "exit status 74 with path and reason; resumed, bit-equal", worst)


def no_check(rank: int) -> None:
    """Report room for the save, as if another job filled the disk only afterwards."""
    shutil.disk_usage = lambda path: SimpleNamespace(free=2**60)  # type: ignore[assignment, return-value]


def small_disk(folder: Path, times: int, random: Random) -> Outcome:
    """Save to a tmpfs that has no room for a third checkpoint."""
    worst = tried = 0
    with undisturbed(folder / "reference", *TINY) as expected:
        for number in range(2 * times):
            checked = number % 2 == 0
            output = folder / str(number)
            output.mkdir()
            size = random.choice([1_700, 2_100, 2_500]) if not checked else 2_500
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(output)]
            mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
            if mounted.returncode:
                return Outcome(0, f"not tried, mount needs root: {mounted.stderr.strip()}")
            try:
                plant = None if checked else no_check
                with Job(output, *TINY, "checkpoint.keep_last=9", plant=plant) as job:
                    states = job.wait()
                reason = "MB are free" if checked else "No space left on device"
                worst = max(worst, failed(job, states, reason))
                subprocess.run(["mount", "-o", "remount,size=100m", str(output)], check=True)
                finish(output, expected)
                tried += 1
            finally:
                subprocess.run(["umount", str(output)], check=True)
    return Outcome(tried, "seen before the save, or in it; exit status 74; bit-equal later", worst)


def failed(job: Job, states: list[int], reason: str) -> int:
    """Check a job that could not save; return the steps lost."""
    assert set(states) == {74}, f"{states}\n{job.text()}"
    (line,) = job.errors()
    assert reason in line, line
    assert "step_" in line, line
    assert not in_save(job.run), "a half written folder was left"
    lost = last_step(job.run) - saved(job.run)
    assert 0 <= lost <= 2 * INTERVAL, lost
    return lost


def finish(output: Path, expected: dict[str, object]) -> None:
    """Resume on a disk with room, on as many processes as before; it must be the same run."""
    processes = 2 if "processes  2" in (output / "run.log").read_text() else 1
    with Job(output, *TINY, processes=processes) as job:
        assert set(job.wait()) == {0}, job.text()
    assert account(output / "run") == expected, "the resumed run is another one"


FAULTS = [
    Fault("file-size limit reached in a save", 1, 8, file_size),
    Fault("disk full in a save (tmpfs)", 1, 4, small_disk),
]
