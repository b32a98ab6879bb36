"""Measure a configuration on this machine: images/s, where a step's time goes, what it sends.

  python -m moco_dist.bench CONFIG [key=value ...] [--against textbook] [--sweep KEY=A,B,...]
  accelerate launch -m moco_dist.bench CONFIG ...        several processes or GPUs, as pretrain

Takes real steps with a full queue, and writes no file. The last line of the output has all figures
as JSON.

  --against textbook  alternate with a plain loop (PIL views in a DataLoader, fp32, NCHW, eager),
                      and print ratios
  --sweep KEY=A,B     measure each of these values of a key
  --repeats N         measurements, whose median is printed; default 5
  --steps N           steps per measurement; default 1, on a GPU 20
  --warm-up N         steps before the first measurement; default 2, on a GPU 20
  --workers N         workers of the plain loop's DataLoader; default 0, on a GPU one per core
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from accelerate.state import AcceleratorState

from moco_dist.bench.speed import PARTS, Speed, measure, parameters, pipeline, seconds
from moco_dist.bench.textbook import Textbook
from moco_dist.config import yaml_files
from moco_dist.config.recipe import PretrainConfig
from moco_dist.data import datasets
from moco_dist.distributed import comms, peers
from moco_dist.distributed.stopping import StopRequests
from moco_dist.errors import ConfigError
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import command, environment
from moco_dist.runs.session import join
from moco_dist.tracking import terminal
from moco_dist.tracking.start import console

AGAINST = ("textbook",)


def main(arguments: list[str] | None = None) -> None:
    """Measure what the arguments, or those of this process, ask for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--against", default="")
    parser.add_argument("--sweep", default="")
    for name in ("--repeats", "--steps", "--warm-up", "--workers"):
        parser.add_argument(name, default="")
    asked, rest = parser.parse_known_args(arguments)
    asked.arguments = rest
    command.main(PretrainConfig, partial(run, asked=asked), __doc__, rest, commands="")


def run(config: PretrainConfig, stop: StopRequests, asked: argparse.Namespace) -> None:
    """Measure `config`, or a copy of it for each value of the sweep, and print the figures."""
    if asked.against and asked.against not in AGAINST:
        raise ConfigError(f"--against {asked.against}: give one of {', '.join(AGAINST)}")
    configs = swept(config, asked)
    if asked.against and any(each.encoder.channels != 3 for each in configs):
        raise ConfigError(
            f"--against {asked.against}: its images are RGB, and encoder.channels is not 3; leave "
            "one of the two out"
        )
    found = []
    for each in configs:
        environment.forget_peak_memory()
        accelerator = join(each)
        # Without a name for the splits, whose images would stay in the host's memory.
        trainer = Trainer(each, accelerator, datasets.load(each.data, each.encoder.channels))
        found.append(one(trainer, asked))
        del trainer
        AcceleratorState._reset_state()  # it would impose its precision on the next configuration
    if not comms.is_main():
        return
    if asked.sweep:
        show_sweep(asked.sweep, found)
    print(json.dumps(found if asked.sweep else found[0]), flush=True)


def swept(config: PretrainConfig, asked: argparse.Namespace) -> list[PretrainConfig]:
    """Return the configurations of a sweep such as batch_size=128,256, one for each value."""
    if not asked.sweep:
        return [config]
    key, _, values = asked.sweep.partition("=")
    if not (key and values):
        raise ConfigError(
            f"--sweep {asked.sweep}: give a key and its values, such as batch_size=128,256"
        )
    return [
        yaml_files.load(PretrainConfig, [*asked.arguments, f"{key}={value}"])
        for value in values.split(",")
    ]


def _number(asked: argparse.Namespace, name: str, default: int, least: int = 1) -> int:
    text = getattr(asked, name)
    option = f"--{name.replace('_', '-')}"
    try:
        number = int(text or default)
    except ValueError:
        raise ConfigError(f"{option} {text} is not a whole number; give {least} or more") from None
    if number < least:
        raise ConfigError(f"{option} {text} is too few; give {least} or more")
    return number


def one(trainer: Trainer, asked: argparse.Namespace) -> dict[str, Any]:
    """Return and print the figures of one configuration."""
    on_gpu = trainer.device.type == "cuda"
    steps = _number(asked, "steps", 20 if on_gpu else 1)
    repeats = _number(asked, "repeats", 5)
    warm_up = _number(asked, "warm_up", 20 if on_gpu else 2)
    speed = measure(trainer, steps, repeats, warm_up)
    found = machine(trainer) | {"repeats": repeats, "steps": steps} | asdict(speed)
    found["share_of_peak"] = speed.share_of_peak
    if asked.against:
        workers = _number(asked, "workers", cores() if on_gpu else 0, least=0)
        found["textbook"] = against_textbook(trainer, steps, repeats, workers)
    if comms.is_main():
        show(found, speed)
    return found


def machine(trainer: Trainer) -> dict[str, Any]:
    """Return what is measured, and on which machine."""
    config, device = trainer.config, trainer.device
    on_gpu = device.type == "cuda"
    return {
        "name": config.name,
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "processes": comms.world_size(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": config.precision,
        "encoder": config.encoder.described,
        "parameters": parameters(trainer.moco.query_encoder),
        "batch_size": config.batch_size,
        "bn_groups": config.bn_groups,
        "micro_batches": config.runtime.micro_batches,
        "negatives": config.moco.negatives,
        "candidates": config.moco.candidates(config.batch_size, len(trainer.splits.train)),
        "compiled": config.runtime.compile,
        "symmetric": config.moco.symmetric,
        "view_size": config.views.size,
    }


def cores() -> int:
    """Return the cores of this machine for each of its processes."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def against_textbook(trainer: Trainer, steps: int, repeats: int, workers: int) -> dict[str, Any]:
    """Return how many times as fast the trainer is as the plain loop: medians of pairs in turn.

    Process time counts neither other programs on the machine nor the plain loop's workers.
    """
    device = trainer.device
    peers.me.mark(trainer.step, "measuring the plain loop")
    train = trainer.splits.train
    plain = Textbook(trainer.config, train.squares(torch.arange(len(train))), device, workers)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "step": (partial(trainer.train_step, RunHooks(trainer)), plain.step),
        "pipeline": (pipeline(trainer), plain.views),
    }
    found: dict[str, Any] = {"workers": workers}
    for what, (ours, theirs) in pairs.items():
        for work in (theirs, ours):
            work()
        ratios, walls = [], []
        for _ in range(repeats):
            mine, other = (seconds(work, device, steps) for work in (ours, theirs))
            ratios.append((other[0] / mine[0], other[1] / mine[1]))
            walls.append(other[0] / steps)
        wall, cpu = (statistics.median(each) for each in zip(*ratios, strict=True))
        found[what] = {
            "times_as_fast": wall,
            "times_as_fast_by_process_time": cpu,
            "textbook_images_per_second": trainer.config.batch_size / statistics.median(walls),
        }
    return found


def show(found: dict[str, Any], speed: Speed) -> None:
    """Print the tables of one configuration."""
    total = sum(speed.parts.values())
    title = (
        f"{found['name']}: batch {found['batch_size']} in "
        f"{found['bn_groups']} groups, {found['candidates']:,} candidates by {found['negatives']}"
    )
    rows = {
        "encoder": found["encoder"],
        "on": f"{found['processes']} x {found['device']}, {found['threads']} threads, "
        f"{found['precision']}{', compiled' * found['compiled']}, torch {found['torch']}",
        "images/s": f"{speed.images_per_second:,.1f}; "
        f"views alone {speed.pipeline_images_per_second:,.0f}",
        "step": f"{milliseconds(speed.step_seconds)} ms, process time "
        f"{milliseconds(speed.cpu_seconds)} ms",
        "sent": f"{speed.bytes_of_keys:,} bytes of keys a step and process, "
        f"{speed.bytes_of_gradients:,} of gradients",
        "memory": f"{speed.memory_gb:.2f} GB at most",
        "arithmetic": f"{speed.flops / 1e9:,.2f} GFLOP a step and process, "
        f"{speed.share_of_peak:.0%} of {speed.peak_flops / 1e9:,.0f} GFLOP/s",
    }
    terminal.banner(console, title, rows)
    table = [["part of a step", "ms", "share"]]
    table += [
        [part, milliseconds(speed.parts[part]), f"{speed.parts[part] / total:.1%}"]
        for part in PARTS
    ]
    terminal.table(console, "", table, words=1)
    if plain := found.get("textbook"):
        lines = [["against a plain loop", "its images/s", "times as fast", "by process time"]]
        lines += [
            [
                what,
                f"{plain[what]['textbook_images_per_second']:,.1f}",
                f"{plain[what]['times_as_fast']:.2f}",
                f"{plain[what]['times_as_fast_by_process_time']:.2f}",
            ]
            for what in ("pipeline", "step")
        ]
        terminal.table(console, "", lines, words=1)


def milliseconds(seconds: float) -> str:
    """Return a time in milliseconds with at least three digits."""
    number = seconds * 1e3
    return f"{number:,.{0 if number >= 100 else 1 if number >= 10 else 2}f}"


def show_sweep(sweep: str, found: list[dict[str, Any]]) -> None:
    """Print a line for each value of the key."""
    key, _, values = sweep.partition("=")
    lines = [[key, "images/s", "ms a step", "process ms", "GB", "bytes of keys"]]
    lines += [
        [
            value,
            f"{each['images_per_second']:,.1f}",
            milliseconds(each["step_seconds"]),
            milliseconds(each["cpu_seconds"]),
            f"{each['memory_gb']:.2f}",
            f"{each['bytes_of_keys']:,}",
        ]
        for value, each in zip(values.split(","), found, strict=True)
    ]
    terminal.table(console, f"\nsweep of {key}", lines, words=0)
