"""What a person reads while a run goes on: a live bar in a terminal, plain lines without one."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from moco_dist.tracking import Metrics, Sink


def show(console: Console, total_steps: int, start_step: int) -> tuple[Sink, Progress | None]:
    """Return a sink for a person to read: a live bar in a terminal, one plain line each without."""
    began: list[float] = []  # time and step of the first line about training
    columns = (
        BarColumn(bar_width=None),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True),
    )
    bar = Progress(*columns, console=console) if console.is_terminal else None
    task = bar.add_task("", total=total_steps, completed=start_step) if bar else None

    def line(step: int, metrics: Metrics) -> None:
        rate = metrics.get("train/images_per_second")
        loss = metrics.get("train/loss")
        if bar and task is not None and loss is not None:
            speed = f" {rate:,.0f} img/s" if rate else ""
            bar.update(task, completed=step, description=f"loss {loss:.3f}{speed}")
        results = {
            k: v
            for k, v in metrics.items()
            if k.startswith(("knn/", "probe/", "control/", "test/"))
        }
        if bar is None or results:
            shown = results if bar else metrics
            parts = [f"{_short(name)} {_text(name, value)}" for name, value in shown.items()]
            if loss is not None and not began:
                began.extend((time.monotonic(), step))
            left = _remaining(began, step, total_steps) if began else ""
            parts += [f"{left} left"] if left and not bar else []
            console.print(
                f"step {step:,}/{total_steps:,}  " + "  ".join(parts),
                soft_wrap=True,
                highlight=False,
            )

    return line, bar


def _short(name: str) -> str:
    return (
        name.removeprefix("train/").replace("images_per_second", "img/s").replace("accuracy_", "")
    )


def _text(name: str, value: float) -> str:
    if "top" in name or name == "queue/fill":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if name.endswith("per_second") else f"{value:.4g}"


def _remaining(began: list[float], step: int, total_steps: int) -> str:
    done, left = step - began[1], total_steps - step
    if done <= 0 or left <= 0:
        return ""
    minutes, seconds = divmod(round((time.monotonic() - began[0]) / done * left), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
