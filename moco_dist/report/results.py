"""What a finished probe says, from its results.json, or from the DONE of an older one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco_dist.runs.record import (
    CONTROL,
    PARTS,
    PROBE_SCHEMA,
    TRAINED,
    Record,
    is_result,
    number,
    read_object,
    text_of,
)

TITLES = {TRAINED: "trained encoder", CONTROL: "random encoder"}
# Classes and combinations above which a file is not believed.
MAX_CLASSES, MAX_GRID = 100_000, 10_000


@dataclass(frozen=True)
class Value:
    """A figure: the mean over seeds, and the ends of its interval where it has one."""

    mean: float
    low: float | None = None
    high: float | None = None
    seeds: int = 1


@dataclass(frozen=True)
class Results:
    """The results of a probe; what its file lacks is empty."""

    content: dict[str, Any]
    classes: list[str]
    # True class, predicted class; from the part named.
    confusion: list[list[float]]
    confusion_part: str

    def value(self, encoder: str, part: str, name: str) -> Value | None:
        """Return a figure of an encoder ('probe' or 'control') on a part of the data."""
        found: Any = self.content.get("encoders")
        for key in (encoder, part, name):
            found = found.get(key) if isinstance(found, dict) else None
        return value(found)

    @property
    def rows(self) -> Iterator[tuple[str, str]]:
        """Return encoder and part of each set of figures."""
        for encoder in TITLES:
            for part in PARTS:
                if any(self.value(encoder, part, name) for name in self.names):
                    yield encoder, part

    @property
    def names(self) -> list[str]:
        """Return the names of the figures, as top1, top5, loss, knn_top1."""
        found: dict[str, None] = {}
        for encoder in TITLES:
            for part in PARTS:
                content: Any = self.content.get("encoders")
                for key in (encoder, part):
                    content = content.get(key) if isinstance(content, dict) else None
                figures = content if isinstance(content, dict) else {}
                found |= dict.fromkeys(
                    name for name, figure in figures.items() if is_result(name) and value(figure)
                )
        order = {name: place for place, name in enumerate(("top1", "top5", "loss", "knn_top1"))}
        return sorted(found, key=lambda name: order.get(name, 1))

    @property
    def part(self) -> str:
        """Return 'test' where there are test results, else 'validation'."""
        return "test" if self.value(TRAINED, "test", "top1") else "validation"

    def majority(self, part: str) -> float | None:
        """Return the top-1 of always naming the most frequent class."""
        found = self.content.get("majority_top1")
        return number(found.get(part)) if isinstance(found, dict) else None

    @property
    def titles(self) -> dict[str, str]:
        """Return what the encoders are called; fine-tuning has one trained from scratch beside."""
        scratch = self.content.get("protocol") == "finetune"
        return TITLES | ({CONTROL: "from scratch"} if scratch else {})

    @property
    def faults(self) -> list[str]:
        """Return what the probe found wrong, a sentence each."""
        found = self.content.get("faults")
        return [text_of(each) for each in found[:20]] if isinstance(found, list) else []

    @property
    def grid(self) -> list[dict[str, Any]]:
        """Return the combinations tried, with the accuracies of each."""
        found = self.content.get("grid")
        entries = found[:MAX_GRID] if isinstance(found, list) else []
        return [entry for entry in entries if isinstance(entry, dict)]

    @property
    def verdict(self) -> tuple[str, bool]:
        """Return what the probe said of its figures, and whether that is good news."""
        return text_of(self.content.get("verdict") or ""), self.content.get("better") is not False


def value(found: object) -> Value | None:
    """Return a figure of a file: a number, or an object with a mean."""
    if isinstance(found, dict):
        mean, low, high = (number(found.get(key)) for key in ("mean", "low", "high"))
        each = found.get("values")
        seeds = len(each) if isinstance(each, list) else 1
        if low is None or high is None:
            low = high = None
        return None if mean is None else Value(mean, low, high, seeds)
    plain = number(found)
    return None if plain is None else Value(plain)


def results(record: Record) -> Results | None:
    """Return the results of a probe that is done, None of any other run."""
    if not record.results or record.kind != "probe":
        return None
    content = read_object(record.directory / "results.json")
    is_ours = content.get("schema") == PROBE_SCHEMA["schema"]
    if not is_ours or not isinstance(content.get("encoders"), dict):
        content = {"encoders": record.results}
    names = content.get("classes")
    classes = [text_of(name) for name in names[:MAX_CLASSES]] if isinstance(names, list) else []
    for part in reversed(PARTS):
        found: Any = content["encoders"]
        for key in (TRAINED, part, "confusion"):
            found = found.get(key) if isinstance(found, dict) else None
        if (counts := _square(found)) and len(counts) == len(classes):
            return Results(content, classes, counts, part)
    drawn = sorted(record.directory.glob("media/step_*/confusion.csv"))
    classes, counts = _from_csv(drawn[-1]) if drawn else (classes, [])
    found_part = Results(content, classes, [], "").part
    return Results(content, classes, counts, found_part if counts else "")


def _square(found: object) -> list[list[float]]:
    """Return a square matrix of counts of 0 or more, or nothing."""
    if not isinstance(found, list) or not 0 < len(found) <= MAX_CLASSES:
        return []
    rows = [
        [n for cell in row if (n := number(cell)) is not None and 0 <= n < 2**53]
        for row in found
        if isinstance(row, list)
    ]
    return rows if [len(row) for row in rows] == [len(found)] * len(found) else []


def _from_csv(path: Path) -> tuple[list[str], list[list[float]]]:
    """Return classes and counts of media/*/confusion.csv, whose cells are JSON."""
    with suppress(OSError, ValueError, RecursionError, IndexError):
        head, *rows = (json.loads(f"[{line}]") for line in path.read_text().splitlines())
        classes, counts = [text_of(name) for name in head[1:]], _square([row[1:] for row in rows])
        if len(classes) == len(counts):
            return classes, counts
    return [], []
