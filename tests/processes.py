"""Runs a test function on several real processes joined by gloo, in a few seconds."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A forkserver that has loaded all of this forks a worker in a hundredth of a second. To load it
# would take each worker four tenths.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["pytest", *(f"moco_dist.{command}.run" for command in ("pretrain", "probe", "bench"))]
)


def run(
    function: Callable[..., Any], processes: int, *arguments: Any, timeout: float = 300
) -> list[Any]:
    """Return what `function(*arguments)` returns on each of `processes` ranks, in their order.

    `function` must be importable. An exception on any rank is raised here with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_context.Pipe(duplex=False) for _ in range(processes)]
        rendezvous = Path(folder, "rendezvous")
        workers = [
            _context.Process(
                target=_work,
                args=(rank, processes, rendezvous, pipe, function, arguments),
                daemon=True,
            )
            for rank, (_, pipe) in enumerate(pipes)
        ]
        for worker in workers:
            worker.start()
        for _, pipe in pipes:
            pipe.close()
        deadline = time.monotonic() + timeout
        results: list[Any] = []
        failures: list[Any] = []
        try:
            for rank, (pipe, _) in enumerate(pipes):
                if not pipe.poll(max(0, deadline - time.monotonic())):
                    raise TimeoutError(f"rank {rank} of {processes} gave no result in {timeout} s")
                try:
                    good, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    good, value = False, f"rank {rank} died without a word"
                (results if good else failures).append(value)
        finally:
            for worker in workers:
                worker.join(5 if not failures else 0.5)
                worker.kill()
        if failures:
            raise AssertionError("\n".join(failures))
        return results


def _work(
    rank: int,
    processes: int,
    rendezvous: Path,
    pipe: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    try:
        if processes > 1:
            dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=processes)
        result = pickle.dumps((True, function(*arguments)))
    except BaseException:
        result = pickle.dumps((False, f"rank {rank} of {processes}:\n{traceback.format_exc()}"))
    sys.stdout.flush()
    pipe.send_bytes(result)
    if dist.is_initialized():
        dist.destroy_process_group()
