"""A stand-in for a GPU: PyTorch's real CUDA code runs, and kernels are counted, not computed.

It shows crashes, tensors on the wrong device, waits for the device, launches, memsets, the CPU time
of a step, what can be captured as a CUDA graph, and the calls of NCCL. It can't show numbers, GPU
time or the memory of cuDNN. Where a number that a kernel makes would decide something, it is made
up: a bool is true, an int64 is 1, the rest is 0.

Environment of a process: FAKE_GPUS is the number of GPUs; FAKE_NCCL a file that processes share;
FAKE_NCCL_LOG the start of the name of a list of collectives for each process; after FAKE_HANG_AFTER
collectives none returns.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FLAGS = ["-O1", "-fPIC", "-shared"]


def missing() -> str:
    """Return what the stand-in lacks to be built here, empty if nothing."""
    if not (torch.version.cuda or "").startswith("13."):
        return f"PyTorch {torch.__version__} is not built for CUDA 13"
    for folder, header in zip(_includes(), ("driver_types.h", "crt/host_defines.h"), strict=True):
        if not (folder / header).exists():
            return f"CUDA's {header}, which PyTorch's wheels bring, is not in {folder}"
    absent = [program for program in ("gcc", "g++") if not shutil.which(program)]
    return f"no {' and no '.join(absent)} on the PATH" if absent else ""


def built() -> Path:
    """Return the folder with the two libraries, which are built when their source is new."""
    sources = HERE / "cuda.cpp", HERE / "driver.c"
    content = b"".join(source.read_bytes() for source in sources)
    key = hashlib.sha256(content + torch.__version__.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "moco_dist" / f"stand_in_{key}"
    if not folder.exists():
        new = folder.with_name(f"{folder.name}.{os.getpid()}")
        new.mkdir(parents=True)
        includes = [f"-I{folder}" for folder in _includes()]
        cuda = ["g++", *FLAGS, "-std=c++17", *includes, str(sources[0]), "-lpthread"]
        driver = ["gcc", *FLAGS, "-w", "-Wl,-soname,libcuda.so.1", str(sources[1]), "-ldl"]
        for command, name in ((cuda, "libfakecuda.so"), (driver, "libcuda.so.1")):
            subprocess.run([*command, "-o", str(new / name)], check=True)
        (new / "libcuda.so").symlink_to("libcuda.so.1")  # by which Triton links to it
        try:
            new.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(new)
    return folder


def surroundings(more: dict[str, str]) -> dict[str, str]:
    """Return the environment of a process with a stand-in for a GPU, and `more` of it."""
    folder = built()
    return {
        **os.environ,
        "STAND_IN": str(folder),
        "LD_PRELOAD": f"{folder / 'libfakecuda.so'}:{folder / 'libcuda.so.1'}",
        "TRITON_LIBCUDA_PATH": str(folder),
        "FAKE_LAZY": "1",  # copies within the device are not made
        "ACCELERATE_USE_CPU": "false",
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def python(
    module: str, *arguments: object, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a module on the stand-in, with more `environment`, and return its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=surroundings(environment or {}),
        timeout=240,
    )


def torchrun(
    processes: int, module: str, *arguments: object, folder: Path, gpus: int = 0, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a module on several processes with a stand-in for NCCL, by torchrun on one machine.

    They share a file in `folder`; `gpus` are as many as processes unless given.
    """
    (folder / "nccl").unlink(missing_ok=True)
    launcher = ["--standalone", "--nproc_per_node", processes, "-m", module, *arguments]
    more |= {"FAKE_NCCL": str(folder / "nccl"), "FAKE_GPUS": str(gpus or processes)}
    return python("torch.distributed.run", *launcher, environment=more)


def measured(*requests: list[str], captured: bool = False) -> list[dict[str, Any]]:
    """Return what `measure.measure` counts of each configuration, all in one process.

    A request is a configuration file and overrides. `captured` counts a step that is repeated as a
    CUDA graph.
    """
    ended = python("tests.stand_in.measure", json.dumps(requests), json.dumps(captured))
    assert ended.returncode == 0, ended.stderr + ended.stdout
    found: list[dict[str, Any]] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _includes() -> tuple[Path, Path]:
    site = Path(sysconfig.get_path("purelib"))
    return site / "nvidia/cu13/include", site / "triton/backends/nvidia/include"
