"""A job: the processes of one command, started in a hundredth of a second, watched and killed."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.pretrain import run as pretrain_run
from moco_dist.pretrain.alarms import NOT_FINITE
from moco_dist.probe import run as probe_run
from moco_dist.runs import checkpoint, command
from tests.processes import _context

# A run of 40 images of 16 x 16 pixels: some ten milliseconds a step.
TINY = [
    *("batch_size=8", "bn_groups=4", "encoder.width=4", "encoder.dim=8", "moco.queue_size=20"),
    *("data.shapes_train=50", "data.shapes_test=10", "data.size=16", "views.size=16", "epochs=12"),
    *("tracking.every_steps=1", "checkpoint.every_epochs=0", "checkpoint.every_steps=5"),
    *("knn.every_epochs=4", "knn.k=5", "runtime.device=cpu", "runtime.timeout_seconds=20"),
]
STEPS = 60  # 45 training images are 5 steps an epoch

Plant = Callable[[int], None]


class Job:
    """The processes of one start of a run, with their output in a file."""

    def __init__(
        self,
        output: Path,
        *arguments: str,
        processes: int = 1,
        plant: Plant | None = None,
        module: str = "pretrain",
        name: str = "run",
    ) -> None:
        self.run = output / name
        self.log = output / f"{name}.log"
        output.mkdir(parents=True, exist_ok=True)
        # Kept here, as a launcher keeps it, so that it outlives process 0.
        self.store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self.began = time.time()
        command_line = [*arguments, f"output={output}", f"name={name}"]
        self.workers = [
            _context.Process(
                target=_work,
                args=(rank, processes, self.store.port, module, command_line, self.log, plant),
                daemon=True,
            )
            for rank in range(processes)
        ]
        for worker in self.workers:
            worker.start()

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to the processes `ranks`, or to all."""
        for rank in ranks or range(len(self.workers)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid(rank), number)

    def pid(self, rank: int) -> int:
        pid = self.workers[rank].pid
        assert pid is not None
        return pid

    def wait(self, seconds: float = 60, *ranks: int) -> list[int]:
        """Return the exit statuses once the processes have ended; AssertionError if they don't."""
        chosen = [self.workers[rank] for rank in ranks or range(len(self.workers))]
        deadline = time.monotonic() + seconds
        for worker in chosen:
            worker.join(max(0, deadline - time.monotonic()))
        late = [worker.pid for worker in chosen if worker.exitcode is None]
        if late:
            text = self.text()
            self.end()
            raise AssertionError(f"still running after {seconds} s: {late}\n{text}")
        return [worker.exitcode for worker in chosen if worker.exitcode is not None]

    def end(self) -> None:
        """Kill what is left."""
        for worker in self.workers:
            worker.kill()
            worker.join()

    def until(self, holds: Callable[[], Any], seconds: float = 60) -> None:
        """Wait until something holds; AssertionError if it doesn't, or if all processes ended."""
        deadline = time.monotonic() + seconds
        while not holds():
            ended = all(worker.exitcode is not None for worker in self.workers)
            if time.monotonic() > deadline or (ended and not holds()):
                raise AssertionError(f"did not come to pass; ended: {ended}\n{self.text()}")
            time.sleep(0.002)

    def until_step(self, step: int) -> None:
        """Wait until step `step` has been logged."""
        self.until(lambda: last_step(self.run, self.began) >= step)

    def text(self) -> str:
        """Return what the processes have printed."""
        return self.log.read_text() if self.log.exists() else ""

    def errors(self) -> list[str]:
        """Return the lines that tell the user why the run ended."""
        return [
            line for line in self.text().splitlines() if line.startswith(("error: ", "stopped by "))
        ]

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()


def _work(
    rank: int,
    processes: int,
    port: int,
    module: str,
    arguments: list[str],
    log: Path,
    plant: Plant | None,
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    signal.signal(HUP, signal.SIG_DFL)  # the tests may run under nohup
    os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "WANDB_MODE": "disabled"}
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
        os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    if plant:
        plant(rank)
    sys.argv = [module, *arguments]
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    if module == "pretrain":
        command.main(PretrainConfig, pretrain_run.run, None)
    else:
        command.main(ProbeConfig, probe_run.run, None)


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return the whole lines of metrics.jsonl."""
    try:
        lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return []
    return [line for line in map(json.loads, lines) if "step" in line]


def last_step(run: Path, since: float = 0) -> int:
    """Return the step of the last line about training since a time, 0 if there is none."""
    lines = (line for line in metrics(run) if line["time"] >= since)
    return max((line["step"] for line in lines if "train/loss" in line), default=0)


def figures(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics without what depends on the machine, the hour and the fault."""
    own = {"time", "train/images_per_second", "system/memory_gb"}
    lines = [line for line in metrics(run) if line.get("alarm") != NOT_FINITE]
    return [{k: v for k, v in line.items() if k not in own} for line in lines]


def account(run: Path) -> dict[str, Any]:
    """Return what must be the same however often a run was interrupted: figures and state."""
    found = checkpoint.newest(run)
    assert found is not None, f"{run} has no checkpoint"
    content = {k: found.state[k] for k in ("files", "enqueued", "evaluated", "best", "epoch")}
    return {"step": found.step, "metrics": figures(run), "content": content}


def status(run: Path) -> dict[str, Any]:
    """Return the content of status.json."""
    found: dict[str, Any] = json.loads((run / "status.json").read_text())
    return found


def in_save(run: Path) -> bool:
    """Return whether a checkpoint is being written."""
    return any((run / "checkpoints").glob(".step_*.tmp"))


@contextlib.contextmanager
def undisturbed(output: Path, *arguments: str, processes: int = 1) -> Iterator[dict[str, Any]]:
    """Give the account of a run that nothing happens to; it is made once for all faults."""
    key = (*arguments, str(processes))
    if key not in _accounts:
        with Job(output, *arguments, processes=processes) as job:
            states = job.wait(300)
            assert set(states) == {0}, job.text()
            _accounts[key] = account(job.run)
    yield copy.deepcopy(_accounts[key])


_accounts: dict[tuple[str, ...], dict[str, Any]] = {}


def alive(pid: int) -> bool:
    """Return whether a process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


KILL, TERM, INT, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
HUP = signal.SIGHUP
