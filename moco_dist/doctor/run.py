"""Find what may be wrong with a pretraining, before or after it, and say what to do.

  accelerate launch -m moco_dist.doctor CONFIG [key=value ...]     before: one table, in seconds
  python -m moco_dist.doctor RUN|CONFIG [key=value ...] --bn-leak  is its BatchNorm a leak?

The table has processes, versions, network, batch, queue, data, colors, memory, disk and W&B, as
launcher and configuration have them. Leaves with 1, and the list, if something will fail.

For --bn-leak RUN is a run directory; a CONFIG stands for the run that pretraining under it writes,
or, if there is none yet, for a short training whose result is thrown away. Leaves with 78 if the
run leaks.
"""

from __future__ import annotations

import logging
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from rich.table import Table
from torch import Tensor

from moco_dist.config import yaml_files
from moco_dist.config.recipe import PretrainConfig
from moco_dist.data import datasets
from moco_dist.distributed import comms, peers
from moco_dist.distributed.stopping import StopRequests
from moco_dist.doctor import checks
from moco_dist.errors import ConfigError, FaultsError, shown
from moco_dist.method import views
from moco_dist.method.batch_norm import batch_norms
from moco_dist.method.encoder import Encoder, build_encoder
from moco_dist.method.plan import Plan
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import checkpoint, command
from moco_dist.runs import session as runs_session
from moco_dist.tracking import terminal
from moco_dist.tracking.start import console

# Seconds in which all processes must have met.
REACH = 15.0
# Steps of the short training where there is no run yet.
STEPS = 200
# BatchNorm groups among which keys are shuffled where the run has fewer: MoCo's own number.
GROUPS = 8
# Batches whose queries are counted, and keys of other batches that they must tell theirs from.
BATCHES = 4
NEGATIVES = 4096
# Of streamed images, so many are taken into memory.
STREAMED_IMAGES = 10_000
# Gain by shared groups that is a leak: runs without one have 0.05 or less, one with it 0.4 or more.
LEAK = 0.1


@torch.no_grad()
def leak(
    query_encoder: Encoder, key_encoder: Encoder, pixels: Tensor, config: PretrainConfig
) -> tuple[float, float]:
    """Return the instance accuracy with shared and with shuffled BatchNorm groups, from 0 to 1.

    The share of queries that are more similar to their own key than to the keys of other batches.
    Shared: query and key are normalised among the same images. Shuffled: the key is among others,
    as ShuffleBN has it. Weights, images, views, and the rows of a group are the same in both.
    """
    rows = config.batch_size // config.bn_groups
    groups = max(config.bn_groups, min(GROUPS, len(pixels) // rows))
    batch = rows * groups
    plan = Plan(num_samples=len(pixels), batch_size=batch, seed=config.seed, device=pixels.device)
    dtype = next(query_encoder.parameters()).dtype

    def encode(encoder: Encoder, samples: Tensor, step: int, view: int) -> Tensor:
        pieces = [
            views.make(pixels[part], config.views, config.seed, step, part, view, dtype)
            for part in samples.split(rows)
        ]
        return torch.cat([encoder(piece) for piece in pieces])

    for encoder in (query_encoder, key_encoder):
        encoder.train()
        for norm in batch_norms(encoder):
            norm.rows_per_group = rows
    # Keys as they come into the queue of a run: each batch shuffled among its groups.
    others = max(1, -(-min(NEGATIVES, config.moco.queue_size) // batch))
    queue = []
    for step in range(others):
        drawn = plan.step(step)
        queue.append(encode(key_encoder, drawn.samples[drawn.key_rows[0]], step, 1))
    negatives = torch.cat(queue)
    right = torch.zeros(2, dtype=torch.int64)
    for step in range(others, others + BATCHES):
        drawn = plan.step(step)
        queries = encode(query_encoder, drawn.samples, step, 0)
        nearest = (queries @ negatives.T).max(1).values
        shared = encode(key_encoder, drawn.samples, step, 1)
        shuffled = encode(key_encoder, drawn.samples[drawn.key_rows[0]], step, 1)
        for place, keys in enumerate((shared, shuffled[drawn.unshuffle[0]])):
            right[place] += ((queries * keys).sum(1) > nearest).sum().cpu()
    with_groups, without = (right / (batch * BATCHES)).tolist()
    return with_groups, without


def trained(
    config: PretrainConfig, device: torch.device
) -> tuple[Encoder, Encoder, datasets.AnyImages, str]:
    """Return the encoders for queries and keys, training images, and where the weights are from."""
    directory = Path(config.output).expanduser() / config.name
    found = checkpoint.newest(directory)
    if found is None:
        with tempfile.TemporaryDirectory() as folder:
            short = replace(config, output=folder, name="doctor")
            session = runs_session.start(short)
            trainer = Trainer(short, session, datasets.load(config.data, config.encoder.channels))
            while trainer.step < min(STEPS, trainer.total_steps):
                trainer.train_step()
            session.close()
        encoders = trainer.moco.query_encoder, trainer.moco.key_encoder
        return *encoders, trainer.splits.train, f"{trainer.step} steps of training"
    changed = yaml_files.changed_keys(found.piece("config"), config)
    if changed:
        raise ConfigError(
            f"{directory} holds a run with another configuration ({'; '.join(changed)}); give "
            f"{directory} in place of the configuration, or name=... for a short training"
        )
    query, key = (build_encoder(config.encoder, config.seed).to(device) for _ in range(2))
    for encoder, prefix in ((query, "query_encoder."), (key, "key_encoder.")):
        own = {k.removeprefix(prefix): v for k, v in found.model.items() if k.startswith(prefix)}
        checkpoint.load_tensors(encoder, own, found.path)
    images = datasets.load(config.data, config.encoder.channels).train.to(device)
    return query, key, images, f"{directory} after step {found.step:,}"


def bn_leak(config: PretrainConfig, device: torch.device) -> None:
    """Print whether encoders know images by the BatchNorm statistics of their group.

    Raises ConfigError if they do.
    """
    query, key, images, source = trained(config, device)
    if isinstance(images, datasets.Images):
        pixels = images.pixels
    else:
        pixels = images.squares(torch.arange(min(len(images), STREAMED_IMAGES)))
    shared, shuffled = leak(query, key, pixels, config)
    table = Table(title=f"Instance accuracy of {source}, at fixed weights")
    table.add_column("query and key are normalised")
    table.add_column("accuracy", justify="right")
    table.add_column("this run")
    safe = config.bn_groups > 1
    table.add_row("with the same images (no protection)", f"{shared:.1%}", "" if safe else "trains")
    table.add_row("with others (ShuffleBN)", f"{shuffled:.1%}", "trains" if safe else "")
    console.print(table)
    if not safe and shared - shuffled > LEAK:
        raise ConfigError(
            f"BatchNorm leak: under bn_groups=1, {shared:.1%} of the queries find their own key, "
            f"and {shuffled:.1%} without the statistics that they share with it; train anew with "
            f"bn_groups=8 and name=..."
        )
    verdict = (
        f"No leak: bn_groups={config.bn_groups} keeps the groups of queries and keys apart."
        if safe
        else "No leak to be seen yet, but bn_groups=1 leaves the way open: use bn_groups=8."
    )
    console.print(verdict, highlight=False, soft_wrap=True)


def join(config: PretrainConfig) -> torch.device:
    """Return this process's device once it has met the others; FaultsError if it can't."""
    seconds = min(config.runtime.timeout_seconds, REACH)
    try:
        accelerator = Accelerator(
            cpu=config.runtime.device == "cpu",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))],
        )
    except RuntimeError as error:
        rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise FaultsError(
            f"network: process {rank} of {world} on {platform.node()} did not meet the others at "
            f"{place} within {seconds:.0f} s ({shown(str(error).splitlines()[0])}); start all of "
            "them, and look at the address, the port and the firewall between the machines"
        ) from error
    peers.me.join(seconds)
    if not comms.is_main():
        logging.disable(logging.WARNING)
    device: torch.device = accelerator.device
    return device


def examine(config: PretrainConfig) -> None:
    """Print what a run under `config` would meet here; FaultsError, on all, with what will fail."""
    device = join(config)
    found, images = peers.from_main(lambda: checks.data(config.data, config.encoder.channels))
    findings = [
        *checks.processes(config, device),
        *checks.network(config, device),
        *checks.batch(config, images),
        *found,
        *checks.memory(config, device, images),
        *peers.from_main(lambda: list(checks.disk(config))),
        peers.from_main(lambda: checks.wandb(config)),
    ]
    if comms.is_main():
        marks = ["FAIL" if f.fault else "warn" if f.warning else "ok" for f in findings]
        rows = [(f.about, mark, f.found) for mark, f in zip(marks, findings, strict=True)]
        title = f"moco_dist doctor: {config.name}"
        terminal.table(console, title, [("what", "", "found"), *rows], words=3)
        for finding in findings:
            if finding.warning:
                terminal.write_line(console, f"warning: {finding.warning}")
    faults = [f"{finding.about}: {finding.fault}" for finding in findings if finding.fault]
    if faults:
        listed = "".join(f"\n  {number}. {fault}" for number, fault in enumerate(faults, 1))
        raise FaultsError(f"{len(faults)} will fail:{listed}").on_all()


CHECKS: dict[str, Callable[[PretrainConfig, torch.device], None]] = {"--bn-leak": bn_leak}


def main(arguments: list[str]) -> None:
    """Do the checks that the arguments name on the run that they name."""
    flags = [argument for argument in arguments if argument.startswith("-")]

    def run(config: PretrainConfig, stop: StopRequests) -> None:
        if unknown := sorted(set(flags) - CHECKS.keys()):
            raise ConfigError(
                f"there is no check {unknown[0]}; give one of {', '.join(CHECKS)}, or none for the "
                "table"
            )
        if not flags:
            examine(config)
            return
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError(
                f"{os.environ['WORLD_SIZE']} processes were started, and the doctor is one: "
                "groups are the same on one as on many; use python -m moco_dist.doctor"
            )
        on_cpu = config.runtime.device == "cpu" or not torch.cuda.is_available()
        for flag in dict.fromkeys(flags):
            CHECKS[flag](config, torch.device("cpu" if on_cpu else "cuda"))

    rest = [part for argument in arguments if argument not in flags for part in _of_run(argument)]
    help_asked = [flag for flag in flags if flag in ("-h", "--help")]
    command.main(PretrainConfig, run, __doc__, [*rest, *help_asked])


def _of_run(argument: str) -> list[str]:
    """Return the arguments that a run directory stands for, or the argument as it is."""
    path = Path(argument).expanduser()
    if not (path / "config.yaml").is_file():
        return [argument]
    path = path.resolve()
    return [str(path / "config.yaml"), f"output={path.parent}", f"name={path.name}"]
