"""Start and end of a run: exit states, Accelerator, run directory, banner."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import torch
import torchvision
from accelerate import Accelerator, DistributedDataParallelKwargs
from rich.console import Console
from rich.table import Table

import moco_dist
from moco_dist import checkpoint, comms, config_files, tracking
from moco_dist.checkpoint import output_errors
from moco_dist.config import PretrainConfig, ProbeConfig
from moco_dist.errors import ConfigError, UserError

Schema = TypeVar("Schema")
logger = logging.getLogger(__name__)

console = Console()

COMMANDS = """\
  accelerate launch -m moco_dist.pretrain configs/pretrain/cifar10.yaml [file.yaml | key=value ...]
  accelerate launch -m moco_dist.probe configs/probe/cifar10.yaml encoder=runs/cifar10 [...]
One process: python -m. Several CPU processes: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu
--num_processes 2 -m. Files and overrides apply from left to right onto these defaults:
"""


def main(schema: type[Schema], run: Callable[[Schema], None], purpose: str | None) -> None:
    """Load the command line's configuration, call `run`, and exit with what came of it."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(f"{purpose}\n\n{COMMANDS}\n{config_files.to_yaml(schema())}", end="")
        return
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.captureWarnings(True)
    status = 0
    try:
        run(config_files.load(schema, arguments))
    except UserError as error:
        status = error.exit_status
        if os.environ.get("RANK", "0") == "0":  # all processes have the same error: comms.together
            print(f"error: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        status = 130
    finally:
        comms.shutdown()
    sys.exit(status)


@dataclass(frozen=True)
class Session:
    """What a run has besides its own state."""

    accelerator: Accelerator
    # The run directory, runs/<name>.
    directory: Path
    # Where the newest whole checkpoint stands; None at the start of a new run.
    resumed: checkpoint.Checkpoint | None
    finished: bool

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = self.accelerator.device
        return device


def start(settings: PretrainConfig | ProbeConfig) -> Session:
    """Join the processes, open the run directory and find where to go on; on all processes."""
    accelerator = Accelerator(
        cpu=settings.runtime.device == "cpu",
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if not comms.is_main():
        logging.disable(logging.WARNING)
    wanted, got = settings.runtime.processes, comms.world_size()
    if wanted not in (0, got):
        raise ConfigError(
            f"runtime.processes={wanted} and {got} took part; start that many "
            f"(on CPUs: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            f"--num_processes {wanted} -m ...)"
        )
    checksum = f"{zlib.crc32(config_files.to_yaml(settings).encode()):08x}"
    comms.same_everywhere("the checksum of the configuration", checksum)
    if settings.runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=True)
        # It would fill every new tensor first; nothing here reads one unwritten.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    directory = Path(settings.output).expanduser() / settings.name
    resumed = checkpoint.newest(directory)
    comms.from_main(lambda: _open_directory(directory, settings, resumed))
    finished = comms.from_main(lambda: (directory / "DONE").exists())
    return Session(accelerator, directory, resumed, finished)


def _open_directory(
    directory: Path, settings: PretrainConfig | ProbeConfig, resumed: checkpoint.Checkpoint | None
) -> None:
    if resumed:
        now = config_files.to_dict(settings)
        changed = config_files.changed_keys(resumed.state["config"], now)
        if changed:
            raise ConfigError(
                f"{directory} holds a run with another configuration ({'; '.join(changed)}); "
                "give it back to resume that run, or choose name=... for a new one"
            )
    with output_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        replace(directory / "config.yaml", config_files.to_yaml(settings))
        replace(directory / "environment.json", json.dumps(environment(), indent=1))


def replace(path: Path, text: str) -> None:
    """Write a small text file so that it is whole or as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def environment() -> dict[str, Any]:
    """Return what this start of the run ran on and with."""
    cuda = torch.cuda.is_available()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "arguments": sys.argv[1:],
        "processes": comms.world_size(),
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "moco_dist": moco_dist.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "accelerate": accelerate.__version__,
        "cuda": torch.version.cuda if cuda else None,
    }


def tracker(
    session: Session, settings: PretrainConfig | ProbeConfig, total_steps: int
) -> tracking.Tracker:
    """Return where metrics go: nowhere on processes other than the first."""
    if not comms.is_main():
        return tracking.Tracker([])
    step = session.resumed.step if session.resumed else 0
    lines = tracking.json_lines(session.directory / "metrics.jsonl", step)
    shown, bar = tracking.console_lines(console, total_steps, step)
    return tracking.Tracker([lines, shown], bar)


def banner(session: Session, title: str, rows: dict[str, str]) -> None:
    """Print what is about to run, on the first process."""
    if not comms.is_main():
        return
    device = session.device
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads each"
    )
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    all_rows = {
        "run": str(session.directory),
        "processes": f"{comms.world_size()} ({name})",
        **rows,
        "versions": f"moco_dist {moco_dist.__version__}, torch {torch.__version__}, "
        f"accelerate {accelerate.__version__}, Python {platform.python_version()}",
    }
    if session.resumed:
        all_rows["resumed"] = f"at step {session.resumed.step:,}, from {session.resumed.path.name}"
    for key, value in all_rows.items():
        table.add_row(key, value)
    console.print(f"[bold]moco_dist {title}[/bold]", highlight=False)
    console.print(table, highlight=False)


def finish(session: Session, results: dict[str, Any]) -> None:
    """Mark the run as done, with its results as JSON in DONE."""

    def write() -> None:
        with output_errors(session.directory):
            replace(session.directory / "DONE", json.dumps(results, indent=1) + "\n")

    comms.from_main(write)
