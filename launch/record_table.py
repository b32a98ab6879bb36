"""Print the table of the runs of launch/record.sh.

  python launch/record_table.py runs/record [--json]

The table has means over seeds, with the standard deviation after +- if there are several. Seeds of
one name with other settings get a row of their own, and are named on standard error.
Accuracies are from the test images, except in the column for choosing recipes. Minutes cover all
pieces of a run, with evaluations and saves. --json prints one line for each finished run, with its
commit, hardware, versions and speed. Unfinished runs are named on standard error.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import FREE_ON_RESUME, PretrainConfig
from moco_dist.config.yaml_files import flat, is_among, to_dict
from moco_dist.runs.record import Record, number, read, read_object

COLUMNS = (
    *("run", "seeds", "kNN, validation", "kNN", "linear", "random: kNN / linear"),
    *("minutes", "images/s"),
)


def rows(output: Path) -> list[dict[str, Any]]:
    """Return a row for each pretraining whose probe is done, ordered by name.

    Unfinished runs and unreadable pieces are named on standard error.
    """
    noted = pieces(output / "pieces.jsonl")
    found, left = [], []
    folders = (path.parent.name for path in output.glob("*/config.yaml"))
    for name in sorted({each.removesuffix("-probe") for each in folders}):
        both = output / name, output / f"{name}-probe"
        if all((folder / "DONE").is_file() for folder in both):
            found.append(row(read(both[0]), read(both[1]), noted))
        else:
            left.append(name)
    if left:
        print(f"not done, and left out: {', '.join(left)}", file=sys.stderr)
    return found


def pieces(path: Path) -> list[dict[str, Any]]:
    """Return the pieces that launch/record.sh noted; lines that were cut short are reported."""
    found = []
    for place, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        try:
            piece = json.loads(line)
            found.append({key: piece[key] for key in ("run", "seconds", "commit")})
        except (ValueError, TypeError, KeyError):
            print(f"{path}:{place}: can't be read; its minutes are missing", file=sys.stderr)
    return found


def settings(record: Record) -> str:
    """Return a short hash of all that seeds of one recipe share: not of paths, nor of the machine.

    A key that an older version did not have counts as its default.
    """
    defaults = flat(to_dict(PretrainConfig() if record.kind == "pretrain" else ProbeConfig()))
    free = {"seed", *FREE_ON_RESUME} - {"epochs", "stop_at_step", "knn."}
    every = defaults | record.config
    shared = {key: value for key, value in every.items() if not is_among(key, free)}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:8]


def row(pretraining: Record, probe: Record, noted: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a pretraining and its probe under plain names."""
    run = pretraining.directory.name
    own = {
        kind: [piece for piece in noted if piece["run"] == record.directory.name]
        for kind, record in (("pretraining", pretraining), ("probe", probe))
    }
    environment = read_object(pretraining.directory / "environment.json")
    speeds = [value for _, value in pretraining.figures("train/images_per_second")]
    return {
        "run": run,
        "recipe": run.rpartition("-")[0],
        "seed": pretraining.config["seed"],
        "settings": f"{settings(pretraining)}-{settings(probe)}",
        "epochs": pretraining.config["epochs"],
        "batch_size": pretraining.config["batch_size"],
        **{
            f"{encoder}_{name}": probe.result(encoder, "test", name)
            for encoder in ("probe", "control")
            for name in ("top1", "top5", "knn_top1")
        },
        "validation_knn_top1": pretraining.last("knn/top1"),
        **{f"{kind}_minutes": sum(p["seconds"] for p in each) / 60 for kind, each in own.items()},
        "images_per_second": statistics.median(speeds) if speeds else None,
        "memory_gb": pretraining.last("system/memory_gb"),
        "commits": sorted({piece["commit"] for each in own.values() for piece in each}),
        **{key: environment.get(key) for key in ("device", "processes", "torch", "cuda")},
    }


def spread(values: Iterable[Any], scale: float = 1.0, digits: int = 1) -> str:
    """Return the mean of numbers, and their standard deviation if there are several."""
    numbers = [scale * each for value in values if (each := number(value)) is not None]
    if not numbers:
        return "-"
    mean = f"{statistics.fmean(numbers):,.{digits}f}"
    return mean if len(numbers) == 1 else f"{mean} +- {statistics.stdev(numbers):.{digits}f}"


def table(found: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table, one row per recipe, and a line about the machine."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for name, each in recipes(found):
        minutes = [row["pretraining_minutes"] + row["probe_minutes"] for row in each]
        controls = [
            spread((row[f"control_{key}"] for row in each), 100) for key in ("knn_top1", "top1")
        ]
        cells = (
            f"{name} ({each[0]['epochs']} epochs, batch {each[0]['batch_size']})",
            ", ".join(str(row["seed"]) for row in each),
            spread((row["validation_knn_top1"] for row in each), 100),
            spread((row["probe_knn_top1"] for row in each), 100),
            spread((row["probe_top1"] for row in each), 100),
            " / ".join(controls),
            spread(minutes),
            spread((row["images_per_second"] for row in each), digits=0),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", made(found)]


def headers(found: list[dict[str, Any]]) -> list[str]:
    """Return a comment for the header of each configuration."""
    return [
        f"# {name}, seeds {', '.join(str(row['seed']) for row in each)}: "
        f"kNN {spread((row['probe_knn_top1'] for row in each), 100)}, "
        f"linear {spread((row['probe_top1'] for row in each), 100)} on the test images, "
        f"{spread(row['pretraining_minutes'] for row in each)} minutes. {made(each)}"
        for name, each in recipes(found)
    ]


def made(found: list[dict[str, Any]]) -> str:
    """Return one sentence of hardware, versions and commits."""
    devices = sorted({f"{row['processes']} x {row['device']}" for row in found})
    versions = sorted({f"torch {row['torch']}" for row in found})
    commits = sorted({commit for row in found for commit in row["commits"]})
    return f"{', '.join(devices)}; {', '.join(versions)}; commit {', '.join(commits)}."


def recipes(found: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return each recipe's name and its rows of equal settings, ordered by seed."""
    ordered = sorted(found, key=lambda row: row["seed"])
    kinds = dict.fromkeys((row["recipe"], row["settings"]) for row in found)
    return [
        (kind[0], [row for row in ordered if (row["recipe"], row["settings"]) == kind])
        for kind in kinds
    ]


def main(arguments: list[str]) -> int:
    """Print what the arguments ask for; return the exit status."""
    folders = [argument for argument in arguments if argument != "--json"]
    if len(folders) != 1 or not (Path(folders[0]) / "pieces.jsonl").is_file():
        print("error: give the folder that launch/record.sh wrote, as runs/record", file=sys.stderr)
        return 66
    found = rows(Path(folders[0]))
    if "--json" in arguments:
        print("\n".join(json.dumps(row) for row in found))
        return 0
    names = [name for name, _ in recipes(found)]
    if several := sorted({name for name in names if names.count(name) > 1}):
        print(f"seeds with other settings, not averaged: {', '.join(several)}", file=sys.stderr)
    if found:
        print("\n".join([*table(found), "", *headers(found)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
