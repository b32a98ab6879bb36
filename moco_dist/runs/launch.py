"""How the processes of a run were started: what the environment says of it, checked and used.

Launchers speak to their processes through variables, and so do Slurm and `accelerate config`. Some
outlive what set them, some contradict one another, and some would change a run behind the back of
its configuration: those are refused, or left aside with a warning.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import DDPCommunicationHookType, GradientAccumulationPlugin

from moco_dist.distributed import comms
from moco_dist.errors import ConfigError, UnavailableError, shown

logger = logging.getLogger(__name__)

# What a launcher tells each process, and where process 0 is to be met.
NUMBERS, MEETING = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("MASTER_ADDR", "MASTER_PORT")
# What `accelerate config` sets for answers that can't mean anything here, and why.
_ANSWERS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "ParallelismConfig",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
# Variables that switch the precision of products on GPUs, which the configuration decides.
_TF32 = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
_INTERFACE = "GLOO_SOCKET_IFNAME"
_OVER = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "TIMEOUT"),
}
_SQUEUE_SECONDS = 10.0  # a busy Slurm controller may need long


def number(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number that a launcher gave to this process, 0 if it was started alone."""
    if all(environment.get(name, "").isdecimal() for name in NUMBERS):
        return int(environment["RANK"])
    return 0


def check(environment: Mapping[str, str] = os.environ) -> None:
    """Raise ConfigError unless the environment describes one launch that is possible here."""
    if comms.world_size() > 1:
        return  # the processes have met already
    _check_numbers(environment)
    for name, answer in _ANSWERS.items():
        kind = environment.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE")
        if _is_true(environment.get(name, "")) and (answer, kind) != ("SageMaker", "NO"):
            raise ConfigError(
                f"{name}={environment[name]}: {answer}, an answer of `accelerate config`, is not "
                "possible here, where each process holds the whole encoder; answer no, unset the "
                "variable, or launch with accelerate launch --config_file FILE (a file of launch/)"
            )


def _check_numbers(environment: Mapping[str, str]) -> None:
    every = (*NUMBERS, "LOCAL_WORLD_SIZE", *MEETING)
    fix = (
        f"for one process run `unset {' '.join(every)}`, for several start all of them with "
        "accelerate launch or torchrun"
    )
    for name in (*NUMBERS, "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if not environment.get(name, "0").isdecimal():
            text = shown(environment[name])
            raise ConfigError(f"{name}='{text}' in the environment is no whole number; {fix}")
    rank, world, local = (environment.get(name) for name in NUMBERS)
    if local is None and rank in (None, "0") and world in (None, "1"):
        return  # one process
    wanted = (*NUMBERS, *MEETING)
    there = [f"{name}={shown(environment[name])}" for name in wanted if environment.get(name)]
    missing = [name for name in wanted if not environment.get(name)]
    if missing:
        raise ConfigError(
            f"{' '.join(there)} in the environment without {', '.join(missing)}: these are left "
            f"over from another launch, or incomplete; {fix}"
        )
    if int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
        raise ConfigError(f"RANK={rank} in the environment is not below WORLD_SIZE={world}; {fix}")


def _is_true(text: str) -> bool:
    return text.strip().lower() in ("1", "true", "yes", "on", "y", "t")


def accelerator(
    device: Literal["auto", "cpu", "cuda"],
    seconds: float,
    precision: str = "fp32",
    spare: float = 0.0,
    gradients: Literal["full", "bf16"] = "full",
) -> Accelerator:
    """Return the Accelerator of this process once all have met, within `seconds`.

    It has the precision of the configuration and no other choice of the environment; `gradients`
    are summed in bf16 or as they are, and collectives end after `seconds` and `spare` more. Raises
    ConfigError for an environment that fits neither itself nor `device` and for two processes on
    one GPU, UnavailableError if the processes don't meet.
    """
    check()
    _check_debug(device)
    _leave_aside()
    mixed = "bf16" if precision == "bf16" else "no"
    hooks = DDPCommunicationHookType
    hook = hooks.BF16 if gradients == "bf16" else hooks.NO

    def made() -> Accelerator:
        return Accelerator(
            cpu=device == "cpu",
            mixed_precision=mixed,
            dynamo_backend="no",  # it would compile the query encoder alone
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook),
                InitProcessGroupKwargs(timeout=timedelta(seconds=seconds + spare)),
            ],
        )

    try:
        if comms.uses_gpus(device == "cpu") and comms.world_size() == 1:
            comms.require_own_gpu(timedelta(seconds=seconds))
        try:
            found = made()
        except ValueError:
            if not AcceleratorState._shared_state:
                raise
            # An earlier run in this Python had another device or precision.
            AcceleratorState._reset_state(reset_partial_state=True)
            found = made()
    except (ValueError, ImportError, NotImplementedError) as error:
        given = [f"{k}={shown(v)}" for k, v in os.environ.items() if k.startswith("ACCELERATE_")]
        raise ConfigError(
            f"Accelerate refuses this launch ({shown(' '.join(str(error).split()))}); correct its "
            f"variables in the environment ({', '.join(sorted(given)) or 'none'}) or its file"
        ) from error
    except RuntimeError as error:
        if not comms.lost_connection(error):
            raise
        raise _not_met(error, seconds) from error
    if device != "auto" and found.device.type != device:
        cause = "ACCELERATE_TORCH_DEVICE"
        cause = cause if cause in os.environ else "ACCELERATE_USE_CPU"
        raise ConfigError(
            f"runtime.device={device}, and {cause}={os.environ.get(cause)} in the environment "
            f"chooses {found.device.type}; unset it, or give runtime.device=auto"
        )
    if comms.is_main():
        _say_ignored(found.mixed_precision, precision)
    return found


def _check_debug(device: str) -> None:
    on_cpu = device == "cpu" or _is_true(os.environ.get("ACCELERATE_USE_CPU", ""))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    detail = os.environ.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL"
    if detail and several and (on_cpu or not torch.cuda.is_available()):
        raise ConfigError(
            "TORCH_DISTRIBUTED_DEBUG=DETAIL in the environment makes PyTorch crash with several "
            "processes on CPUs (a segmentation fault); give INFO, or unset it"
        )


def _leave_aside() -> None:
    """Remove what would change the precision of products on GPUs, with a warning."""
    for name in _TF32:
        if (value := os.environ.pop(name, None)) is not None:
            torch.backends.cuda.matmul.allow_tf32 = False
            if number() == 0:
                ignored = "%s=%s in the environment is ignored; the configuration has the precision"
                logger.warning(ignored, name, shown(value))


def _say_ignored(mixed: str, precision: str) -> None:
    """Warn of each choice of the launcher that is not that of the configuration."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", mixed):
        ignored = "the launcher's mixed precision %s is ignored in favour of precision=%s"
        logger.warning(ignored, shown(asked), precision)
    if (asked := os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no":
        ignored = "the launcher's dynamo backend %s is ignored; runtime.compile=true compiles"
        logger.warning(ignored, shown(asked))
    if (asked := os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != "1":
        logger.warning(
            "the launcher's gradient accumulation over %s steps is ignored; "
            "runtime.micro_batches=N splits a batch to save memory",
            shown(asked),
        )


def _not_met(error: RuntimeError, seconds: float) -> UnavailableError:
    """Return why the processes did not meet, in one sentence."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    host, port = (os.environ.get(name, "?") for name in MEETING)
    first = shown(str(error).strip().splitlines()[0]) if str(error).strip() else "no reason given"
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return UnavailableError(
            f"port {port} of {host} is in use, most likely by another run; choose another one "
            "(accelerate launch --main_process_port 0 finds a free one), or end that run"
        )
    if "unable to find address" in str(error).lower() and (name := os.environ.get(_INTERFACE)):
        there = ", ".join(name for _, name in socket.if_nameindex())
        return UnavailableError(
            f"{_INTERFACE}={shown(name)} in the environment is no network interface of "
            f"{os.uname().nodename}, which has {there}; give one of them, or unset it"
        )
    return UnavailableError(
        f"process {rank} of {world} on {os.uname().nodename} did not meet the others at "
        f"{host}:{port} within {seconds:.0f} s ({first}); start all of them, and check the "
        "address, the port and the firewall between the machines"
    )


def job_end() -> float | None:
    """Return when the Slurm job around this process ends, in seconds since 1970; None without one.

    The variables of a job outlive it in a terminal multiplexer or a notebook server: what they say
    is left aside, with a warning, if the end is past or the job no longer runs.
    """
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    if not text.isdecimal():
        return None
    job = os.environ.get("SLURM_JOB_ID", "")
    why = ""
    if int(text) <= time.time():
        why = "is in the past"
    elif job.isdecimal() and _is_over(job):
        why = f"is that of job {job}, which no longer runs"
    if why:
        logger.warning(
            "SLURM_JOB_END_TIME=%s %s, so it is left over and ignored; unset it", text, why
        )
    return None if why else float(text)


def _is_over(job: str) -> bool:
    """Return whether Slurm knows that a job has ended; False where it can't be asked."""
    if not (squeue := shutil.which("squeue")):
        return False
    command = [squeue, "--noheader", "--states=all", f"--jobs={job}", "--format=%T"]
    with suppress(OSError, subprocess.TimeoutExpired):
        asked = subprocess.run(
            command, capture_output=True, text=True, timeout=_SQUEUE_SECONDS, check=False
        )
        states = asked.stdout.split()
        if asked.returncode == 0 and states:
            return _OVER.issuperset(states)  # several, if it is the first of an array
        return "invalid job id" in asked.stderr.lower()
    return False
