"""The trackers of a run, and its banner."""

from __future__ import annotations

import platform
from functools import partial

import accelerate
import torch
from rich.console import Console

import moco_dist
from moco_dist.config import yaml_files
from moco_dist.distributed import comms, peers
from moco_dist.errors import counted
from moco_dist.runs import record
from moco_dist.runs.environment import environment
from moco_dist.runs.session import Session
from moco_dist.tracking import terminal, wandb_run
from moco_dist.tracking.feed import Feed, Service
from moco_dist.tracking.media import Album
from moco_dist.tracking.tensorboard_run import TensorBoardRun
from moco_dist.tracking.tracker import Tracker, cut_media, json_lines

console = Console()


def tracker(session: Session, total_steps: int, job: str, group: str | None = None) -> Tracker:
    """Return the tracker of a run; it tracks nothing on processes other than the first.

    `job` is W&B's job type, and `group` its group if that is another run's.
    """
    resumed, run, settings = session.resumed, session.directory, session.settings
    step = resumed.step if resumed else 0
    path = run / "metrics.jsonl"
    # A new run has no lines yet, not even that of step 0.
    kept = step if resumed else -1
    evaluated = resumed is None or resumed.state.get("evaluated") == step
    lines = peers.together(lambda: json_lines(path, kept, evaluated) if comms.is_main() else None)
    if not lines:
        return Tracker([])
    cut_media(run / "media", kept)
    past = record.lines(path)
    shown, bar = terminal.show(console, total_steps, step, settings.knn.every_epochs, past)
    services: list[Service] = []
    if wandb_run.mode(settings.tracking) != "disabled":
        group = group or f"{settings.name}-{session.run_id}"
        identity = {"id": session.run_id, "name": settings.name, "group": group, "job_type": job}
        machine = {key: value for key, value in environment().items() if key != "arguments"}
        content = yaml_files.to_dict(settings) | {"environment": machine}
        say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
        services.append(wandb_run.WandbRun(settings.tracking, run, identity, content, say))
    if settings.tracking.tensorboard:
        services.append(TensorBoardRun(session.accelerator, run))
    feeds = [Feed(service, path) for service in services]
    album = Album(run / "media") if settings.tracking.media_every_epochs else None
    return Tracker([lines, shown], bar, feeds, album)


def banner(session: Session, title: str, rows: dict[str, str]) -> None:
    """Print what is about to run, on the first process."""
    if not comms.is_main():
        return
    name = f"CPU, {counted(torch.get_num_threads(), 'thread')} each"
    if session.device.type == "cuda":
        name = torch.cuda.get_device_name(session.device)
    all_rows = {
        "run": str(session.directory),
        "processes": f"{comms.world_size()} ({name})",
        **rows,
        "versions": f"moco_dist {moco_dist.__version__}, torch {torch.__version__}, "
        f"accelerate {accelerate.__version__}, Python {platform.python_version()}",
    }
    if session.resumed:
        all_rows["resumed"] = f"at step {session.resumed.step:,}, from {session.resumed.path.name}"
    terminal.banner(console, f"moco_dist {title}", all_rows)


def nothing_left(session: Session, step: int, total: int) -> None:
    """Print, on the first process, that a run is at its last step already."""
    if comms.is_main():
        place = f"step {step:,} of {total:,}"
        terminal.write_line(console, f"{session.directory} is at {place}: nothing is left to do.")
