"""The speed of a training step: images, parts, bytes sent, memory and arithmetic."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, register_flop_formula

from moco_dist.distributed import comms
from moco_dist.pretrain import figures
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.loop import figures_of
from moco_dist.pretrain.step_graph import Stepper, Taken
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import environment

# The parts of a step, in order. Gradients of several processes are summed within "backward"; "rest"
# is the plan of the rows and what all processes agree on.
PARTS = (
    *("views", "key", "query", "loss", "backward", "optimizer", "momentum", "memory"),
    *("communication", "tracking", "rest"),
)


@dataclass(frozen=True)
class Speed:
    """The figures of one configuration on this process; times are medians, in seconds."""

    images_per_second: float
    step_seconds: float
    # Process time of a step: of all its threads, without the time that other programs take.
    cpu_seconds: float
    # Each of PARTS, from steps that are not in `step_seconds`.
    parts: dict[str, float]
    # Both views of an image, without the rest of a step.
    pipeline_images_per_second: float
    # Sent by this process in a step; it receives as many bytes. Those of keys include the moments
    # of BatchNorm groups that span processes.
    bytes_of_keys: int
    bytes_of_gradients: int
    memory_gb: float
    # Floating-point operations of a step on this process, without its views; operations per second
    # of the fastest matrix product.
    flops: int
    peak_flops: float

    @property
    def share_of_peak(self) -> float:
        """The speed of the model's arithmetic as a share of the matrix product's."""
        return self.flops / self.step_seconds / self.peak_flops


def timed_parts(trainer: Trainer, hooks: RunHooks, steps: int) -> dict[str, float]:
    """Return the seconds that each of PARTS takes in a step, the mean of `steps` steps.

    The parts are the ranges that the trainer records for torch.profiler, each without those inside
    it. On a GPU they are the time of the kernels that a part has launched; what no part launched
    on its own thread is of the backward pass, which autograd runs on another one.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its log would stand between our lines
    on_gpu = trainer.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            with record_function("rest"):
                trainer.train_step(hooks)
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in profiler.events() or []:
        part = _part(event)
        if on_gpu and event.device_type.name == "CPU":
            seconds[part or "backward"] += event.self_device_time_total / 1e6
        elif event.name in PARTS:
            seconds[event.name] += event.cpu_time_total / 1e6
            if outer := _part(event.cpu_parent):
                seconds[outer] -= event.cpu_time_total / 1e6
    return {part: total / steps for part, total in seconds.items()}


def _part(event: FunctionEvent | None) -> str:
    """Return the innermost of PARTS that an event of the profiler is in, or an empty text."""
    while event is not None and event.name not in PARTS:
        event = event.cpu_parent
    return event.name if event else ""


def wait_for(device: torch.device) -> None:
    """Return once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device, times: int = 1) -> tuple[float, float]:
    """Return the wall time and the process time of `work`, so many times."""
    wait_for(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        work()
    wait_for(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(trainer: Trainer, steps: int, repeats: int, warm_up: int) -> Speed:
    """Return the speed of the trainer's step, from `repeats` times `steps` real steps.

    A collective, which changes weights and queue.
    """
    device, config, hooks = trainer.device, trainer.config, RunHooks(trainer)
    take = Stepper(trainer, hooks)
    trainer.moco.fill_up(len(trainer.splits.train))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(warm_up):
        take()
    flops = step_flops(trainer, hooks)
    peaks, walls, cpus, parts = [peak_flops(trainer)], [], [], []
    for _ in range(repeats):
        wall, cpu = seconds(take, device, steps)
        walls.append(wall / steps)
        cpus.append(cpu / steps)
        parts.append(timed_parts(trainer, hooks, steps))
        peaks.append(peak_flops(trainer))
    before = comms.sent_bytes
    taken = take()
    sent = comms.sent_bytes - before
    halved = config.runtime.gradients == "bf16"
    gradients = sum(2 * p.numel() if halved else p.nbytes for p in hooks.parameters)
    medians = {part: statistics.median(each[part] for each in parts) for part in PARTS}
    medians["tracking"] = tracking_seconds(trainer, taken)
    step = statistics.median(walls)
    return Speed(
        images_per_second=config.batch_size / step,
        step_seconds=step,
        cpu_seconds=statistics.median(cpus),
        parts=medians,
        pipeline_images_per_second=pipeline_speed(trainer, repeats),
        bytes_of_keys=sent,
        bytes_of_gradients=comms.all_reduce_bytes(gradients),
        memory_gb=environment.memory_gb(device),
        flops=flops,
        peak_flops=max(peaks),
    )


def both_views(trainer: Trainer, step: int) -> None:
    """Make the views of a step, of queries and of keys."""
    trainer.source.begin(step)
    rows = trainer.plan.step(step, len(trainer.config.moco.passes))
    for views in trainer.contrast.make_views(rows):
        for make in chain.from_iterable(views):
            make()


def pipeline(trainer: Trainer) -> Callable[[], None]:
    """Return a function that makes only the views, of one step after the other."""
    steps = count(trainer.step)
    return lambda: both_views(trainer, next(steps))


def pipeline_speed(trainer: Trainer, repeats: int) -> float:
    """Return how many images a second all processes make both views of, and do nothing else."""
    device, work = trainer.device, pipeline(trainer)
    work()
    walls = [seconds(work, device)[0] for _ in range(max(repeats, 5))]
    return trainer.config.batch_size / statistics.median(walls)


@register_flop_formula(torch.ops.moco_dist.sum_of_products)
def _padded(x: list[int], weight: list[int], **_: Any) -> int:
    """Return the operations of a convolution as of any other, with its padding."""
    return conv_flop_count(x, weight, [x[0], weight[0], *x[2:]])


@register_flop_formula(torch.ops.moco_dist.sum_of_products_backward)
def _padded_backward(of_out: list[int], x: list[int], weight: list[int], **_: Any) -> int:
    return 2 * conv_flop_count(x, weight, of_out)


def step_flops(trainer: Trainer, hooks: RunHooks) -> int:
    """Return the floating-point operations of a step on this process, without those of views."""
    with torch.compiler.set_stance("force_eager"):  # what is compiled can't be looked into
        with FlopCounterMode(display=False) as views:
            both_views(trainer, trainer.step)
        with FlopCounterMode(display=False) as whole:
            trainer.train_step(hooks)
    return int(whole.get_total_flops() - views.get_total_flops())


def peak_flops(trainer: Trainer) -> float:
    """Return the floating-point operations a second of a square matrix product on the device."""
    device, precision = trainer.device, trainer.config.precision
    dtype = {"bf16": torch.bfloat16, "fp64": torch.float64}.get(precision, torch.float32)
    side, times = (8192, 20) if device.type == "cuda" else (1536, 2)
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    product = torch.mm(a, b)
    work = partial(torch.mm, a, b, out=product)
    return max(2.0 * side**3 * times / seconds(work, device, times)[0] for _ in range(3))


@torch.no_grad()
def tracking_seconds(trainer: Trainer, taken: Taken) -> float:
    """Return the seconds of a line of metrics and of the figures of health, for each step."""
    settings, device, config = trainer.config.tracking, trainer.device, trainer.config
    line = partial(figures_of, trainer, trainer.step, taken, {}, 1.0)
    total = statistics.median(seconds(line, device)[0] for _ in range(3)) / settings.every_steps
    if every := settings.health_every_steps:
        keys = torch.randn(config.batch_size, config.encoder.dim, device=device).to(trainer.dtype)
        keys, samples = F.normalize(keys, dim=1), trainer.plan.step(0).samples
        mine = keys[trainer.plan.local_rows]
        work = partial(figures.health, trainer.moco, mine, [keys], samples)
        total += statistics.median(seconds(work, device)[0] for _ in range(3)) / every
    return total


def parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())
