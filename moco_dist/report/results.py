"""The results of a finished probe, read from results.json or else from DONE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
# Most classes and points of the grid that are read.
MAX_CLASSES, MAX_GRID = 100_000, 10_000


@dataclass(frozen=True)
class Value:
    """The mean of a figure over seeds, and its interval if it has one."""

    mean: float
    low: float | None = None
    high: float | None = None
    seeds: int = 1


@dataclass(frozen=True)
class Results:
    """The results of a probe; what the file lacks is empty.

    `confusion` is (true class, predicted class) on `confusion_part`.
    """

    content: dict[str, Any]
    classes: list[str]
    confusion: list[list[float]]
    confusion_part: str

    def value(self, encoder: str, part: str, name: str) -> Value | None:
        """Return a figure of the encoder 'probe' or 'control' on a part of the data."""
        figures = _entry(_entry(self.content["encoders"], encoder), part)
        return value(figures.get(name))

    @property
    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield the encoders and parts that have figures."""
        for encoder in TITLES:
            for part in PARTS:
                if any(self.value(encoder, part, name) for name in self.names):
                    yield encoder, part

    @property
    def names(self) -> list[str]:
        """Return the names of the figures: top1, top5 or another top-k, loss, knn_top1."""
        encoders: dict[str, Any] = self.content["encoders"]
        parts = [_entry(_entry(encoders, encoder), part) for encoder in TITLES for part in PARTS]
        pairs = ((name, figure) for figures in parts for name, figure in figures.items())
        found = dict.fromkeys(name for name, figure in pairs if is_result(name) and value(figure))
        order = {"top1": 0, "loss": 2, "knn_top1": 3}
        return sorted(found, key=lambda name: order.get(name, 1))

    @property
    def part(self) -> str:
        """Return 'test' if there are test results, else 'validation'."""
        return "test" if self.value(TRAINED, "test", "top1") else "validation"

    def majority(self, part: str) -> float | None:
        """Return the top-1 of always predicting the most common class."""
        found = self.content.get("majority_top1")
        return number(found.get(part)) if isinstance(found, dict) else None

    @property
    def titles(self) -> dict[str, str]:
        """Return the encoders' titles; the control of fine-tuning is trained from scratch."""
        scratch = self.content.get("protocol") == "finetune"
        return TITLES | ({CONTROL: "from scratch"} if scratch else {})

    @property
    def faults(self) -> list[str]:
        """Return a sentence for each fault that the probe found."""
        found = self.content.get("faults")
        return [text_of(each) for each in found[:20]] if isinstance(found, list) else []

    @property
    def grid(self) -> list[dict[str, Any]]:
        """Return the points of the grid with their accuracies."""
        found = self.content.get("grid")
        entries = found[:MAX_GRID] if isinstance(found, list) else []
        return [entry for entry in entries if isinstance(entry, dict)]

    @property
    def verdict(self) -> tuple[str, bool]:
        """Return the probe's verdict, and whether it is good news."""
        return text_of(self.content.get("verdict") or ""), self.content.get("better") is not False


def _entry(content: dict[str, Any], key: str) -> dict[str, Any]:
    """Return an object inside an object, empty if there is none."""
    found = content.get(key)
    return found if isinstance(found, dict) else {}


def value(found: object) -> Value | None:
    """Return a figure from JSON: a number, or an object with a mean."""
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
    """Return the results of a finished probe, None for any other run."""
    if not record.results or record.kind != "probe":
        return None
    content = read_object(record.directory / "results.json")
    ours = content.get("schema") == PROBE_SCHEMA["schema"]
    if not ours or not isinstance(content.get("encoders"), dict):
        content = {"encoders": record.results}
    names = content.get("classes")
    classes = [text_of(name) for name in names[:MAX_CLASSES]] if isinstance(names, list) else []
    for part in reversed(PARTS):
        figures = _entry(_entry(content["encoders"], TRAINED), part)
        if (counts := _square(figures.get("confusion"))) and len(counts) == len(classes):
            return Results(content, classes, counts, part)
    return Results(content, classes, [], "")


def _square(found: object) -> list[list[float]]:
    """Return a square matrix of non-negative counts, or an empty list."""
    if not isinstance(found, list) or not 0 < len(found) <= MAX_CLASSES:
        return []
    rows = [
        [n for cell in row if (n := number(cell)) is not None and 0 <= n < 2**53]
        for row in found
        if isinstance(row, list)
    ]
    return rows if [len(row) for row in rows] == [len(found)] * len(found) else []
