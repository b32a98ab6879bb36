"""Find what may be wrong with a pretraining, before or after it, and say what to do about it.

  accelerate launch -m moco_dist.doctor CONFIG [key=value ...]     before: one table, in seconds
  python -m moco_dist.doctor CONFIG [key=value ...] --all-files    the same, decoding every file
  python -m moco_dist.doctor RUN|CONFIG [key=value ...] --bn-leak  is its BatchNorm a leak?

The table shows processes, versions, network, batch, queue, data, colors, memory, disk and W&B as
the launcher and the configuration set them. If something will fail, it is listed, and the command
exits with status 1.

For --bn-leak, RUN is a run directory. A CONFIG stands for the run that it describes, or for a short
training, which is not kept, if there is no such run yet. Exits with status 78 if the run leaks.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from pathlib import Path

import torch

from moco_dist.config.recipe import PretrainConfig
from moco_dist.distributed import comms, peers
from moco_dist.distributed.stopping import StopRequests
from moco_dist.doctor import checks, images
from moco_dist.doctor.bn_leak import bn_leak
from moco_dist.doctor.finding import Finding
from moco_dist.errors import ConfigError, FaultsError, UnavailableError
from moco_dist.runs import command, launch
from moco_dist.tracking import terminal
from moco_dist.tracking.start import console

# Seconds in which all processes must have met.
REACH = 15.0
LEAK = "--bn-leak"


def join(config: PretrainConfig) -> torch.device:
    """Return this process's device once it has met the others; FaultsError if it can't."""
    seconds = min(config.runtime.timeout_seconds, REACH)
    try:
        accelerator = launch.accelerator(config.runtime.device, seconds, config.precision)
    except UnavailableError as error:
        raise FaultsError(f"network: {error}") from error
    peers.me.join(seconds)
    if not comms.is_main():
        logging.disable(logging.WARNING)
    device: torch.device = accelerator.device
    return device


def examine(config: PretrainConfig, seconds: float = images.SECONDS) -> None:
    """Print what a run of `config` would meet here; FaultsError on all, listing what will fail.

    The images are decoded for so many seconds.
    """
    device, channels = join(config), config.encoder.channels
    found, count = peers.from_main(lambda: images.data(config.data, channels, seconds))
    findings = [
        *checks.processes(config, device),
        *checks.network(config, device),
        *checks.batch(config, count),
        *found,
        *checks.memory(config, device, count),
        *peers.from_main(lambda: list(checks.disk(config, count))),
        peers.from_main(lambda: checks.wandb(config)),
    ]
    if unused := ", ".join(config.unused):
        findings.append(Finding("no effect", unused, warning=f"without effect here: {unused}"))
    if comms.is_main():
        marks = ["FAIL" if f.fault else "warn" if f.warning else "ok" for f in findings]
        rows = [(f.about, mark, f.found) for mark, f in zip(marks, findings, strict=True)]
        title = f"moco_dist doctor: {config.name}"
        terminal.table(console, title, [("what", "", "found"), *rows], words=3)
        for finding in findings:
            if finding.warning:
                terminal.write_line(console, f"warning: {finding.warning}")
    faults = [
        f.fault if f.fault.startswith(f"{f.about}: ") else f"{f.about}: {f.fault}"
        for f in findings
        if f.fault
    ]
    if faults:
        listed = "".join(f"\n  {number}. {fault}" for number, fault in enumerate(faults, 1))
        raise FaultsError(f"{len(faults)} will fail:{listed}").on_all()


def main(arguments: list[str] | None = None) -> None:
    """Print the table, or with --bn-leak look for a leak."""
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = {argument for argument in arguments if argument.startswith("-")} - {"-h", "--help"}

    def run(config: PretrainConfig, stop: StopRequests) -> None:
        if unknown := sorted(flags - {LEAK, images.ALL}):
            raise ConfigError(
                f"there is no check {unknown[0]}; give {LEAK} or {images.ALL}, or none for the "
                "table"
            )
        if LEAK not in flags:
            examine(config, math.inf if flags else images.SECONDS)
        elif os.environ.get("WORLD_SIZE", "1") == "1":
            bn_leak(config)
        else:
            raise ConfigError(
                f"{os.environ['WORLD_SIZE']} processes were started, and {LEAK} needs one: its "
                "groups are the same on any number; use python -m moco_dist.doctor"
            )

    rest = [part for argument in arguments if argument not in flags for part in _of_run(argument)]
    command.main(PretrainConfig, run, __doc__, rest, commands="")


def _of_run(argument: str) -> list[str]:
    """Return the arguments that reproduce a run directory, or the argument itself."""
    path = Path(argument).expanduser()
    if not (path / "config.yaml").is_file():
        return [argument]
    path = path.resolve()
    return [str(path / "config.yaml"), f"output={path.parent}", f"name={path.name}"]
