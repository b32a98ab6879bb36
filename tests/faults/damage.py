"""Damaged checkpoints are found, set aside and skipped; missing pieces of state are refused."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from moco_dist.encoders import load
from moco_dist.errors import DataError, MissingError
from moco_dist.runs import checkpoint, saving
from tests.faults.jobs import TINY, Job, account, undisturbed
from tests.faults.table import Fault, Outcome

FILES = (*checkpoint.FILES, "state.json")
OLDER, NEWEST = 35, 40


def pretrained(folder: Path) -> Path:
    """Return a run that stopped at step 40, with the checkpoints of steps 35 and 40."""
    with Job(folder / "damaged", *TINY, "stop_at_step=40") as job:
        assert job.wait() == [0], job.text()
        return job.run


def flip(folder: Path, random: Random) -> str:
    """Flip one bit of one of the files."""
    sizes = [(folder / name).stat().st_size for name in FILES]
    # state.json is small, so a third of the flips are for it.
    name = random.choices(FILES, [sizes[0], sizes[1], sum(sizes) / 2])[0]
    content = bytearray((folder / name).read_bytes())
    place = random.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    (folder / name).write_bytes(content)
    return f"bit {place} of {name} flipped"


def flips(folder: Path, times: int, random: Random) -> Outcome:
    """Flip random bits of the newest checkpoint."""
    run = pretrained(folder)
    slowest = max(found(run, folder / str(n), lambda f: flip(f, random)) for n in range(times))
    return Outcome(times, f"all found; older one in use after {slowest:.2f} s at most")


def wounds() -> dict[str, Callable[[Path], Any]]:
    """Return ways to damage a checkpoint folder, by name."""
    ways: dict[str, Callable[[Path], Any]] = {}
    for name in FILES:
        for share in (0.0, 0.1, 0.5, 0.9, 1.0):
            ways[f"{name} cut to {share:.0%}"] = partial(cut, name, share)
        ways[f"{name} removed"] = partial(put, name, lambda path: None)
        ways[f"{name} with a byte more"] = partial(lengthen, name)
        ways[f"{name} of step {OLDER}"] = partial(older, [name])
        ways[f"{name} is a folder"] = partial(put, name, Path.mkdir)
        ways[f"{name} is a pipe"] = partial(put, name, os.mkfifo)
    ways["empty folder"] = empty
    ways["model and optimizer swapped"] = swap
    ways[f"everything of step {OLDER}"] = partial(older, FILES)
    for key, value in (("enqueued", 1), ("step", 41), ("files", {}), ("evaluated", 39)):
        ways[f"{key} edited"] = partial(edit, key, value)
    ways["learning rate edited"] = lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"lr": 0.03', '"lr": 0.01')
    )
    return ways


def empty(folder: Path) -> None:
    """Remove all files."""
    for name in FILES:
        (folder / name).unlink()


def cut(name: str, share: float, folder: Path) -> None:
    """Leave a share of a file, and at least a byte less than all."""
    size = (folder / name).stat().st_size
    os.truncate(folder / name, max(0, int(share * size) - 1))


def lengthen(name: str, folder: Path) -> None:
    """Add a byte to a file."""
    with (folder / name).open("ab") as file:
        file.write(b"\n")


def older(names: Sequence[str], folder: Path) -> None:
    """Put files of the checkpoint before into this one."""
    for name in names:
        shutil.copy(folder.with_name(f"step_{OLDER:08d}") / name, folder / name)


def put(name: str, make: Callable[[Path], Any], folder: Path) -> None:
    """Make something else in the place of a file."""
    (folder / name).unlink()
    make(folder / name)


def swap(folder: Path) -> None:
    """Give each of the two tensor files the other's name."""
    first, second = (folder / name for name in checkpoint.FILES)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def edit(key: str, value: Any, folder: Path) -> None:
    """Write another value into state.json, and its old sum below it."""
    state = json.loads((folder / "state.json").read_text())
    assert state[key] != value
    (folder / "state.json").write_text(json.dumps(state | {key: value}, indent=1) + "\n")


def others(folder: Path, times: int, random: Random) -> Outcome:
    """Damage the newest checkpoint in every other way; then resume from the older one."""
    run = pretrained(folder)
    ways = wounds()
    slowest = max(found(run, folder / str(n), way) for n, way in enumerate(ways.values()))
    with undisturbed(folder / "reference", *TINY) as expected:
        os.truncate(run / "checkpoints" / f"step_{NEWEST:08d}" / "state.json", 100)
        with Job(run.parent, *TINY) as job:
            assert job.wait() == [0], job.text()
            assert "going back to the previous checkpoint" in job.text()
            assert f"from step_{OLDER:08d}" in job.text()
        assert account(run) == expected, "the run that went back is another one"
    outcome = f"{len(ways)} of {len(ways)} ways found, after {slowest:.2f} s at most; run bit-equal"
    return Outcome(len(ways), outcome, NEWEST - OLDER)


def found(run: Path, copy: Path, damage: Callable[[Path], Any]) -> float:
    """Damage a copy of the run; return the CPU seconds until the older checkpoint is in use."""
    shutil.copytree(run, copy)
    folder = checkpoint.folder_of(copy, NEWEST)
    what = damage(folder)
    with pytest.raises((DataError, MissingError), match=str(folder)):
        checkpoint.read(folder)
    began = time.process_time()
    chosen = checkpoint.newest(copy, set_aside=True)
    seconds = time.process_time() - began
    assert chosen is not None, what
    assert chosen.step == OLDER, what
    assert seconds < 10, seconds
    assert (copy / "checkpoints" / f"damaged_step_{NEWEST:08d}").exists(), what
    shutil.rmtree(copy)
    return seconds


PIECES = (
    *("query_encoder.backbone.conv1.weight", "key_encoder.backbone.conv1.weight"),
    *("query_encoder.backbone.bn1.running_var", "queue.keys", "queue.samples"),
    *("momentum.backbone.conv1.weight", "statistics.query.0.group_mean"),
    *("statistics.key.0.group_var", "enqueued", "evaluated", "best", "data", "config"),
)


def missing(folder: Path, times: int, random: Random) -> Outcome:
    """Leave out each piece of state, with sums that are right; the run must refuse by name."""
    run = pretrained(folder)
    whole = load.checkpoint_of(run)
    pieces = PIECES if times >= len(PIECES) else random.sample(PIECES, times)
    for number, piece in enumerate(pieces):
        copy = folder / f"without{number}" / "run"
        model, optimizer, state = (
            {k: v for k, v in part.items() if k != piece}
            for part in (whole.model, whole.optimizer, whole.state)
        )
        before = len(whole.model) + len(whole.optimizer) + len(whole.state)
        assert len(model) + len(optimizer) + len(state) == before - 1, f"there is no {piece}"
        saving.write(copy, NEWEST, model, optimizer, state)
        with Job(copy.parent, *TINY) as job:
            states = job.wait()
        (line,) = job.errors()
        assert states == [65], f"{piece}: {states}\n{line}"
        assert f"{piece} is missing" in line or f"'{piece}' is missing" in line, line
    return Outcome(len(pieces), "each refused by its name, exit status 65", 0)


FAULTS = [
    Fault("bit flipped in the newest checkpoint", 50, 200, flips),
    Fault("newest checkpoint cut, removed, swapped, edited", 1, 1, others),
    Fault("a piece of state left out", 3, len(PIECES), missing),
]
