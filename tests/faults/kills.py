"""SIGKILL of one process and of all, at any moment, many in the middle of a save."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from random import Random

from moco_dist.runs import checkpoint
from tests.faults.jobs import KILL, STEPS, TINY, Job, account, in_save, last_step, undisturbed
from tests.faults.table import Fault, Outcome

INTERVAL = 5


def storm(folder: Path, times: int, random: Random) -> Outcome:
    """Kill runs of two processes until `times` kills are done; each must end as if there were none.

    Every other kill waits for a save and comes in it.
    """
    kills = in_saves = worst = runs = 0
    slowest = 0.0
    with undisturbed(folder / "reference", *TINY, processes=2) as expected:
        while kills < times:
            runs += 1
            output = folder / f"storm{runs}"
            finished = False
            while not finished:
                with Job(output, *TINY, processes=2) as job:
                    before = saved(job.run)
                    if kills < times and before < STEPS - 2 * INTERVAL:
                        in_a_save = kills % 2 == 0
                        reach(job, before, in_a_save, random)
                        whom = random.choice([(0,), (1,), (0, 1)])
                        job.send(KILL, *whom)
                        began = time.monotonic()
                        # In the start, before the processes have met, it takes the timeout.
                        job.wait(35)
                        slowest = max(slowest, time.monotonic() - began)
                        kills += 1
                        in_saves += in_save(job.run)
                        done, kept = last_step(job.run), saved(job.run)
                        lost = done - kept
                        # Training continues while a save is being written: one interval, and the
                        # steps that were done in the meantime.
                        assert lost <= INTERVAL + 2, f"{lost} steps lost at {done}\n{job.text()}"
                        worst = max(worst, lost)
                        assert kept >= before, f"a checkpoint is gone: {before}, now {kept}"
                    else:
                        assert set(job.wait(120)) == {0}, job.text()
                        finished = True
            found = account(output / "run")
            assert found == expected, f"run {runs} is another one:\n{found}\n{expected}"
            assert not in_save(output / "run"), "what a killed save left was not cleared away"
            shutil.rmtree(output)
    outcome = (
        f"{runs} runs of {STEPS} steps, {in_saves} kills in a save; all resumed, losses and state "
        f"bit-equal; survivors gone after {slowest:.1f} s at most"
    )
    return Outcome(kills, outcome, worst)


def saved(run: Path) -> int:
    """Return the step of the newest checkpoint folder, 0 if there is none."""
    return max((step for step, _ in checkpoint.step_folders(run)), default=0)


def reach(job: Job, before: int, in_a_save: bool, random: Random) -> None:
    """Wait for a moment to kill at: in the start, after some steps, or in a save."""
    if not in_a_save and random.random() < 0.1:
        time.sleep(random.uniform(0, 1))
        return
    job.until_step(before + 1)
    if in_a_save:
        number = before + INTERVAL * random.choice([1, 2])
        job.until(lambda: in_save(job.run) and last_step(job.run) >= number)
        time.sleep(random.uniform(0, 0.01))
    else:
        job.until_step(before + random.randint(1, 2 * INTERVAL))
        time.sleep(random.uniform(0, 0.1))


FAULTS = [Fault("SIGKILL of one process or all", 9, 100, storm)]
