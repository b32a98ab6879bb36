"""What protection and tracking cost: the guard of a step, a save in the background, metrics."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch

from moco_dist.config.encoder import EncoderConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.running import CheckpointConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.distributed import agreement, comms
from moco_dist.method.batch_norm import group_statistics
from moco_dist.method.encoder import build_encoder
from moco_dist.method.moco import MoCo
from moco_dist.pretrain import figures, finite, run
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import saving, session
from tests import processes
from tests.faults.table import Fault, Outcome

# The encoder of the demo; its steps are the shortest that anyone would train.
SMALL = [
    *("batch_size=64", "bn_groups=8", "encoder.width=8", "encoder.dim=64", "moco.queue_size=1024"),
    *("data.shapes_train=2000", "data.shapes_test=10", "data.size=32", "runtime.device=cpu"),
]

# The step from which tracking is measured: W&B has started by then.
FIRST_STEP = 100


def guard_of_a_step(folder: Path, times: int, random: Random) -> Outcome:
    """Measure the parts of the guard within real steps, on one and on two processes."""
    parts = []
    for count in (1, 2):
        step, cost = processes.run(measure_guard, count, str(folder / str(count)), times)[0]
        limit = max(0.0005, 0.01 * step)
        assert cost <= limit, f"{1e3 * cost:.2f} ms of {1e3 * step:.0f} ms, limit {1e3 * limit}"
        parts.append(f"{1e3 * cost:.2f} ms of {1e3 * step:.0f} ms on {count}")
    return Outcome(times, f"on its core, a step: {'; '.join(parts)} process(es)")


def measure_guard(output: str, steps: int) -> tuple[float, float]:
    """Return the seconds of a step, and of what the guard does in it.

    They are those of this thread on its core, the median of all steps, and of what the note adds
    to a gather that of the fastest one: other work on the machine counts in neither.
    """
    config = load(PretrainConfig, [*SMALL, f"output={output}"])
    opened = session.start(config)
    trainer = Trainer(config, opened.accelerator, datasets.load(config.data))
    hooks = RunHooks(trainer, opened)
    clocks: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time()
            result = function(*arguments, **named)
            clocks.append(time.thread_time() - began)
            return result

        return call

    trainer.undo.keep = timed(trainer.undo.keep)  # type: ignore[method-assign]
    for owner, name in ((agreement, "note"), (agreement, "agree"), (finite, "norms")):
        setattr(owner, name, timed(getattr(owner, name)))
    # What the note adds to the gather of the keys: with and without it, in turn.
    mine = config.batch_size // comms.world_size()
    keys, note = torch.randn(mine, config.encoder.dim), torch.zeros(5, dtype=torch.int64)
    whole, own, plain, noted = [], [], [], []
    for number in range(steps + 5):
        clocks.clear()
        began = time.thread_time()
        trainer.train_step(hooks)
        taken, cost = time.thread_time() - began, sum(clocks)
        for _ in range(3):  # the first of them waits for the other process
            plain.append(timed_once(lambda: comms.all_gather(keys)))
            noted.append(timed_once(lambda: comms.all_gather_with_note(keys, note)()))
        if number >= 5:
            whole.append(taken)
            own.append(cost)
    extra = max(0.0, min(noted) - min(plain))
    return statistics.median(whole), statistics.median(own) + extra


def timed_once(work: Callable[[], Any]) -> float:
    """Return the seconds that `work()` takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def tracking_of_a_run(folder: Path, times: int, random: Random) -> Outcome:
    """Measure what a run does besides its steps, at the default intervals, with W&B offline."""
    step, cost, health_cost = processes.run(measure_tracking, 1, str(folder), times)[0]
    text = f"tracking {1e3 * cost:.2f} ms of a step of {1e3 * step:.0f} ms ({cost / step:.1%}), "
    text += f"of it health {1e3 * health_cost:.2f} ms ({health_cost / step:.1%})"
    assert cost < 0.02 * step, text
    assert health_cost < 0.01 * step, text
    return Outcome(times, f"{text}, all threads and W&B's process")


def measure_tracking(output: str, steps: int) -> tuple[float, float, float]:
    """Return the seconds of a step without its health, and those of tracking and of health.

    They are processor time over `steps` steps of a run; what isn't of the steps is of tracking:
    metrics, their lines, the console, alarms, and the threads and the process of W&B.
    """
    os.environ["WANDB_MODE"] = "offline"
    train_step, of_step = Trainer.train_step, figures.health
    inside: list[float] = []
    healthy: list[float] = []
    marks: list[tuple[float, float, float]] = []

    def all_time() -> float:
        children = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
        return time.process_time() + sum(times.user + times.system for times in children)

    def timed_health(*arguments: Any) -> dict[str, float]:
        began = time.thread_time()
        found = of_step(*arguments)
        healthy.append(time.thread_time() - began)
        return found

    def timed_step(self: Trainer, *arguments: Any) -> Any:
        if self.step in (FIRST_STEP, FIRST_STEP + steps):
            marks.append((all_time(), sum(inside), sum(healthy)))
        began = time.thread_time()
        result = train_step(self, *arguments)
        inside.append(time.thread_time() - began)
        return result

    figures.health = timed_health  # type: ignore[assignment]
    Trainer.train_step = timed_step  # type: ignore[assignment, method-assign]
    quiet = ["knn.every_epochs=0", "checkpoint.every_epochs=0", "tracking.media_every_epochs=0"]
    place = [f"output={output}", f"stop_at_step={FIRST_STEP + steps + 1}"]
    run.run(load(PretrainConfig, [*SMALL, *quiet, *place]))
    whole, own, of_health = (after - before for before, after in zip(*marks, strict=True))
    return (own - of_health) / steps, (whole - own + of_health) / steps, of_health / steps


def background(folder: Path, times: int, random: Random) -> Outcome:
    """Compare what a save in the background costs a loop with the stall of one that is waited for.

    The state is of ResNet-50 size. A step of the loop is matrix products on one thread for a tenth
    of a second, as the forward and backward passes, and then waits for the copy, as the optimizer.
    What the loop loses is its time with a save less its time without one, measured in turn.
    """
    torch.set_num_threads(1)
    network = MoCo(build_encoder(EncoderConfig("resnet50", stem="imagenet"), 0), 65536, 128)
    model = network.state_dict()
    momentum = {f"momentum.{k}": p.detach() for k, p in network.query_encoder.named_parameters()}
    statistic = group_statistics(network.query_encoder)
    size = sum(t.nbytes for part in (model, momentum, statistic) for t in part.values())
    saver = saving.Saver(folder, CheckpointConfig(keep_last=2))
    work = torch.randn(512, 512)

    def products(number: int) -> None:
        for _ in range(number):
            work @ work

    products(20)
    a_tenth = int(0.1 / min(timed_once(lambda: products(20)) / 20 for _ in range(5)))

    def loop(steps: int) -> None:
        for _ in range(steps):
            products(a_tenth)
            saver.copied()

    def save(step: int) -> None:
        saver.start(step, model, momentum | statistic, {})

    save(0)  # the first one also makes room for the copy
    saver.finish()
    stalls, costs = [], []
    for number in range(1, times + 1):
        began = time.perf_counter()
        save(2 * number)
        saver.finish()
        stalls.append(time.perf_counter() - began)
        steps = int(10 * stalls[-1]) + 3
        before = timed_once(partial(loop, steps))
        began = time.perf_counter()
        save(2 * number + 1)
        loop(steps)
        with_save = time.perf_counter() - began
        saver.finish()
        costs.append(with_save - (before + timed_once(partial(loop, steps))) / 2)
    stall, cost = statistics.median(stalls), statistics.median(costs)
    text = f"{size / 1e6:.0f} MB: a save stalls a loop {stall:.2f} s, in the background "
    text += f"{1e3 * cost:.0f} ms ({cost / stall:.1%})"
    assert cost < 0.05 * stall, text
    return Outcome(times, text)


FAULTS = [
    Fault("cost of the guard", 30, 200, guard_of_a_step),
    Fault("cost of tracking and health", 0, 400, tracking_of_a_run),
    Fault("cost of a save in the background", 0, 11, background),
]
