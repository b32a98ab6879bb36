"""Two jobs on one run directory; an owner that is killed."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from random import Random

from tests.faults.jobs import KILL, TINY, Job, account, undisturbed
from tests.faults.stops import slow_steps
from tests.faults.table import Fault, Outcome

slow = partial(slow_steps, 0.1)


def second_job(folder: Path, times: int, random: Random) -> Outcome:
    """Start a second job on a directory in use, again and again; the first must not notice."""
    slowest = refused = 0.0
    with undisturbed(folder / "reference", *TINY) as expected:
        first = Job(folder / "a", *TINY, plant=slow)
        with first:
            first.until_step(1)
            while refused < times:
                if first.workers[0].exitcode is not None:
                    assert first.wait() == [0], first.text()
                    assert account(first.run) == expected, "the first run is another one"
                    first = Job(folder / f"a{refused}", *TINY, plant=slow)
                    first.until_step(1)
                with Job(first.run.parent, *TINY) as second:
                    states = second.wait(60)
                if states == [0] and first.workers[0].exitcode is not None:
                    continue  # the first one ended just before
                seconds = time.time() - second.began
                assert states == [73], f"{states}\n{second.text()}"
                assert f"is in use by process {first.pid(0)} on " in second.errors()[-1]
                slowest = max(slowest, seconds)
                refused += 1
            assert first.wait() == [0], first.text()
            assert account(first.run) == expected, "the first run is another one"
    return Outcome(times, f"exit status 73 after {slowest:.1f} s at most; first run bit-equal", 0)


def both_at_once(folder: Path, times: int, random: Random) -> Outcome:
    """Start two jobs of the same run in the same moment: one runs, the other is refused."""
    with undisturbed(folder / "reference", *TINY) as expected:
        for number in range(times):
            with Job(folder / str(number), *TINY) as a, Job(folder / str(number), *TINY) as b:
                states = sorted(a.wait() + b.wait())
                assert states == [0, 73], f"{states}\n{a.text()}"
                assert account(a.run) == expected, "the run is another one"
    return Outcome(times, "one ran, bit-equal, the other exited 73", 0)


def killed_owner(folder: Path, times: int, random: Random) -> Outcome:
    """Kill the owner with SIGKILL; the next job takes over at once."""
    slowest = 0.0
    for number in range(times):
        with Job(folder / str(number), *TINY) as first:
            first.until_step(random.randrange(6, 30))
            first.send(KILL)
            first.wait()
        began = time.monotonic()
        with Job(first.run.parent, *TINY) as second:
            second.until_step(1)
            slowest = max(slowest, time.monotonic() - began)
            assert second.wait() == [0], second.text()
    return Outcome(times, f"next job in training after {slowest:.1f} s at most")


FAULTS = [
    Fault("second job on a run directory in use", 3, 40, second_job),
    Fault("two jobs started at once", 1, 10, both_at_once),
    Fault("owner of a run directory killed", 1, 5, killed_owner),
]
