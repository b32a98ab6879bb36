"""One of four processes lost, stuck or different, and numbers that are not finite."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from moco_dist import checkpoint, comms, config_files, guard, moco, peers, shapes, trainer, views
from moco_dist.plan import Plan, Step
from moco_dist.trainer import Trainer
from tests.faults.jobs import KILL, TERM, TINY, Job, account, last_step, status, undisturbed
from tests.faults.table import Fault, Outcome

PROCESSES = 4
SMALL = [*TINY, "epochs=4"]
STEPS = 20
IMAGES = 45
INTERVAL = 5
# Longest time that the others may take to end, in seconds.
SOON = 10

# Where a step is before its first collective, between that and the second, and after them.
PLACES: dict[str, tuple[Any, str]] = {
    "before": (comms, "all_gather_with_note"),
    "during": (moco, "info_nce"),
    "after": (guard, "gradient_norm"),
}


def _before(owner: Any, name: str, step: int, act: Callable[[], object]) -> None:
    """Let `owner.name` call `act` first when `step` steps are done."""
    original = getattr(owner, name)

    def patched(*arguments: Any, **options: Any) -> Any:
        if peers.me.training and peers.me.step == step:
            act()
        return original(*arguments, **options)

    setattr(owner, name, patched)


def _hang(whom: int, place: str, step: int, sign: Path, rank: int) -> None:
    def act() -> None:
        sign.touch()
        time.sleep(600)

    if rank == whom:
        _before(*PLACES[place], step, act)


def _fail(whom: int, place: str, step: int, rank: int) -> None:
    def act() -> None:
        raise ZeroDivisionError("planted here")

    if rank == whom:
        _before(*PLACES[place], step, act)


def killed(folder: Path, times: int, random: Random) -> Outcome:
    """Kill one process while the others wait for it; the same command must go on."""
    slowest, worst, kept = 0.0, 0, 0
    with undisturbed(folder / "reference", *SMALL, processes=PROCESSES) as expected:
        for number in range(times):
            # The first one is process 0, which prints and saves.
            whom = random.randrange(PROCESSES) if number else 0
            place = random.choice(["before", "during"])
            step, sign = random.randint(1, STEPS - 1), folder / f"sign{number}"
            plant = partial(_hang, whom, place, step, sign)
            output = folder / f"run{number}"
            with Job(output, *SMALL, processes=PROCESSES, plant=plant) as job:
                job.until(sign.exists)
                time.sleep(random.uniform(0.1, 0.6))
                job.send(KILL, whom)
                slowest = max(slowest, ends(job, whom, f"died, at step {step}, "))
                kept = max((saved for saved, _ in checkpoint.step_folders(job.run)), default=0)
                assert step - kept <= INTERVAL, f"{kept} was kept at {step}\n{job.text()}"
                worst = max(worst, step - kept)
        with Job(output, *SMALL, processes=PROCESSES) as job:
            assert set(job.wait()) == {0}, job.text()
            assert not kept or f"resumed at step {kept}," in " ".join(job.text().split()), (
                job.text()
            )
            assert account(job.run) == expected, job.text()
    return Outcome(
        times, f"others named it and ended in {slowest:.1f} s at most; the last went on", worst
    )


def stopped(folder: Path, times: int, random: Random) -> Outcome:
    """Stop one process by SIGSTOP; the others must not wait for it longer than the timeout."""
    timeout, slowest = 5, 0.0
    for number in range(times):
        whom, step = random.randrange(PROCESSES), random.randint(1, STEPS - 1)
        sign = folder / f"sign{number}"
        plant = partial(_hang, whom, random.choice(["before", "during"]), step, sign)
        arguments = [*SMALL, f"runtime.timeout_seconds={timeout}"]
        output = folder / f"run{number}"
        with Job(output, *arguments, processes=PROCESSES, plant=plant) as job:
            job.until(sign.exists)
            job.send(signal.SIGSTOP, whom)
            what = f"is stopped (SIGSTOP), at step {step}, "
            slowest = max(slowest, ends(job, whom, what, timeout + SOON))
            job.send(KILL, whom)
            job.wait(5)
    return Outcome(times, f"others named it and ended in {slowest:.1f} s, timeout {timeout} s")


def raised(folder: Path, times: int, random: Random) -> Outcome:
    """Let one process fail before, between and after the collectives of a step."""
    slowest = 0.0
    for number in range(times):
        whom, step = random.randrange(PROCESSES), random.randint(0, STEPS - 1)
        plant = partial(_fail, whom, list(PLACES)[number % len(PLACES)], step)
        output = folder / f"run{number}"
        with Job(output, *SMALL, processes=PROCESSES, plant=plant) as job:
            job.until(lambda job=job: "planted here" in job.text())
            slowest = max(slowest, ends(job, whom, f"failed at step {step}, "))
            text = job.text()
            assert text.count("Traceback (most recent call last)") == 1, text
            assert text.count("in act\n") == 1, text
    return Outcome(times, f"one traceback, one sentence; all ended in {slowest:.1f} s at most")


def ends(job: Job, whom: int, what: str, seconds: float = SOON) -> float:
    """Return how long the others took to end; the one sentence must name process `whom`."""
    began = time.monotonic()
    others = [rank for rank in range(PROCESSES) if rank != whom]
    states = job.wait(seconds, *others)
    took = time.monotonic() - began
    assert set(states) == {70}, f"{states}\n{job.text()}"
    name = f"process {whom} (host {socket.gethostname()}, pid {job.pid(whom)}) {what}"
    only_error(job, name)
    return took


def only_error(job: Job, *parts: str) -> None:
    """Check that the user was told once, and that the sentence has `parts`."""
    errors = job.errors()
    assert len(errors) == 1, f"{len(errors)} sentences\n{job.text()}"
    missing = [part for part in parts if part not in errors[0]]
    assert not missing, f"not said: {missing}\n{job.text()}"


# What makes one process another, the step that finds it, and what is said of it.
DIFFERENCES = {
    "seed": (0, "the configuration differs between the processes: seed is "),
    "rate": (0, "the configuration differs between the processes: optim.lr is "),
    "pixel": (0, "the data set's fingerprint differs between the processes: it is "),
    "weight": (0, "the fingerprint of the new model differs between the processes: it is "),
    "samples": (3, " samples with checksum "),
    "behind": (3, " is at step 2"),
    "longer": (3, " a batch of 9"),
    "double": (3, "16"),
    "half": (3, "4"),
    "query": (6, "the checksum of the state after step 6 differs between the processes: it is "),
    "key": (6, "the checksum of the state after step 6 differs between the processes: it is "),
    "queue": (6, "the checksum of the state after step 6 differs between the processes: it is "),
    "momentum": (6, "the checksum of the state after step 6 differs between the processes: it is "),
}


def _differ(whom: int, what: str, rank: int) -> None:
    if rank == whom:
        _PLANTS[what]()


def _other_argument(argument: str) -> None:
    load = config_files.load
    config_files.load = lambda schema, arguments: load(schema, [*arguments, argument])


def _other_pixel() -> None:
    draw = shapes.draw

    def patched(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        pixels, labels = draw(*arguments, **options)
        pixels[3, 1, 4, 4] ^= 1
        return pixels, labels

    shapes.draw = patched


def _other_weight() -> None:
    build = trainer.build_encoder

    def patched(*arguments: Any, **options: Any) -> Any:
        encoder = build(*arguments, **options)
        _flip(next(encoder.parameters()))
        return encoder

    trainer.build_encoder = patched


def _other_rows(change: Callable[[Plan, Step], Step]) -> None:
    rows = Plan.step

    def patched(self: Plan, step: int, key_views: int = 1) -> Step:
        found = rows(self, step, key_views)
        return change(self, found) if step == 3 else found

    rows_of = patched
    Plan.step = rows_of  # type: ignore[method-assign]


def _in_step(step: int, act: Callable[[Trainer], object]) -> None:
    """Let the trainer call `act` on itself before it takes the step after `step` steps."""
    train_step, done = Trainer.train_step, []

    def patched(self: Trainer, wants_save: bool = False) -> Any:
        if self.step == step and not done:
            done.append(act(self))
        return train_step(self, wants_save)

    Trainer.train_step = patched  # type: ignore[method-assign]


def _step_back(self: Trainer) -> None:
    self.step -= 1


@torch.no_grad()
def _flip(tensor: Tensor) -> None:
    """Flip a bit in the middle of a tensor of 32-bit numbers, which stay finite."""
    tensor.detach().view(-1).view(torch.int32)[tensor.numel() // 2] ^= 1 << 20


_PLANTS: dict[str, Callable[[], None]] = {
    "seed": partial(_other_argument, "seed=7"),
    "rate": partial(_other_argument, "optim.lr=0.07"),
    "pixel": _other_pixel,
    "weight": _other_weight,
    "samples": partial(_other_rows, lambda plan, rows: replace(rows, samples=plan.order(9)[:8])),
    "behind": partial(_in_step, 3, _step_back),
    "longer": partial(
        _other_rows, lambda plan, rows: replace(rows, samples=plan.order(rows.epoch)[:9])
    ),
    "double": partial(_other_rows, lambda plan, rows: replace(plan, batch_size=16).step(1)),
    "half": partial(_other_rows, lambda plan, rows: replace(plan, batch_size=4).step(1)),
    "query": partial(_in_step, 4, lambda self: _flip(next(self.moco.query_encoder.parameters()))),
    "key": partial(_in_step, 4, lambda self: _flip(next(self.moco.key_encoder.parameters()))),
    "queue": partial(_in_step, 4, lambda self: _flip(self.moco.queue.keys)),
    "momentum": partial(
        _in_step,
        4,
        lambda self: _flip(next(iter(self.optimizer.state.values()))["momentum_buffer"]),
    ),
}


def different(folder: Path, times: int, random: Random) -> Outcome:
    """Give one process another configuration, data, model, batch or state."""
    slowest = 0.0
    for number in range(times):
        what = list(DIFFERENCES)[number % len(DIFFERENCES)]
        step, said = DIFFERENCES[what]
        whom = random.randrange(PROCESSES)
        arguments = [*SMALL, "checkpoint.every_steps=2", "checkpoint.keep_last=9"]
        plant = partial(_differ, whom, what)
        output = folder / f"run{number}"
        with Job(output, *arguments, processes=PROCESSES, plant=plant) as job:
            began = time.monotonic()
            if step:
                job.until_step(step)
                began = time.monotonic()
            states = job.wait(SOON)
            slowest = max(slowest, time.monotonic() - began)
            print(what, whom, states, time.monotonic() - began, job.text()[-1500:])
    return Outcome(times, f"{slowest:.1f}")


FAULTS = [
    Fault("one of four processes killed in a collective", 2, 10, killed),
    Fault("one of four stopped with SIGSTOP", 1, 6, stopped),
    Fault("one of four raises before, during, after the first collective", 3, 12, raised),
    Fault("one of four has another config, data, batch or model", len(DIFFERENCES), 26, different),
]
