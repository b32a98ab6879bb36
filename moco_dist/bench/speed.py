"""The speed of a trainer's step on this machine: images, parts, bytes, memory and arithmetic."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from itertools import chain, count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, register_flop_formula

from moco_dist.data.view_source import views_of
from moco_dist.distributed import comms
from moco_dist.method import loss as method_loss
from moco_dist.pretrain import finite, health
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import environment

# What a step is made of, in the order in which it comes. The gradients of several processes are
# summed within "backward"; "rest" is the plan of the rows, and what all processes agree on.
PARTS = (
    *("views", "key", "query", "loss", "backward", "optimizer", "momentum", "queue"),
    *("communication", "tracking", "rest"),
)


@dataclass(frozen=True)
class Speed:
    """What was measured of one configuration, on this process; times are medians, in seconds."""

    images_per_second: float
    step_seconds: float
    # Process time of a step: of all threads, and without the time in which others have the core.
    cpu_seconds: float
    # Each of PARTS, from other steps than those of `step_seconds`.
    parts: dict[str, float]
    # Both views of an image, without the rest of a step.
    pipeline_images_per_second: float
    # Sent by this process in a step; it receives as many.
    bytes_of_keys: int
    bytes_of_gradients: int
    memory_gb: float
    # Floating-point operations of a step on this process, views not counted, and of the fastest
    # matrix product in a second.
    flops: int
    peak_flops: float

    @property
    def share_of_peak(self) -> float:
        """The share of the matrix product's speed that the model's arithmetic reaches."""
        return self.flops / self.step_seconds / self.peak_flops


class Clock:
    """The time of nested parts, each without those inside it; it doesn't wait for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._parts = ["rest"]
        self._marks: list[tuple[str, Any]] = []

    def _mark(self) -> None:
        stamp: Any = time.perf_counter()
        if self._device.type == "cuda":
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record()
        self._marks.append((self._parts[-1], stamp))

    def enter(self, part: str, *_: Any) -> None:
        """Begin `part`; further arguments are those of a hook."""
        self._mark()
        self._parts.append(part)

    def leave(self, *_: Any) -> None:
        """End the part begun last."""
        self._mark()
        self._parts.pop()

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time counted as that of `part`."""

        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            self.enter(part)
            try:
                return function(*arguments, **named)
            finally:
                self.leave()

        return timed

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the last reading, and begin anew."""
        wait_for(self._device)
        seconds = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, now) in zip(self._marks, self._marks[1:], strict=False):
            on_gpu = self._device.type == "cuda"
            seconds[part] += before.elapsed_time(now) / 1e3 if on_gpu else now - before
        self._marks.clear()
        return seconds


@contextmanager
def timed_parts(trainer: Trainer, clock: Clock) -> Iterator[None]:
    """Have `clock` count the parts of the trainer's steps."""
    network, before = trainer.moco, list[tuple[Any, str, Any]]()
    functions: list[tuple[Any, str, str]] = [
        (trainer.source, "views", "views"),
        (method_loss, "info_nce", "loss"),
        (trainer.accelerator, "backward", "backward"),
        (trainer.optimizer, "step", "optimizer"),
        (trainer.optimizer, "zero_grad", "optimizer"),
        (network, "update_key_encoder", "momentum"),
        (network.queue, "negatives", "queue"),
        (network.queue, "owners", "queue"),
        (network.queue, "enqueue", "queue"),
        (comms, "all_gather_with_note", "communication"),
        (health, "of_step", "tracking"),
        (finite, "norms", "rest"),
    ]
    for owner, name, part in functions:
        before.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, clock.around(part, getattr(owner, name)))
    encoders = ((network.key_encoder, "key"), (network.query_encoder, "query"))
    hooks = [
        handle
        for encoder, part in encoders
        for handle in (
            encoder.register_forward_pre_hook(partial(clock.enter, part)),
            encoder.register_forward_hook(clock.leave),
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for owner, name, own in before:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def wait_for(device: torch.device) -> None:
    """Return once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Return the wall time and the process time of `work`."""
    wait_for(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wait_for(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def fill_queue(trainer: Trainer) -> None:
    """Fill the queue with random keys of the training images: a step then costs what most do."""
    queue = trainer.moco.queue
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(queue.keys.shape, generator=generator)
    samples = torch.arange(queue.size) % len(trainer.splits.train)
    device = trainer.session.device
    queue.enqueue(F.normalize(keys, dim=1).to(device, trainer.dtype), samples.to(device))


def measure(trainer: Trainer, steps: int, repeats: int, warm_up: int) -> Speed:
    """Return the speed of the trainer's step, from `repeats` times `steps` steps; on all processes.

    Steps are really taken: with gradients, weights and queue.
    """
    device, config = trainer.session.device, trainer.config
    fill_queue(trainer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(warm_up):
        trainer.train_step()
    flops = step_flops(trainer)
    peaks, walls, cpus, parts = [peak_flops(trainer)], [], [], []
    clock = Clock(device)
    for _ in range(repeats):
        wall, cpu = seconds(lambda: [trainer.train_step() for _ in range(steps)], device)
        walls.append(wall / steps)
        cpus.append(cpu / steps)
        with timed_parts(trainer, clock):
            for _ in range(steps):
                clock.enter("rest")
                trainer.train_step()
                clock.leave()
                parts.append(clock.read() | {"tracking": 0.0})
        peaks.append(peak_flops(trainer))
    before = comms.sent_bytes
    loss, logits = trainer.train_step()
    sent = comms.sent_bytes - before
    medians = {part: statistics.median(each[part] for each in parts) for part in PARTS}
    medians["tracking"] = tracking_seconds(trainer, loss, logits)
    step = statistics.median(walls)
    return Speed(
        images_per_second=config.batch_size / step,
        step_seconds=step,
        cpu_seconds=statistics.median(cpus),
        parts=medians,
        pipeline_images_per_second=pipeline_speed(trainer, repeats),
        bytes_of_keys=sent,
        bytes_of_gradients=comms.all_reduce_bytes(sum(p.nbytes for p in trainer.parameters)),
        memory_gb=environment.memory_gb(device),
        flops=flops,
        peak_flops=max(peaks),
    )


def both_views(trainer: Trainer, step: int) -> None:
    """Make the views of a step, those of the queries and those of the keys."""
    trainer.source.begin(step)
    rows = trainer.plan.step(step, len(trainer.passes))
    micro_batches = trainer.config.runtime.micro_batches
    for views in views_of(rows, trainer.passes, trainer.source, micro_batches):
        for make in chain.from_iterable(views):
            make()


def pipeline(trainer: Trainer) -> Callable[[], None]:
    """Return what makes the views of the next step, and does nothing else, at each call."""
    steps = count(trainer.step)
    return lambda: both_views(trainer, next(steps))


def pipeline_speed(trainer: Trainer, repeats: int) -> float:
    """Return how many images a second all processes make both views of, and do nothing else."""
    device, work = trainer.session.device, pipeline(trainer)
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


def step_flops(trainer: Trainer) -> int:
    """Return the floating-point operations of a step on this process, without those of views."""
    with torch.compiler.set_stance("force_eager"):  # what is compiled can't be looked into
        with FlopCounterMode(display=False) as views:
            both_views(trainer, trainer.step)
        with FlopCounterMode(display=False) as whole:
            trainer.train_step()
    return int(whole.get_total_flops() - views.get_total_flops())


def peak_flops(trainer: Trainer) -> float:
    """Return the floating-point operations a second of a square matrix product on the device."""
    device, precision = trainer.session.device, trainer.config.precision
    dtype = {"bf16": torch.bfloat16, "fp64": torch.float64}.get(precision, torch.float32)
    side, times = (8192, 20) if device.type == "cuda" else (1536, 2)
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    product = torch.mm(a, b)
    work = partial(_multiply, a, b, product, times)
    return max(2.0 * side**3 * times / seconds(work, device)[0] for _ in range(3))


def _multiply(a: Tensor, b: Tensor, product: Tensor, times: int) -> None:
    for _ in range(times):
        torch.mm(a, b, out=product)


@torch.no_grad()
def tracking_seconds(trainer: Trainer, loss: Tensor, logits: list[Tensor]) -> float:
    """Return what a line of metrics and the figures of health take, for each step."""
    settings, device, queue = trainer.config.tracking, trainer.session.device, trainer.moco.queue
    line = partial(trainer.metrics, loss, logits, 1.0, 1)
    total = statistics.median(seconds(line, device)[0] for _ in range(3)) / settings.every_steps
    if every := settings.health_every_steps:
        keys = queue.keys[: trainer.config.batch_size]
        mine = keys[trainer.plan.local_rows]
        work = partial(health.of_step, trainer.moco, mine, [keys], queue.samples[: len(keys)])
        total += statistics.median(seconds(work, device)[0] for _ in range(3)) / every
    return total


def parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())
