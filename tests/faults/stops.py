"""Requests to stop, by signals, the file STOP and clocks: saved, nothing lost, the same run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import psutil

from moco_dist.distributed import peers
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import checkpoint, saving
from moco_dist.runs.checkpoint import Checkpoint
from moco_dist.runs.session import Session
from tests.faults.jobs import (
    HUP,
    INT,
    KILL,
    TERM,
    TINY,
    USR1,
    Job,
    account,
    alive,
    figures,
    in_save,
    last_step,
    status,
    undisturbed,
)
from tests.faults.table import Fault, Outcome

STOP = 0
KINDS = {"SIGTERM": TERM, "SIGINT": INT, "SIGUSR1": USR1, "SIGHUP": HUP, "the file STOP": STOP}
# Seconds that a stop may take besides the step and the save in progress.
LIMIT = 3.0
# 100 steps: some are left after four stops.
LONG = [*TINY, "epochs=20"]
ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


def slow_steps(seconds: float, rank: int) -> None:
    """Plant: a step takes `seconds` more."""
    step = Trainer.train_step

    def slow(trainer: Trainer, *arguments: Any) -> Any:
        time.sleep(seconds)
        return step(trainer, *arguments)

    mock.patch.object(Trainer, "train_step", slow).start()


def slow_evaluation(seconds: float, folder: str, rank: int) -> None:
    """Plant: each batch of an evaluation takes `seconds` more; a file marks its beginning."""
    pause = Session.pause

    def slow(session: Session, doing: str) -> None:
        pause(session, doing)
        Path(folder, f"evaluating {peers.me.step}").touch()
        time.sleep(seconds)

    mock.patch.object(Session, "pause", slow).start()


def slow_save(seconds: float, once: str, rank: int) -> None:
    """Plant: each of the two large files of a save takes `seconds` more, once `once` is there."""
    write = saving._write_tensors

    def slow(path: Path, tensors: Any) -> Any:
        if Path(once).exists():
            time.sleep(seconds)
        return write(path, tensors)

    mock.patch.object(saving, "_write_tensors", slow).start()


def announced(folder: str, rank: int) -> None:
    """Plant: a file marks the beginning of the command, with signals as `python -m` finds them."""
    slow_steps(0.03, rank)
    signal.signal(INT, signal.SIG_DFL)
    Path(folder, f"ready {rank}").touch()


def slurm_end(end: int, rank: int) -> None:
    """Plant: slow steps, and a job of Slurm that ends at `end`."""
    slow_steps(0.1, rank)
    os.environ["SLURM_JOB_END_TIME"] = str(end)


def ask(job: Job, kind: str, *ranks: int) -> float:
    """Ask the processes `ranks`, or all, to stop; return when that was."""
    if KINDS[kind] == STOP:
        job.run.mkdir(parents=True, exist_ok=True)
        (job.run / "STOP").touch()
    else:
        job.send(KINDS[kind], *ranks)
    return time.monotonic()


def family(*pids: int) -> list[int]:
    """Return processes with all of their descendants."""
    found = list(pids)
    for pid in pids:
        if psutil.pid_exists(pid):
            found += [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return found


def gone(pids: list[int], text: str) -> None:
    """Wait until no process is left."""
    deadline = time.monotonic() + 60
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, f"processes are left: {left}\n{text}"
        time.sleep(0.05)


def end_of(job: Job, asked: float, kind: str, within: float = LIMIT) -> float:
    """Return the seconds to the end of a job that was asked to stop.

    It must end `within` seconds: saved, with the right exit statuses and nothing left behind.
    """
    pids = family(*(job.pid(rank) for rank in range(len(job.workers))))
    states = job.wait(60)
    seconds = time.monotonic() - asked
    right = 130 if kind == "SIGINT" else 75
    assert set(states) == {right}, f"{kind}: exit statuses {states}, not {right}\n{job.text()}"
    assert seconds <= within, f"{kind}: ended after {seconds:.1f} s\n{job.text()}"
    gone(pids, job.text())
    stands(job.run, kind, job.text())
    assert len(job.errors()) == 1, f"{kind}: not one sentence\n{job.text()}"
    job.log.unlink()  # the next launch writes another one
    return seconds


def stands(run: Path, kind: str, text: str) -> Checkpoint | None:
    """Check what a stop has left in the run directory; return the checkpoint."""
    state, exit_state = ("interrupted", 130) if kind == "SIGINT" else ("stopped", 75)
    found, done, told = checkpoint.newest(run), last_step(run), status(run)
    kept = found.step if found else 0
    assert kept == done, f"{kind}: {done} steps done and {kept} kept\n{text}"
    assert (told["state"], told["exit_status"]) == (state, exit_state), f"{kind}: {told}\n{text}"
    assert told["step"] == done, f"{kind}: at step {done}, and {told}\n{text}"
    assert kind in told["reason"], f"{kind}: {told}\n{text}"
    assert not (run / "STOP").exists(), f"{kind}: STOP is still there\n{text}"
    assert not in_save(run), f"{kind}: half a save is left\n{text}"
    return found


def ends_like(expected: dict[str, Any], output: Path, *arguments: str) -> None:
    """Resume a run to its end, which must be that of the undisturbed one."""
    with Job(output, *arguments, processes=2) as job:
        states = job.wait(120)
        assert set(states) == {0}, f"exit statuses {states}\n{job.text()}"
        found = account(job.run)
        assert found == expected, f"another run:\n{found}\n{expected}\n{job.text()}"
        assert status(job.run)["state"] == "done", job.text()


def chains(times: int, random: Random) -> Iterator[list[str]]:
    """Give lists of up to four kinds, `times` in all and equally many of each."""
    while times > 0:
        kinds = random.sample(list(KINDS), len(KINDS))[:times]
        times -= len(kinds)
        yield kinds


Story = Callable[[Path, str, Random, int], float]


@contextmanager
def in_slow_save(
    output: Path, slow: Path, seconds: float, sign: int, random: Random
) -> Iterator[Job]:
    """Give a job of two processes in the save that a signal began; each file takes `seconds`."""
    with Job(output, *TINY, processes=2, plant=partial(slow_save, seconds, str(slow))) as job:
        job.until_step(random.randint(6, 40))
        slow.touch()
        job.send(sign)
        job.until(partial(in_save, job.run))
        yield job
    slow.unlink()


def stopped_again_and_again(
    folder: Path, times: int, random: Random, arguments: list[str], story: Story
) -> tuple[int, float]:
    """Stop each run up to four times, by `story`, and resume it to the end of the undisturbed one.

    Returns the number of runs and the longest seconds from the request to the end.
    """
    slowest, number = 0.0, 0
    with undisturbed(folder / "reference", *arguments, processes=2) as expected:
        for number, kinds in enumerate(chains(times, random), start=1):
            output = folder / f"stopped{number}"
            for place, kind in enumerate(kinds):
                slowest = max(slowest, story(output, kind, random, place))
            ends_like(expected, output, *arguments)
    return number, slowest


def told(runs: int, slowest: float) -> str:
    return f"{runs} runs, each to the same end; stopped after {slowest:.1f} s at most"


def in_training(folder: Path, times: int, random: Random) -> Outcome:
    """Stop two processes, or one of them, at any moment of training."""

    def story(output: Path, kind: str, random: Random, place: int) -> float:
        with Job(output, *LONG, processes=2, plant=partial(slow_steps, 0.03)) as job:
            job.until_step(last_step(job.run) + random.randint(1, 8))
            time.sleep(random.uniform(0, 0.05))
            asked = ask(job, kind, *random.choice([(), (0,), (1,)]))
            return end_of(job, asked, kind)

    return Outcome(times, told(*stopped_again_and_again(folder, times, random, LONG, story)), 0)


def in_the_start(folder: Path, times: int, random: Random) -> Outcome:
    """Stop both processes at any moment of their first second."""
    by_default = 0

    def story(output: Path, kind: str, random: Random, place: int) -> float:
        nonlocal by_default
        for mark in folder.glob("ready *"):
            mark.unlink()
        before = last_step(output / "run")
        with Job(output, *LONG, processes=2, plant=partial(announced, str(folder))) as job:
            pids = family(job.pid(0), job.pid(1))
            job.until(lambda: len(list(folder.glob("ready *"))) == 2)
            time.sleep(random.uniform(0, 1))
            asked = ask(job, kind)
            if KINDS[kind] == STOP:
                return end_of(job, asked, kind, LIMIT + 2)  # the start comes first
            states = set(job.wait(60))
            seconds = time.monotonic() - asked
            right = 130 if kind == "SIGINT" else 75
            assert states <= {right, -KINDS[kind]}, f"{kind}: states {states}\n{job.text()}"
            assert seconds <= LIMIT, f"{kind}: ended after {seconds:.1f} s\n{job.text()}"
            assert "Traceback" not in job.text(), job.text()
            gone(pids, job.text())
            if states == {right} and last_step(job.run) > before:
                stands(job.run, kind, job.text())
            else:
                by_default += states != {right}
                found = checkpoint.newest(job.run)
                assert (found.step if found else 0) == before, f"{kind}: lost\n{job.text()}"
                words = {"stopped", "interrupted"}
                assert not (job.run / "status.json").exists() or status(job.run)["state"] in words
            job.log.unlink(missing_ok=True)
            return seconds

    outcome = told(*stopped_again_and_again(folder, times, random, LONG, story))
    return Outcome(times, f"{outcome}; {by_default} before the signals were ours", 0)


def in_an_evaluation(folder: Path, times: int, random: Random) -> Outcome:
    """Stop in an evaluation, the last one too; it must be made up for."""
    arguments = [*TINY, "epochs=16"]  # evaluated after 20, 40, 60 and 80 steps

    def story(output: Path, kind: str, random: Random, place: int) -> float:
        step = 20 * (place + 1)
        output.mkdir(exist_ok=True)
        plant = partial(slow_evaluation, 0.5, str(output))
        with Job(output, *arguments, processes=2, plant=plant) as job:
            job.until((output / f"evaluating {step}").exists)
            time.sleep(random.uniform(0, 0.5 if KINDS[kind] else 0.1))
            seconds = end_of(job, ask(job, kind), kind)
            found = checkpoint.newest(job.run)
            assert found
            assert (found.step, found.state["evaluated"] == step) == (step, False), job.text()
            return seconds

    outcome = told(*stopped_again_and_again(folder, times, random, arguments, story))
    return Outcome(times, outcome, 0)


def in_a_save(folder: Path, times: int, random: Random) -> Outcome:
    """Stop while a checkpoint is being written, for a second."""

    def story(output: Path, kind: str, random: Random, place: int) -> float:
        with Job(output, *LONG, processes=2, plant=partial(slow_save, 0.5, str(folder))) as job:
            job.until_step(last_step(job.run) + 1)
            job.until(lambda: in_save(job.run))
            time.sleep(random.uniform(0, 0.8))
            # The one in flight, the one that waits for it, and that of the stop.
            return end_of(job, ask(job, kind), kind, LIMIT + 3)

    return Outcome(times, told(*stopped_again_and_again(folder, times, random, LONG, story)), 0)


def by_a_launcher(folder: Path, times: int, random: Random) -> Outcome:
    """Stop runs under torchrun and accelerate launch: the launcher alone, or all as Ctrl-C does."""
    lasting = [*TINY, "epochs=600", "knn.every_epochs=100"]
    launchers = {
        "torchrun": "torchrun --standalone --nproc_per_node 2",
        "accelerate": "accelerate launch --multi_gpu --num_processes 2 --main_process_port 0",
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    slowest = 0.0
    names = random.sample(list(launchers), 2)
    both = [names[number % 2] for number in range(-(-times // len(KINDS)))]
    for number, (name, kinds) in enumerate(zip(both, chains(times, random), strict=True)):
        output = folder / f"{name}{number}"
        output.mkdir()
        run, log = output / "run", output / "launcher.log"
        command = [*f"{BIN}/{launchers[name]} -m moco_dist.pretrain".split(), *lasting]
        for kind in kinds:
            before, began = last_step(run), time.time()
            with log.open("a") as file:
                launcher = subprocess.Popen(
                    [*command, f"output={output}", "name=run"],
                    env=environment,
                    cwd=ROOT,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            try:
                aim = before + random.randint(1, 30)
                deadline = time.monotonic() + 90
                while last_step(run, began) < aim:
                    assert launcher.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.01)
                pids = family(launcher.pid)
                assert len(pids) >= 3, f"no processes under the launcher: {pids}"
                asked, whole = time.monotonic(), random.random() < 0.5
                if KINDS[kind] == STOP:
                    (run / "STOP").touch()
                elif whole:
                    os.killpg(launcher.pid, KINDS[kind])
                else:
                    os.kill(launcher.pid, KINDS[kind])
                while any(alive(pid) for pid in pids[1:]) and time.monotonic() < asked + 60:
                    time.sleep(0.01)
                seconds = time.monotonic() - asked
                launcher.wait(60)
                text = f"{name}, {'all' if whole else 'the launcher'}\n{log.read_text()}"
                assert seconds <= LIMIT, f"{kind}: ended after {seconds:.1f} s, {text}"
                slowest = max(slowest, seconds)
                gone(pids, text)
                stands(run, kind, text)
            finally:
                for pid in family(launcher.pid):
                    if alive(pid):
                        os.kill(pid, KILL)
                launcher.wait(10)
        # The same steps again, undisturbed.
        part = [*lasting, f"stop_at_step={last_step(run) + 10}"]
        with Job(output, *part, processes=2) as job:
            assert set(job.wait(120)) == {0}, job.text()
        with undisturbed(output / "reference", *part, processes=2) as expected:
            found = account(run)
            assert found == expected, f"another run:\n{found}\n{expected}"
    return Outcome(times, told(len(both), slowest) + f", under {', '.join(sorted(set(both)))}", 0)


def by_the_clock(folder: Path, times: int, random: Random) -> Outcome:
    """Stop by itself before runtime.max_hours are over, or Slurm's end has come."""
    least = 60.0
    with undisturbed(folder / "reference", *TINY, processes=2) as expected:
        for number in range(times):
            slurm = number % 2 == 0
            output, hours = folder / f"run{number}", 3.5 / 3600
            limits = [] if slurm else [f"runtime.max_hours={hours:.6f}"]
            began = time.time()
            end = int(began + 5) if slurm else began + 3.5
            plant = partial(slurm_end, int(end)) if slurm else partial(slow_steps, 0.1)
            with Job(output, *TINY, *limits, processes=2, plant=plant) as job:
                states = job.wait(60)
                assert set(states) == {75}, f"exit statuses {states}\n{job.text()}"
                left = end - time.time()
                # The clock of max_hours starts with the process, a little after the job.
                assert left > (0 if slurm else -0.5), f"{-left:.2f} s too late\n{job.text()}"
                assert left < 2.5, f"{left:.2f} s too early\n{job.text()}"
                least = min(least, left)
                stands(job.run, "the time limit", job.text())
                assert last_step(job.run) > 0, job.text()
            ends_like(expected, output, *TINY)
    return Outcome(times, f"stopped and saved {least:.2f} s or more before the end", 0)


def twice(folder: Path, times: int, random: Random) -> Outcome:
    """End at once by a second SIGINT, in a save that takes ten seconds."""
    slowest, most = 0.0, 0
    with undisturbed(folder / "reference", *TINY, processes=2) as expected:
        for number in range(times):
            output = folder / f"run{number}"
            with in_slow_save(output, folder / "slow", 5, INT, random) as job:
                time.sleep(2.5)
                kept, done = checkpoint.newest(job.run), last_step(job.run)
                assert kept, job.text()
                job.send(INT)
                again = time.monotonic()
                states = job.wait(30)
                seconds = time.monotonic() - again
                assert set(states) == {130}, f"exit statuses {states}\n{job.text()}"
                assert seconds <= 2, f"ended after {seconds:.1f} s\n{job.text()}"
                assert "ended at once by a second signal" in job.text(), job.text()
                assert status(job.run)["state"] == "interrupted", job.text()
                found = checkpoint.newest(job.run)
                assert found, job.text()
                assert found.step == kept.step, f"saved after all\n{job.text()}"
                slowest, most = max(slowest, seconds), max(most, done - kept.step)
            ends_like(expected, output, *TINY)
    return Outcome(times, f"gone after {slowest:.1f} s at most, resumed from the older one", most)


def echoed(folder: Path, times: int, random: Random) -> Outcome:
    """Take the same signal twice within 0.3 seconds for one: stopped and saved."""

    def story(output: Path, kind: str, random: Random, place: int) -> float:
        number = KINDS[kind] or TERM
        kind = signal.Signals(number).name
        with Job(output, *LONG, processes=2, plant=partial(slow_save, 0.5, str(folder))) as job:
            job.until_step(last_step(job.run) + random.randint(1, 6))
            asked = time.monotonic()
            job.send(number)
            time.sleep(random.uniform(0.05, 0.3))
            job.send(number)
            return end_of(job, asked, kind, LIMIT + 3)

    return Outcome(times, told(*stopped_again_and_again(folder, times, random, LONG, story)), 0)


def killed_in_the_last_save(folder: Path, times: int, random: Random) -> Outcome:
    """SIGKILL in the save that SIGTERM began: the older checkpoint stands."""
    most = 0
    with undisturbed(folder / "reference", *TINY, processes=2) as expected:
        for number in range(times):
            output = folder / f"run{number}"
            with in_slow_save(output, folder / "slow", 1, TERM, random) as job:
                time.sleep(random.uniform(0, 1.8))
                job.send(KILL)
                job.wait(10)
                done, found = last_step(job.run), checkpoint.newest(job.run)
                assert in_save(job.run), f"the save was over\n{job.text()}"
                assert found, job.text()
                assert done - found.step <= 7, f"{done}: {found.step}\n{job.text()}"
                most = max(most, done - found.step)
            ends_like(expected, output, *TINY)
    return Outcome(times, "the older checkpoint stood, and each run came to the same end", most)


def of_a_probe(folder: Path, times: int, random: Random) -> Outcome:
    """Stop a probe in the training of its heads: the same results as undisturbed."""
    with Job(folder / "encoder", *TINY) as job:
        assert job.wait(60) == [0], job.text()
        source = job.run
    arguments = [argument for argument in TINY if argument.startswith(("data.", "views.", "knn.k"))]
    arguments += [f"encoder={source}", "augment=false", "batch_size=8", "epochs=400", "optim.lr=1"]
    arguments += ["checkpoint.every_epochs=20", "runtime.device=cpu", "runtime.timeout_seconds=20"]

    def to_the_end(output: Path) -> Any:
        with Job(output, *arguments, processes=2, module="probe") as job:
            assert job.wait(120) == [0, 0], job.text()
            found, done = checkpoint.newest(job.run), json.loads((job.run / "DONE").read_text())
            assert found
            return figures(job.run), done, found.state["files"]

    expected, slowest, runs = to_the_end(folder / "reference"), 0.0, 0
    for kinds in chains(times, random):
        runs += 1
        output = folder / f"probe{runs}"
        for kind in kinds:
            with Job(output, *arguments, processes=2, module="probe") as job:
                job.until_step(last_step(job.run) + 5 * random.randint(1, 20))
                asked = ask(job, kind, *random.choice([(), (0,), (1,)]))
                states = job.wait(60)
                seconds = time.monotonic() - asked
                assert set(states) == {130 if kind == "SIGINT" else 75}, f"{states}\n{job.text()}"
                assert seconds <= LIMIT, f"{kind}: ended after {seconds:.1f} s\n{job.text()}"
                found, said, done = checkpoint.newest(job.run), status(job.run), last_step(job.run)
                # The heads log once in an epoch, of five steps.
                assert found, job.text()
                assert done <= found.step < done + 5, f"{done}: {found.step}\n{job.text()}"
                assert said["step"] == found.step, f"{said}\n{job.text()}"
                assert kind in said["reason"], f"{said}\n{job.text()}"
                assert not (job.run / "STOP").exists(), job.text()
                slowest = max(slowest, seconds)
        assert to_the_end(output) == expected, "another probe"
    return Outcome(times, told(runs, slowest), 0)


FAULTS = [
    Fault("stop in training: SIGTERM, SIGINT, SIGUSR1, SIGHUP, STOP", 5, 40, in_training),
    Fault("the same in the start", 4, 12, in_the_start),
    Fault("the same in an evaluation", 1, 8, in_an_evaluation),
    Fault("the same in a save", 1, 8, in_a_save),
    Fault("the same under torchrun and accelerate launch", 0, 8, by_a_launcher),
    Fault("the same of a probe", 1, 4, of_a_probe),
    Fault("max_hours, Slurm's end of a job", 2, 4, by_the_clock),
    Fault("a second SIGINT, in a save", 1, 3, twice),
    Fault("the same signal twice in 0.3 s", 0, 4, echoed),
    Fault("SIGKILL in the save of a SIGTERM", 1, 5, killed_in_the_last_save),
]
