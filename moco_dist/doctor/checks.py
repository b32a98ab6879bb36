"""What the doctor checks before a pretraining; nothing is trained.

Every process runs the checks, and what only one of them can see is gathered. Where the run itself
would stop, the check uses the run's own rule and sentence.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import accelerate
import torch
from torch import nn

import moco_dist
from moco_dist.config.recipe import PretrainConfig
from moco_dist.distributed import comms
from moco_dist.doctor.finding import Finding
from moco_dist.errors import ConfigError, UserError, counted, shown
from moco_dist.method import plan
from moco_dist.method.encoder import build_encoder, check
from moco_dist.pretrain import set_size
from moco_dist.runs.memory import available
from moco_dist.tracking import wandb_run

# Seconds that the W&B server may take to answer.
PATIENCE = 3.0
# Bytes of the largest message of the network test, and how many times it is sent.
MESSAGE, TIMES = 2**22, 5
GB = 1e9


def processes(config: PretrainConfig, device: torch.device) -> Iterator[Finding]:
    """Yield which processes take part, on which devices, with which versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    versions = (
        f"moco_dist {moco_dist.__version__}, torch {torch.__version__}, accelerate "
        f"{accelerate.__version__}, Python {platform.python_version()}"
    )
    everyone = comms.gather_objects((socket.gethostname(), name, versions))
    hosts = {host for host, _, _ in everyone}
    names = sorted({name for _, name, _ in everyone})
    count, wanted = len(everyone), config.runtime.processes
    fault = ""
    if wanted not in (0, count):
        fault = f"runtime.processes={wanted} and {count} took part; start {wanted}"
    yield Finding(
        "processes", f"{count} on {counted(len(hosts), 'machine')}: {', '.join(names)}", fault
    )
    different = sorted({versions for _, _, versions in everyone})
    fault = f"processes have other versions: {' and '.join(different)}; install the same"
    yield Finding("versions", different[0], fault if len(different) > 1 else "")


def network(config: PretrainConfig, device: torch.device) -> Iterator[Finding]:
    """Yield the measured latency and bandwidth of the collective that each step needs."""
    if comms.world_size() == 1:
        yield Finding("network", "one process needs none")
        return
    small, large = (torch.zeros(1, n, device=device) for n in (1, MESSAGE // 4))
    times: dict[int, list[float]] = {}
    for message in (small, large):
        comms.all_gather(message)  # opens the connections
        for _ in range(TIMES):
            began = time.perf_counter()
            comms.all_gather(message).sum().item()
            times.setdefault(message.numel(), []).append(time.perf_counter() - began)
    latency, whole = (sorted(each)[TIMES // 2] for each in times.values())
    rate = MESSAGE * (comms.world_size() - 1) / whole / 1e6
    keys = config.batch_size * config.encoder.numbers * 4
    yield Finding(
        "network",
        f"all-gather: {1000 * latency:.2f} ms, {rate:,.0f} MB/s received; a step gathers "
        f"{keys / 1e6:.2f} MB of keys",
    )


def batch(config: PretrainConfig, images: int) -> Iterator[Finding]:
    """Yield how batch, groups and negatives fit the processes and the data."""
    world, micro = comms.world_size(), config.runtime.micro_batches
    rows, groups = config.batch_size, config.bn_groups
    yield _ruled(
        "batch",
        f"{rows} = {world} x {rows // world}, {counted(groups, 'BatchNorm group')} of "
        f"{rows // groups}, {counted(micro, 'micro-batch', 'micro-batches')}",
        lambda: plan.check_batch(rows, world),
        lambda: plan.check_groups(groups, world, micro, config.runtime.compile),
    )
    if not images:
        return
    steps = images // rows
    yield _ruled(
        "steps",
        f"{steps:,} an epoch, {steps * config.epochs:,} in {counted(config.epochs, 'epoch')}",
        lambda: plan.check_images(rows, groups, world, images),
    )
    long = config.moco.too_long(rows, images)
    yield Finding("negatives", config.negatives(images), long, config.drifts)
    if few := set_size.few_images(config, images):
        yield Finding("expect", few)


def _ruled(about: str, found: str, *rules: Callable[[], object]) -> Finding:
    try:
        for rule in rules:
            rule()
    except UserError as error:
        return Finding(about, found, str(error))
    return Finding(about, found)


def memory(config: PretrainConfig, device: torch.device, images: int) -> Iterator[Finding]:
    """Yield the available memory of a process and what the configuration needs; a collective.

    The estimate counts weights, gradients, momentum, the key encoder, the queue, the images, and
    the outputs of all layers for one micro-batch.
    """
    needed = estimate(config, images, comms.world_size())
    if device.type == "cuda":
        free, sharing = torch.cuda.mem_get_info(device)[0], 1
    else:
        free = available()
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    everyone = comms.gather_objects((free // sharing, socket.gethostname()))
    least, host = min(everyone)
    fault = ""
    if needed > least:
        fault = (
            f"about {needed / GB:.1f} GB a process are needed and {host} has {least / GB:.1f} GB "
            f"for one; raise runtime.micro_batches={config.runtime.micro_batches}, or lower "
            "batch_size, views.size or data.limit"
        )
    found = f"about {needed / GB:.2f} GB a process needed, {least / GB:.2f} GB available for each"
    yield Finding("memory", found, fault)


def estimate(config: PretrainConfig, images: int, world: int) -> int:
    """Return about how many bytes one of `world` processes needs."""
    size = {"fp64": 8}.get(config.precision, 4)
    try:
        check(config.encoder, config.views.size)
        with torch.device("meta"):
            encoder = build_encoder(config.encoder, 0)
            view = torch.zeros(1, config.encoder.channels, config.views.size, config.views.size)
    except ConfigError:
        return 0  # reported by another check
    outputs = 0

    def count(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal outputs
        outputs += output.numel() if isinstance(output, torch.Tensor) else 0

    for module in encoder.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    encoder.eval()(view)
    rows = max(1, config.batch_size // world // config.runtime.micro_batches)
    weights = sum(parameter.numel() for parameter in encoder.parameters())
    activations = outputs * rows * (2 if config.precision == "bf16" else size)
    vectors = config.moco.kept(images) * config.encoder.numbers * size
    logits = (
        config.moco.candidates(config.batch_size, images) * config.encoder.vectors * rows * size
    )
    pixels = images * config.encoder.channels * config.data.size**2
    streamed = pixels > 1e9 * config.data.memory_gb
    copies = 5 if config.optim.name == "adamw" else 4
    held = copies * weights * size + activations + vectors + logits
    return held + (0 if streamed else pixels)


def disk(config: PretrainConfig, images: int) -> Iterator[Finding]:
    """Yield the free disk space and what the checkpoints that are kept will need."""
    keep = config.checkpoint
    try:
        check(config.encoder, config.views.size)
        with torch.device("meta"):
            state = build_encoder(config.encoder, 0).state_dict()
    except ConfigError as error:
        yield Finding("encoder", config.encoder.backbone, str(error))
        return
    size = {"fp64": 8}.get(config.precision, 4)
    copies = 4 if config.optim.name == "adamw" else 3
    one = copies * sum(tensor.numel() for tensor in state.values()) * size
    one += config.moco.kept(images) * (config.encoder.numbers * size + 8)
    # The newest ones, the best one, one that is being written, and those kept for good.
    steps = images // config.batch_size * config.epochs
    for_good = steps // keep.keep_every if keep.keep_every else 0
    needed = one * (keep.keep_last + keep.keep_best + 1 + for_good)
    folder = Path(config.output).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    fault = ""
    if needed > free:
        fault = (
            f"{shown(folder)} has {free / GB:.1f} GB free and the checkpoints need "
            f"{needed / GB:.1f} GB ({one / GB:.2f} GB each); free it, choose output=FOLDER, or "
            "lower checkpoint.keep_last"
        )
    elif not os.access(folder, os.W_OK):
        fault = f"{shown(folder)} can't be written; choose output=FOLDER"
    found = f"{needed / GB:.2f} GB for checkpoints of {one / 1e6:,.0f} MB, {free / GB:.1f} GB free"
    yield Finding("disk", found, fault)


def wandb(config: PretrainConfig) -> Finding:
    """Return whether the server of W&B answers, if the run is to be online."""
    mode = wandb_run.mode(config.tracking)
    if mode in ("disabled", "offline"):
        return Finding("W&B", mode)
    url = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    port = url.port or (80 if url.scheme == "http" else 443)
    said: list[str] = []

    def ask() -> None:
        try:
            socket.create_connection((url.hostname or "", port), timeout=PATIENCE).close()
            said.append("")
        except OSError as error:
            said.append(str(error))

    # A thread, because nothing else limits how long a host name is looked up.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE + 1)
    if error := said[0] if said else f"nothing within {PATIENCE + 1:g} s":
        warning = f"{url.hostname}:{port} does not answer ({error}); the run would continue offline"
        return Finding("W&B", f"{mode}: {url.hostname} does not answer", warning=warning)
    return Finding("W&B", f"{mode}: {url.hostname} answers")
