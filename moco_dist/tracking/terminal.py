"""What a person reads during a run: a live picture in a terminal, plain lines elsewhere.

Both need only a run's lines of metrics, so `report --follow` shows the same.
"""

from __future__ import annotations

import logging
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moco_dist.runs.record import Line, Metric
from moco_dist.tracking.progress import RunProgress, duration, moment

Sink = Callable[[int, Mapping[str, Any]], None]

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-=+*#"
ALARMS = 3  # that stay in the picture


class Display:
    """The live picture of a run below what is printed; `note` returns its last line."""

    def __init__(
        self, console: Console, progress: RunProgress, note: Callable[[], str] = lambda: ""
    ) -> None:
        self._console, self._progress, self._note = console, progress, note
        self._began, self._handlers = time.monotonic(), list[Any]()
        self._live: Live | None = None

    def start(self) -> None:
        """Show it from now on, with warnings above it as whole lines."""
        stderr = sys.stderr
        self._live = Live(
            console=self._console,
            get_renderable=self._picture,
            refresh_per_second=1,
            redirect_stderr=stderr.isatty(),
        )
        with suppress(OSError):
            self._live.start(refresh=True)
            # A process that is killed would leave the terminal without a cursor.
            self._console.show_cursor(True)
        # Handlers of `logging` keep the stream that they were made with.
        self._handlers = [
            handler
            for handler in logging.root.handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream is stderr
        ]
        for handler in self._handlers:
            handler.setStream(sys.stderr)

    def stop(self) -> None:
        """Leave the picture as it is."""
        if live := self._live:
            with suppress(OSError):
                live.stop()
        for handler in self._handlers:
            handler.setStream(sys.stderr)

    def show(self, progress: RunProgress) -> None:
        """Draw `progress` now."""
        self._progress = progress
        if self._live and self._live.is_started:
            with suppress(OSError):
                self._live.refresh()

    def _picture(self) -> RenderableType:
        options = self._console.options
        # Room for the ^C of the terminal, which would begin a line.
        width = max(20, options.max_width - 3)
        return picture(self._progress, width, options.ascii_only, time.time(), self._note())


def show(
    console: Console, total: int, step: int, knn_every: int = 0, before: Iterable[Line] = ()
) -> tuple[Sink, Display | None]:
    """Return a sink for a person to read, and the live picture if the console can show it.

    `before` are the lines of earlier launches, up to `step`.
    """
    progress = RunProgress(total, step, knn_every)
    for line in before:
        progress.add(line)
    progress.begin_again()
    display = Display(console, progress) if is_live(console) else None

    def write(step: int, metrics: Mapping[str, Any]) -> None:
        line: dict[str, Any] = {"step": step, "time": time.time(), **metrics}
        progress.add(line)
        # Alarms are printed through `logging`.
        text = None if "alarm" in line else plain(line, progress, results_only=display is not None)
        if text:
            write_line(console, text)
        if display:
            display.show(progress)

    return write, display


def is_live(console: Console) -> bool:
    """Return whether the console is a terminal that can show a picture."""
    return console.is_interactive and not console.is_dumb_terminal and console.file.isatty()


def write_line(console: Console, text: str) -> None:
    """Print one line as it is; a terminal breaks it between words."""
    _print(console, text, soft_wrap=not is_live(console))


def _print(console: Console, text: str, soft_wrap: bool = True, style: str | None = None) -> None:
    """Print a text; a log that can't be written, or a closed pipe, does not end the run."""
    with suppress(OSError, SystemExit):
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=soft_wrap)


def banner(console: Console, title: str, rows: Mapping[str, str]) -> None:
    """Print a title and, under it, names with their texts."""
    table(console, title, list(rows.items()), words=2)


def table(console: Console, title: str, rows: Sequence[Sequence[str]], words: int) -> None:
    """Print a title and, under it, aligned columns; a log gets each row as one line."""
    _print(console, title, style="bold")
    for line in layout(rows, words, console.width if is_live(console) else sys.maxsize):
        _print(console, line)


def plain(line: Mapping[str, Any], progress: RunProgress, results_only: bool = False) -> str | None:
    """Return a line of metrics as one line of ASCII, usually under 80 characters; None if no news.

    `progress` has the line already.
    """
    shown = figures({name: v for name, v in line.items() if isinstance(v, float | int)})
    if results_only:
        shown = {name: text for name, text in shown.items() if name == "kNN"}
    if not shown:
        return None
    if "kNN" in shown and (best := progress.best_knn) and line["step"] != best[0]:
        shown["best"] = f"{share(best[1])} at {best[0]}"
    left = progress.seconds_left() if Metric.LOSS in line and not results_only else None
    steps = place(progress).rjust(2 * len(str(progress.total)) + 1)
    time_left = [] if left is None else [f"{duration(left)} left"]
    epochs = [f"epoch {progress.newest['epoch']:5.1f}"] if "epoch" in progress.newest else []
    return " ".join([moment(progress.moment), steps, *epochs, *words(shown), *time_left])


def layout(rows: Sequence[Sequence[str]], words: int, width: int = sys.maxsize) -> list[str]:
    """Return the rows as lines with aligned columns, the first `words` left-aligned, others right.

    A line longer than `width` continues below its last column.
    """
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for cells in rows:
        *head, last = [
            cell.ljust(size) if place < words else cell.rjust(size)
            for place, (cell, size) in enumerate(zip(cells, sizes, strict=True))
        ]
        indent = "".join(f"{cell}  " for cell in head)
        wrapper = textwrap.TextWrapper(
            max(width, len(indent) + 20),
            initial_indent=indent,
            subsequent_indent=" " * len(indent),
            break_long_words=False,  # a path stays whole, to be copied
            break_on_hyphens=False,
        )
        lines += wrapper.wrap(last.rstrip()) or [indent.rstrip()]
    return lines


def picture(
    progress: RunProgress, width: int, ascii_only: bool, now: float, note: str = ""
) -> RenderableType:
    """Return the live picture of a run: progress bar, figures, curves, alarms."""
    total, step, newest = progress.total, progress.step, progress.newest
    left = progress.seconds_left()
    since = max(0, now - progress.moment)
    after = "" if left is None else f"{duration(max(0, left - since))} left"
    way = Table.grid(padding=(0, 1))
    way.width = width
    for ratio in (None, 1, None, None):
        way.add_column(no_wrap=True, ratio=ratio)
    bar = ProgressBar(total=max(1, total), completed=step)
    way.add_row(place(progress), bar, f"{100 * step // max(1, total)}%", after)
    shown = figures(newest)
    speed = {name: text for name, text in shown.items() if name == "img/s"}
    best = {"best": share(progress.best_knn[1])} if progress.best_knn else {}
    epochs = [f"epoch {newest['epoch']:.1f}"] if "epoch" in newest else []
    # A no-break space within each part keeps it on one line.
    parts = ["\xa0".join(part.split()) for part in [*epochs, *words(shown | best | speed)]]
    flowed = textwrap.wrap("  ".join(parts), width, break_long_words=False, break_on_hyphens=False)
    rows: list[RenderableType] = [way, *(Text(line.replace("\xa0", " ")) for line in flowed)]
    marks = ASCII if ascii_only else BLOCKS
    accuracy = "kNN " if Metric.KNN_TOP1 in newest else "top1"
    for name, curve in (("loss", progress.loss), (accuracy, progress.accuracy)):
        if len(curve.points) > 1:
            rows.append(Text(f"{name} {curve.drawn(width - 5, marks)}", no_wrap=True))
    alarms = ((alarm, "bold yellow") for alarm in progress.alarms[-ALARMS:])
    for text, style in [*alarms, (note, "dim")]:
        if text:
            cut = text if len(text) <= width else f"{text[: width - 3]}..."
            rows.append(Text(cut, style=style))
    return Group(*rows)


def place(progress: RunProgress) -> str:
    """Return how far a run is."""
    return f"{progress.step}/{progress.total or '?'}"


def figures(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return the figures to show, under their short names."""
    names: dict[str, tuple[str, Callable[[float], str]]] = {
        Metric.LOSS: ("loss", loss),
        Metric.ACCURACY_TOP1: ("top1", share),
        Metric.PROBE_TOP1: ("probe", share),
        Metric.CONTROL_TOP1: ("control", share),
        Metric.KNN_TOP1: ("kNN", share),
        Metric.ONLINE_TOP1: ("linear", share),
        Metric.IMAGES_PER_SECOND: ("img/s", lambda value: f"{value:4.0f}"),
    }
    return {shown: text(metrics[name]) for name, (shown, text) in names.items() if name in metrics}


def words(shown: Mapping[str, str]) -> list[str]:
    """Return the figures with their names."""
    return [
        f"{text} {name}" if name == "img/s" else f"{name} {text}" for name, text in shown.items()
    ]


def loss(value: float) -> str:
    """Return a loss in few characters."""
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def share(value: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * value:4.1f}%"
