"""A run watched through the files of its run directory, on any machine that sees them."""

from __future__ import annotations

import itertools
import operator
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from moco_dist.config.yaml_files import stored
from moco_dist.errors import shown
from moco_dist.runs import record
from moco_dist.runs.record import Line, number, text_of
from moco_dist.tracking import terminal
from moco_dist.tracking.progress import RunProgress, moment

PAUSE = 1.0  # seconds between two looks at the files
EARLIER = 5  # results at most that one look prints above the live picture


class Tail:
    """The lines of a file that grows, and is sometimes cut back to an earlier line."""

    def __init__(self, path: Path) -> None:
        self._path, self._end, self._last = path, 0, b""
        self._known: list[int] = []

    def read(self) -> tuple[bool, list[bytes], list[bytes]]:
        """Return whether it was cut back since the last call, the lines that stayed, and new ones.

        All are whole lines; nothing is new if the file can't be read.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._end - len(self._last))
                cut = file.read(len(self._last)) != self._last
                if cut:
                    file.seek(0)
                content = file.read()
        except OSError:
            return False, [], []
        lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)
        hashes, kept = list(map(hash, lines)), 0
        if cut:
            self._end, self._last = 0, b""
            same = map(operator.eq, hashes, self._known)
            kept = sum(itertools.takewhile(bool, same))
            del self._known[kept:]
        self._end += sum(map(len, lines))
        self._last = lines[-1] if lines else self._last
        self._known += hashes[kept:]
        return cut, lines[:kept], lines[kept:]


class Watch:
    """What is known of a followed run, and how it is shown."""

    def __init__(self, directory: Path, console: Console) -> None:
        self._directory, self._console = directory, console
        self._tail = Tail(directory / "metrics.jsonl")
        self._live = terminal.is_live(console)
        self._progress = RunProgress()
        # The state of the run, in a word and in a line.
        self._state, self.note = "", ""
        self.display = terminal.Display(console, self._progress, lambda: self.note)

    def look(self) -> bool:
        """Show what is new; return whether the run is done."""
        # In this order, because a run that is done has written all its lines.
        state, reason = record.standing(self._directory)
        cut, kept, new = self._tail.read()
        if cut:
            self._progress = RunProgress()
            self._add(record.parse(kept))
            self._print(f"{self._place()} started again from here")
        texts = self._add(record.parse(new))
        for text in texts[-EARLIER:] if self._live else texts:
            self._print(text)
        self._progress.running = state == "running"
        self._tell(state, reason)
        self.display.show(self._progress)
        return state == "done"

    def _tell(self, state: str, reason: str) -> None:
        """Note the state of the run, and print it if it is new."""
        if state == "empty":
            state, reason = "nothing is there yet", "waiting, Ctrl-C ends"
        elif state not in ("starting", "running", "done"):
            reason = f"{reason}; waiting for it to resume, Ctrl-C ends".removeprefix("; ")
        self.note = ": ".join(filter(None, [shown(self._directory), state, reason]))
        if state != self._state:
            self._state = state
            if reason or not self._live:
                self._print(f"{moment(time.time())} {self.note}")

    def _add(self, lines: list[Line]) -> list[str]:
        """Add lines to the progress; return those that are news, for a person to read."""
        if not lines:
            return []
        progress, config = self._progress, stored(self._directory / "config.yaml")
        progress.began = record.began(self._directory)
        progress.knn_every = int(number(config.get("knn.every_epochs")) or 0)
        progress.total = record.total_steps(config, lines) or progress.total
        texts = []
        for line in lines:
            progress.add(line)
            if text := self._text(line):
                texts.append(text)
        return texts

    def _text(self, line: Line) -> str | None:
        if isinstance(line.get("alarm"), str):
            text = text_of(line.get("text") or "")
            return f"{self._place()} ALARM {text_of(line['alarm'])}: {text}"
        return terminal.plain(line, self._progress, results_only=self._live)

    def _place(self) -> str:
        progress = self._progress
        return f"{moment(progress.moment)} {terminal.place(progress)}"

    def _print(self, text: str) -> None:
        terminal.write_line(self._console, text)


def follow(directory: Path, console: Console, wait: Callable[[float], None] = time.sleep) -> None:
    """Show a run in progress, as its own console does, until it is done."""
    watch = Watch(directory, console)
    live = terminal.is_live(console)
    if live:
        watch.display.start()
    try:
        while not watch.look():
            wait(PAUSE)
    finally:
        if live:
            watch.display.stop()
