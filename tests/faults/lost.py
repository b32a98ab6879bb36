"""One of four processes lost, stuck or different, and numbers that are not finite."""

from __future__ import annotations

import json
import re
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

from moco_dist.config import yaml_files
from moco_dist.data import shapes
from moco_dist.distributed import comms, peers
from moco_dist.method import loss as method_loss
from moco_dist.method import views
from moco_dist.method.plan import Plan, Step
from moco_dist.pretrain import finite, mechanisms, trainer
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import checkpoint
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
    "during": (mechanisms, "info_nce"),
    "after": (finite, "norms"),
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
    """Kill one process while the others wait for it; the same command must resume the run."""
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
            resumed = f"resumed at step {kept}," if kept else ""
            assert resumed in " ".join(job.text().split()), job.text()
            assert account(job.run) == expected, job.text()
    outcome = f"others named it and ended in {slowest:.1f} s at most; the last was resumed"
    return Outcome(times, outcome, worst)


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


def _never_returns(whom: int, step: int, sign: Path, rank: int) -> None:
    """Let `whom` hang before a collective, and the others in it, as NCCL lets them."""
    _hang(whom, "before", step, sign, whom if rank == whom else -1)
    if rank != whom:
        _before(*PLACES["before"], step, partial(time.sleep, 600))


def waited_for(folder: Path, times: int, random: Random) -> Outcome:
    """Lose one process while the others are in a collective that never returns."""
    slowest = 0.0
    for number in range(times):
        # Process 0 writes the status; a process that is only stopped may go on within the timeout.
        whom, step = random.randrange(1, PROCESSES), random.randint(1, STEPS - 1)
        stops, timeout = number % 2 == 1, 5
        sign, output = folder / f"sign{number}", folder / f"run{number}"
        arguments = [*SMALL, f"runtime.timeout_seconds={timeout}"] if stops else SMALL
        plant = partial(_never_returns, whom, step, sign)
        with Job(output, *arguments, processes=PROCESSES, plant=plant) as job:
            job.until(sign.exists)
            time.sleep(random.uniform(0.1, 0.6))
            job.send(signal.SIGSTOP if stops else KILL, whom)
            what = f"{'is stopped (SIGSTOP)' if stops else 'died'}, at step {step}, "
            took = ends(job, whom, what, timeout + 10 + SOON if stops else SOON)
            slowest = max(slowest, 0 if stops else took)
            found = status(job.run)
            assert (found["exit_status"], found["again"]) == (70, True), found
            assert f"error: {found['reason']}" == job.errors()[0], f"{found}\n{job.text()}"
            job.send(KILL, whom)
            job.wait(5)
    return Outcome(times, f"others named a dead one and ended in {slowest:.1f} s at most")


def raised(folder: Path, times: int, random: Random) -> Outcome:
    """Let one process fail before, between and after the collectives of a step."""
    slowest = 0.0
    for number in range(times):
        whom, step = random.randrange(PROCESSES), random.randint(0, STEPS - 1)
        plant = partial(_fail, whom, list(PLACES)[number % len(PLACES)], step)
        output = folder / f"run{number}"
        with Job(output, *SMALL, processes=PROCESSES, plant=plant) as job:
            job.until(partial(_says, job, "planted here"))
            slowest = max(slowest, ends(job, whom, f"failed at step {step}, "))
            text = job.text()
            assert text.count("Traceback (most recent call last)") == 1, text
            assert text.count("in act\n") == 1, text
    return Outcome(times, f"one traceback, one sentence; all ended in {slowest:.1f} s at most")


def _says(job: Job, words: str) -> bool:
    return words in job.text()


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
_STATE = "the checksum of the state after step 6 differs between the processes: it is "
DIFFERENCES = {
    "seed": (0, "the configuration differs between the processes: seed is "),
    "pixel": (0, "the data set's fingerprint differs between the processes: it is "),
    "weight": (0, "the fingerprint of the new model differs between the processes: it is "),
    "samples": (3, " samples with checksum "),
    "query": (6, _STATE),
    "behind": (3, " at step 2"),
    "longer": (3, " a batch of 9"),
    "double": (3, " a batch of 16"),
    "half": (3, " a batch of "),
    "rate": (0, "the configuration differs between the processes: optim.lr is "),
    "key": (6, _STATE),
    "queue": (6, _STATE),
    "momentum": (6, _STATE),
}


def _differ(whom: int, what: str, rank: int) -> None:
    if rank == whom:
        _PLANTS[what]()


def _other_argument(argument: str) -> None:
    load = yaml_files.load
    yaml_files.load = lambda schema, arguments: load(schema, [*arguments, argument])


def _other_pixel() -> None:
    draw = shapes.draw

    def patched(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        pixels, labels = draw(*arguments, **options)
        pixels[3, 1, 4, 4] ^= 1
        return pixels, labels

    shapes.draw = patched


def _other_weight() -> None:
    build = trainer.build_encoder  # type: ignore[attr-defined]

    def patched(*arguments: Any, **options: Any) -> Any:
        encoder = build(*arguments, **options)
        _flip(next(encoder.parameters()))
        return encoder

    trainer.build_encoder = patched  # type: ignore[attr-defined]


def _other_rows(change: Callable[[Plan, Step], Step]) -> None:
    rows = Plan.step

    def patched(self: Plan, step: int, key_views: int = 1) -> Step:
        found = rows(self, step, key_views)
        return change(self, found) if step == 3 else found

    Plan.step = patched  # type: ignore[method-assign]


def _in_step(step: int, act: Callable[[Trainer], object]) -> None:
    """Let the trainer call `act` on itself before it takes the step after `step` steps."""
    train_step = Trainer.train_step
    done: list[object] = []

    def patched(self: Trainer, *arguments: Any) -> Any:
        if self.step == step and not done:
            done.append(act(self))
        return train_step(self, *arguments)

    Trainer.train_step = patched  # type: ignore[assignment, method-assign]


def _step_back(self: Trainer) -> None:
    self.step -= 1


@torch.no_grad()
def _flip(tensor: Tensor) -> None:
    """Flip a bit in the middle of a tensor of 32-bit numbers, which stay finite."""
    bits = tensor.detach().view(torch.int32)  # in either memory format
    bits[tuple(size // 2 for size in bits.shape)] ^= 1 << 20


_PLANTS: dict[str, Callable[[], None]] = {
    "seed": partial(_other_argument, "seed=7"),
    "rate": partial(_other_argument, "optim.lr=0.07"),
    "pixel": _other_pixel,
    "weight": _other_weight,
    "samples": partial(_other_rows, lambda plan, rows: replace(rows, samples=plan.order(9)[:8])),
    "behind": partial(_in_step, 3, _step_back),
    "longer": partial(_other_rows, lambda plan, rows: replace(rows, samples=plan.order(0)[:9])),
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
    """Give one process another configuration, data set, model, batch or state; none may count."""
    slowest = 0.0
    for number in range(times):
        what = list(DIFFERENCES)[number % len(DIFFERENCES)]
        step, said = DIFFERENCES[what]
        whom = random.randrange(PROCESSES)
        arguments = [*SMALL, "checkpoint.every_steps=2", "checkpoint.keep_last=9"]
        output = folder / f"run{number}"
        plant = partial(_differ, whom, what)
        with Job(output, *arguments, processes=PROCESSES, plant=plant) as job:
            job.until(partial(_says, job, "error: "))
            began = time.monotonic()
            states = job.wait(SOON)
            slowest = max(slowest, time.monotonic() - began)
            assert set(states) == {70}, f"{what}: {states}\n{job.text()}"
            # Of two that differ, process 0 is the one that the others are compared with.
            named = re.compile(rf"process [0-9, ]*\b{whom}\b")
            only_error(job, said)
            assert named.search(job.errors()[0]), f"process {whom} is not named\n{job.text()}"
            assert last_step(job.run) == step, f"{what}: a step was counted\n{job.text()}"
            kept = {saved for saved, _ in checkpoint.step_folders(job.run)}
            assert kept <= {2, 4} & set(range(step)), f"{what}: {kept}\n{job.text()}"
            assert step < 6 or 2 in kept, f"{what}: {kept}\n{job.text()}"
            whole = checkpoint.newest(job.run)
            assert (whole.step if whole else 0) == max(kept, default=0), job.text()
    return Outcome(times, f"found before it counted; all ended in {slowest:.1f} s at most")


def _spoil(whom: int, what: str, step: int, sample: int, rank: int) -> None:
    if rank == whom:
        _SPOILS[what](step, sample)


def _spoil_image(step: int, sample: int) -> None:
    make = views.make

    def patched(
        images: Tensor, config: Any, seed: int, epoch: Any, index: Tensor, *others: Any
    ) -> Tensor:
        made = make(images, config, seed, epoch, index, *others)
        # An image is in one step of an epoch.
        if epoch == step // (IMAGES // 8):
            made[index == sample, 1, 2, 3] = torch.nan
        return made

    views.make = patched  # type: ignore[assignment]


def _spoil_loss(by: Callable[[Tensor], Tensor], step: int, sample: int) -> None:
    info_nce = method_loss.info_nce

    def patched(*arguments: Any) -> tuple[Tensor, Tensor]:
        loss, logits = info_nce(*arguments)
        return by(loss) if peers.me.step == step else loss, logits

    method_loss.info_nce = patched  # type: ignore[assignment]


def _spoil_gradient(step: int, sample: int) -> None:
    def spoiled(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[tuple(sample % size for size in gradient.shape)] = torch.nan
        return gradient

    def act(self: Trainer) -> None:
        parameters = list(self.moco.query_encoder.parameters())
        parameters[sample % len(parameters)].register_hook(spoiled)

    _in_step(step, act)


_SPOILS: dict[str, Callable[[int, int], None]] = {
    "image": _spoil_image,
    # The gradients of a sum with infinity are finite.
    "loss alone": partial(_spoil_loss, lambda loss: loss + torch.inf),
    "gradient": _spoil_gradient,
    "loss": partial(_spoil_loss, lambda loss: loss * torch.inf),
}
_NAMED = {"image": "gradient", "loss alone": "train/loss"}
_NAMED |= {"gradient": "gradient", "loss": "train/loss"}


def spoiled(folder: Path, times: int, random: Random) -> Outcome:
    """Put a number that is not finite into one process; nothing of it may reach the state."""
    slowest, step = 0.0, 0
    expected_files: Any = None
    with undisturbed(folder / "reference", *SMALL, processes=PROCESSES) as expected:
        for number in range(times):
            what = list(_SPOILS)[number % len(_SPOILS)]
            if number % len(_SPOILS) == 0:
                step = random.randint(1, STEPS - 1)
                stop = f"stop_at_step={step}"
                output = folder / f"stop{number}"
                with undisturbed(output, *SMALL, stop, processes=PROCESSES) as found:
                    expected_files = found["content"]["files"]
            whom = random.randrange(PROCESSES)
            samples = Plan(IMAGES, 8, 0).step(step).samples.tolist()
            sample = samples[2 * whom + random.randrange(2)]
            output = folder / f"run{number}"
            plant = partial(_spoil, whom, what, step, sample)
            with Job(output, *SMALL, processes=PROCESSES, plant=plant) as job:
                job.until_step(step)
                began = time.monotonic()
                states = job.wait(SOON)
                slowest = max(slowest, time.monotonic() - began)
                assert set(states) == {70}, f"{what}: {states}\n{job.text()}"
                whose = f"the images [{sample}] are not" if what == "image" else "all its images"
                only_error(job, _NAMED[what], f"not finite in step {step} (", whose)
                assert f"saved after step {step} of {STEPS}" in job.errors()[0], job.text()
                _check_spoiled(job.run, step, samples, [sample] if what == "image" else [])
                found = account(job.run)
                assert found["step"] == step, f"{what}: {found}\n{job.text()}"
                same = found["content"]["files"] == expected_files
                assert same, f"{what}: the state after step {step} is another one\n{job.text()}"
            with Job(output, *SMALL, processes=PROCESSES) as job:
                assert set(job.wait()) == {0}, job.text()
                assert account(job.run) == expected, f"{what}: another run\n{job.text()}"
    outcome = f"one sentence, state as before the step, resumed; ended in {slowest:.1f} s at most"
    return Outcome(times, outcome, 0)


def _check_spoiled(run: Path, step: int, samples: list[int], images: list[int]) -> None:
    noted = json.loads((run / "not_finite.json").read_text())
    noted.pop("not_finite")
    assert noted == {"step": step, "images_not_finite": images, "samples": samples}, noted
    found = checkpoint.newest(run)
    assert found
    for name, tensor in (found.model | found.optimizer).items():
        assert tensor.isfinite().all(), f"{name} is not finite in {found.path}"


def hung(folder: Path, times: int, random: Random) -> Outcome:
    """Send SIGTERM to all while one hangs for ever; all must be gone after the time of grace."""
    grace, slowest, worst = 3, 0.0, 0
    for number in range(times):
        step, sign = random.randint(1, STEPS - 1), folder / f"sign{number}"
        plant = partial(_hang, 1, random.choice(list(PLACES)), step, sign)
        output = folder / f"run{number}"
        arguments = [*SMALL, f"runtime.grace_seconds={grace}"]
        with Job(output, *arguments, processes=PROCESSES, plant=plant) as job:
            job.until(sign.exists)
            began = time.monotonic()
            job.send(TERM)
            states = job.wait(grace + 3)
            slowest = max(slowest, time.monotonic() - began)
            assert set(states) == {70}, f"{states}\n{job.text()}"
            # Process 0 may have noticed first that another one has ended.
            assert status(job.run)["exit_status"] == 70, status(job.run)
            kept = max((saved for saved, _ in checkpoint.step_folders(job.run)), default=0)
            whole = checkpoint.newest(job.run)
            assert (whole.step if whole else 0) == kept, job.text()
            assert step - kept <= INTERVAL, f"{kept} was kept at {step}\n{job.text()}"
            worst = max(worst, step - kept)
        shutil.rmtree(output)
    return Outcome(times, f"all ended {slowest:.1f} s after the signal, grace {grace} s", worst)


FAULTS = [
    Fault("one of four processes killed in a collective", 1, 8, killed),
    Fault("one of four stopped with SIGSTOP", 1, 5, stopped),
    Fault("one of four lost in a collective that never returns", 1, 4, waited_for),
    Fault("one of four raises before, during, after the first collective", 1, 9, raised),
    Fault("one of four has another config, data, model, batch or state", 3, 26, different),
    Fault("a number that is not finite in one of four", 1, 8, spoiled),
    Fault("hung collective and a signal", 1, 5, hung),
]
