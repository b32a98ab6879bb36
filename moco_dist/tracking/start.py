"""The trackers of a run, and its banner."""

from __future__ import annotations

import platform

import accelerate
import torch
from rich.console import Console

import moco_dist
from moco_dist.config import yaml_files
from moco_dist.distributed import comms, peers
from moco_dist.runs import record
from moco_dist.runs.environment import shared_environment
from moco_dist.runs.session import Session
from moco_dist.tracking import terminal, wandb_run
from moco_dist.tracking import tracker as tracking_tracker
from moco_dist.tracking.feed import Feed, Service
from moco_dist.tracking.media import Album
from moco_dist.tracking.tensorboard_run import TensorBoardRun

console = Console()


def tracker(
    session: Session, total_steps: int, job: str, group: str | None = None
) -> tracking_tracker.Tracker:
    """Return where metrics go: nowhere on processes other than the first.

    `job` is what W&B calls this kind of run, `group` the group of a run that it belongs to.
    """
    resumed, run, settings = session.resumed, session.directory, session.settings
    step = resumed.step if resumed else 0
    path = run / "metrics.jsonl"
    # A new run has no lines yet, not even that of step 0.
    kept = step if resumed else -1
    evaluated = resumed is None or resumed.state.get("evaluated") == step
    lines = peers.together(
        lambda: tracking_tracker.json_lines(path, kept, evaluated) if comms.is_main() else None
    )
    if not lines:
        return tracking_tracker.Tracker([])
    tracking_tracker.cut_media(run / "media", kept)
    past = record.lines(path)
    shown, bar = terminal.show(console, total_steps, step, settings.knn.every_epochs, past)
    services: list[Service] = []
    if wandb_run.mode(settings.tracking) != "disabled":
        group = group or f"{settings.name}-{session.run_id}"
        identity = wandb_run.Identity(session.run_id, settings.name, group, job)
        services.append(
            wandb_run.WandbRun(
                settings.tracking,
                run,
                identity,
                yaml_files.to_dict(settings) | {"environment": shared_environment()},
                lambda text: console.print(text, soft_wrap=True, highlight=False, markup=False),
            )
        )
    if settings.tracking.tensorboard:
        services.append(TensorBoardRun(session.accelerator, run))
    feeds = [Feed(service, path) for service in services]
    album = Album(run / "media") if settings.tracking.media_every_epochs else None
    return tracking_tracker.Tracker([lines, shown], bar, feeds, album)


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
