"""A run as its files describe it, on any machine that sees them, without torch.

A file may be missing, cut short or of another version: what can't be read is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from moco_dist.config.yaml_files import stored
from moco_dist.errors import MissingError, shown
from moco_dist.runs import lock

# The head of a probe's results.json, its two encoders, and the parts of the data it measures.
PROBE_SCHEMA = {"schema": "moco_dist.probe", "version": 1}
TRAINED, CONTROL = "probe", "control"
PARTS = ("validation", "test")
# An entry of metrics.jsonl; "step" is a whole number.
Line = dict[str, Any]


class Metric(StrEnum):
    """The metrics that runs log; probes also log the loss and other top-k of both encoders."""

    EPOCH = "epoch"
    LOSS = "train/loss"
    ACCURACY_TOP1 = "train/accuracy_top1"
    ACCURACY_TOP5 = "train/accuracy_top5"
    LR = "train/lr"
    GRADIENT_NORM = "train/gradient_norm"
    IMAGES_PER_SECOND = "train/images_per_second"
    POSITIVE = "similarity/positive"
    NEGATIVE = "similarity/negative"
    FILL = "queue/fill"
    QUEUE_AGE = "queue/age_steps"
    OWN_IMAGES = "queue/own_images"
    ALIGNMENT = "health/alignment"
    UNIFORMITY = "health/uniformity"
    FEATURE_STD = "health/feature_std"
    RANKME = "health/rankme"
    EMA_DISTANCE = "health/ema_distance"
    KNN_TOP1 = "knn/top1"
    ONLINE_TOP1 = "online/top1"
    PROBE_TOP1 = f"{TRAINED}/top1"
    CONTROL_TOP1 = f"{CONTROL}/top1"
    MEMORY_GB = "system/memory_gb"


@dataclass(frozen=True)
class Record:
    """A run as its files describe it."""

    directory: Path
    # A word of errors.STATES, or: running, starting, gone, empty, unknown.
    state: str
    # Why it ended, unless it ended well.
    reason: str
    status: dict[str, Any]
    # Leaves of config.yaml under their dotted keys.
    config: dict[str, Any]
    # The content of DONE.
    results: dict[str, Any]
    lines: list[Line]
    # The steps of the folders in checkpoints/, whole or not, and the names of damaged ones.
    saved: list[int]
    damaged: list[str]

    @property
    def kind(self) -> str:
        """Return 'pretrain', 'probe', or '' without a configuration."""
        if "moco.queue_size" in self.config:
            return "pretrain"
        return "probe" if "encoder" in self.config else ""

    @property
    def step(self) -> int:
        """Return the number of steps done, as far as the files know."""
        at_end = self.status.get("step")
        logged: int = self.lines[-1]["step"] if self.lines else 0
        return max(at_end, logged) if isinstance(at_end, int) else logged

    @property
    def total_steps(self) -> int:
        """Return the number of steps of the whole run; 0 if it is not known yet."""
        return total_steps(self.config, self.lines)

    @property
    def alarms(self) -> list[Line]:
        """Return the lines that are alarms."""
        return [line for line in self.lines if isinstance(line.get("alarm"), str)]

    def figures(self, name: str) -> list[tuple[int, float]]:
        """Return step and value of each line that has the metric `name`."""
        found = ((line["step"], number(line.get(name))) for line in self.lines)
        return [(step, value) for step, value in found if value is not None]

    def last(self, name: str) -> float | None:
        """Return the last value of a metric, None without one."""
        return next((value for _, value in reversed(self.figures(name))), None)

    @property
    def best_knn(self) -> tuple[int, float] | None:
        """Return step and accuracy of the best kNN evaluation after step 0."""
        found = self.figures(Metric.KNN_TOP1)
        after = (pair for pair in found if pair[0] and math.isfinite(pair[1]))
        return max(after, key=lambda pair: pair[1], default=None)

    def result(self, encoder: str, part: str, name: str) -> float | None:
        """Return a figure of a finished probe, None where there is none."""
        found: Any = self.results
        for key in (encoder, part, name):
            found = found.get(key) if isinstance(found, dict) else None
        return number(found.get("mean") if isinstance(found, dict) else found)


def read(directory: Path) -> Record:
    """Return what the files of a run directory say; MissingError if there is no such directory."""
    if not directory.is_dir():
        what = "not a directory" if directory.exists() else "no such run directory"
        raise MissingError(f"{shown(directory)}: {what}; give runs/NAME, where a run has begun")
    return Record(
        directory,
        *standing(directory),
        read_object(directory / "status.json"),
        stored(directory / "config.yaml"),
        read_object(directory / "DONE"),
        lines(directory / "metrics.jsonl"),
        *_checkpoints(directory),
    )


def lines(path: Path) -> list[Line]:
    """Return the entries of a metrics.jsonl that have a step; none if it can't be read."""
    with suppress(OSError):
        return parse(path.read_bytes().splitlines())
    return []


def parse(texts: Iterable[bytes]) -> list[Line]:
    """Return the entries with a step; a header and a line that was cut short have none."""
    found = []
    for text in texts:
        entry = parsed(text)
        step = number(entry.get("step"))
        if step is not None and 0 <= step < 2**53:
            found.append(entry | {"step": int(step)})
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if that can't be read."""
    with suppress(OSError):
        return parsed(path.read_bytes())
    return {}


def parsed(text: bytes) -> dict[str, Any]:
    """Return the JSON object that a text is; an empty one if it is none."""
    with suppress(ValueError, RecursionError):
        content = json.loads(text)
        return content if isinstance(content, dict) else {}
    return {}


def number(value: object) -> float | None:
    """Return a number as a float, NaN and infinity too, and None for anything else."""
    with suppress(OverflowError):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def is_result(name: str) -> bool:
    """Return whether `name` is a figure of a probed encoder, such as top1, top5, loss, knn_top1."""
    return name == "loss" or name.startswith(("top", "knn_"))


def total_steps(config: dict[str, Any], lines: list[Line]) -> int:
    """Return the steps of a run, by its newest line about an epoch; 0 before there is one."""
    for line in reversed(lines):
        if per_epoch := steps_per_epoch(line):
            epochs, end = (number(config.get(key)) or 0 for key in ("epochs", "stop_at_step"))
            total = per_epoch * epochs
            return int(min(total, end or total)) if 0 <= total < math.inf else 0
    return 0


def steps_per_epoch(line: Line) -> int:
    """Return the steps of an epoch, from the step and epoch of a line; 0 if it has none."""
    epoch = number(line.get("epoch")) or 0
    return round(line["step"] / epoch) if 1e-9 < epoch < math.inf else 0


def text_of(value: object) -> str:
    """Return a text from a file on one line, whole and printable."""
    return shown(" ".join(str(value).split()), limit=10_000)


def began(directory: Path) -> float:
    """Return when the newest launch of a run began, in seconds since 1970; 0 if unknown."""
    with suppress(ValueError, OverflowError):
        text = str(read_object(directory / "environment.json").get("started"))
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return 0.0


def standing(directory: Path) -> tuple[str, str]:
    """Return the state of a run, and why if it did not end well."""
    status = read_object(directory / "status.json")
    word, reason = status.get("state"), text_of(status.get("reason") or "")
    state = text_of(word) if isinstance(word, str) and word else "unknown"
    owner = lock.owner(directory)
    if owner and owner.alive:
        # status.json may be of the previous launch, or of this one, which is about to exit.
        ended = state != "running" and status.get("pid") == owner.pid
        return (state, reason) if ended or state == "running" else ("starting", "")
    if state == "unknown":
        begun = any((directory / name).exists() for name in ("config.yaml", "metrics.jsonl"))
        return "unknown" if begun else "empty", ""
    if state != "running":
        return state, reason
    who = owner.name if owner else f"process {status.get('pid')} on {text_of(status.get('host'))}"
    saved, _ = _checkpoints(directory)
    again = f"the same command resumes from step {max(saved):,}" if saved else "nothing was saved"
    return "gone", f"{who} ended without a reason; {again}"


def _checkpoints(directory: Path) -> tuple[list[int], list[str]]:
    names: list[str] = []
    with suppress(OSError):
        names = sorted(path.name for path in (directory / "checkpoints").iterdir())
    steps = [int(name[5:]) for name in names if re.fullmatch(r"step_[0-9]{1,15}", name)]
    return steps, [shown(name) for name in names if name.startswith("damaged_step_")]
