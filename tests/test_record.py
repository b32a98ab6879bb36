"""launch/record.sh in miniature: pieces, resumes, the table and its arithmetic."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TABLE = """
# A comment.
tiny  0,1  PRETRAIN/paper.yaml moco.temperature=0.2  -- PROBE/paper.yaml
"""
SMALL = [
    *("batch_size=16", "bn_groups=4", "encoder.width=4", "encoder.dim=8", "moco.queue_size=32"),
    *("epochs=2", "knn.every_epochs=1", "runtime.device=cpu", "tracking.wandb=disabled"),
]
PROBE = [
    "epochs=2",
    "batch_size=16",
    "augment=false",
    "runtime.device=cpu",
    "tracking.wandb=disabled",
    "top_k=2",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 10)):
        for name, base in (("dark", 40), ("light", 200)):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = (base + random.integers(-40, 40, (32, 32, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.jpg")
    return folder


def call(images: Path, home: Path, words: list[str], **variables: str) -> Any:
    environment = {
        **os.environ,
        **{"RECORD_PYTHON": sys.executable, "RECORD_TABLE": str(home / "table.txt")},
        **{"RECORD_OUTPUT": str(home / "record"), **variables},
    }
    command = ["bash", "launch/record.sh", str(images), *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def record(images: Path, home: Path, *pretrain: str) -> Any:
    (home / "table.txt").write_text(TABLE)
    words = [*SMALL, *pretrain, f"data.cache={home}", "--", *PROBE, f"data.cache={home}"]
    return call(images, home, words)


def test_the_record_is_made_in_pieces_and_its_table_is_arithmetic(
    images: Path, tmp_path: Path
) -> None:
    done = record(images, tmp_path)
    assert done.returncode == 0, done.stderr
    again = record(images, tmp_path)  # what is done is left alone
    assert (again.returncode, again.stderr) == (0, "")
    pieces = [
        json.loads(line) for line in (tmp_path / "record" / "pieces.jsonl").read_text().splitlines()
    ]
    names = ["tiny-0", "tiny-0-probe", "tiny-1", "tiny-1-probe"]
    assert [piece["run"] for piece in pieces] == names
    assert all(piece["commit"] and piece["exit_status"] == 0 for piece in pieces)

    command = [sys.executable, "launch/record_table.py", str(tmp_path / "record")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown, told = (
        subprocess.run(
            [*command, *extra],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for extra in ([], ["--json"])
    )
    rows = [json.loads(line) for line in told.splitlines()]
    tops = []
    for row, seed in zip(rows, (0, 1), strict=True):
        results = json.loads((tmp_path / "record" / f"tiny-{seed}-probe" / "DONE").read_text())
        tops.append(100 * results["probe"]["test"]["top1"])
        assert (row["seed"], row["probe_top1"]) == (seed, tops[-1] / 100)
        assert row["control_knn_top1"] == results["control"]["test"]["knn_top1"]
        seconds = sum(p["seconds"] for p in pieces if p["run"] == f"tiny-{seed}")
        assert row["pretraining_minutes"] == seconds / 60
    mean = f"{sum(tops) / 2:.1f} +- {statistics.stdev(tops):.1f}"
    (line,) = (line for line in shown.splitlines() if line.startswith("| tiny (2 epochs"))
    cells = line.split(" | ")
    assert (cells[1], cells[4]) == ("0, 1", mean)
    # Of the validation images, as the last line of metrics.jsonl that has it.
    last = []
    for seed in (0, 1):
        lines = (tmp_path / "record" / f"tiny-{seed}" / "metrics.jsonl").read_text().splitlines()
        last.append(
            [100 * row["knn/top1"] for row in map(json.loads, lines) if "knn/top1" in row][-1]
        )
    assert cells[2] == f"{sum(last) / 2:.1f} +- {statistics.stdev(last):.1f}"
    assert "# tiny, seeds 0, 1: kNN " in shown

    # Seeds that were trained with other settings are no mean; other machines are no other settings.
    config = tmp_path / "record" / "tiny-1" / "config.yaml"
    text = config.read_text()
    for old, new, count in (
        ("\n  device: cpu", "\n  device: auto", 1),
        ("\nepochs: 2", "\nepochs: 9", 2),
    ):
        assert old in text
        config.write_text(text.replace(old, new))
        mixed = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        found = [line for line in mixed.stdout.splitlines() if line.startswith("| tiny (")]
        assert len(found) == count
        other = "seeds with other settings, not averaged: tiny\n"
        assert mixed.stderr == (other if count == 2 else "")
    assert [line.split(" | ")[0:2] for line in found] == [
        ["| tiny (2 epochs, batch 16)", "0"],
        ["| tiny (9 epochs, batch 16)", "1"],
    ]
    config.write_text(text)

    # A line that was cut short, and a run whose probe is not done, are named; the rest stands.
    with (tmp_path / "record" / "pieces.jsonl").open("a") as noted:
        noted.write('{"run": "tiny-1", "sec')
    (tmp_path / "record" / "tiny-1-probe" / "DONE").unlink()
    (tmp_path / "record" / "report").mkdir()  # no run, but a report's page about some
    rest = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "pieces.jsonl:5: can't be read; its minutes are missing\n" in rest.stderr
    assert "not done, and left out: tiny-1\n" in rest.stderr
    (line,) = (line for line in rest.stdout.splitlines() if line.startswith("| tiny (2 epochs"))
    assert (line.split(" | ")[1], line.split(" | ")[4]) == ("0", f"{tops[0]:.1f}")


def test_a_piece_that_is_over_ends_with_75_before_its_next_run(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / "images in" / part).mkdir(parents=True)
    stub = tmp_path / "python"
    stub.write_text(
        '#!/usr/bin/env bash\nprintf "%s|" "$@" && echo && sleep 5\n'
        'mkdir -p "$HOME/record/tiny-0" && touch "$HOME/record/tiny-0/DONE"\n'
    )
    stub.chmod(0o755)
    (tmp_path / "table.txt").write_text(TABLE.replace("  ", "\t").replace("\n", "\r\n"))
    stubbed = {"RECORD_PYTHON": str(stub), "RECORD_SECONDS": "34", "HOME": str(tmp_path)}
    over = call(tmp_path / "images in", tmp_path, ["a=1", "--", "b=2"], **stubbed)
    assert over.returncode == 75, over.stderr
    ran, said = over.stdout.splitlines()
    assert said == "the piece is over; the same call continues with tiny-0-probe"
    words = ran.split("|")
    assert words[:4] == [
        *("-m", "moco_dist.pretrain", "configs/pretrain/paper.yaml", "moco.temperature=0.2"),
    ]
    assert f"data.root={tmp_path}/images in" in words
    assert "a=1" in words
    assert "b=2" not in words


@pytest.mark.parametrize("seconds", ["0", "30", "5m", "-40"])
def test_a_piece_too_short_for_any_run_is_refused(tmp_path: Path, seconds: str) -> None:
    refused = call(tmp_path, tmp_path, [], RECORD_SECONDS=seconds)
    assert refused.returncode == 78
    rule = "give a whole number of seconds above 30, such as 500"
    sentence = f"error: RECORD_SECONDS={seconds}: {rule}\n"
    assert refused.stderr == sentence


@pytest.mark.parametrize("line", ["tiny 0 PRETRAIN/paper.yaml", "tiny PRETRAIN/a -- PROBE/b", "#"])
def test_a_line_without_all_its_parts_is_refused_before_hours_go_by(
    tmp_path: Path, line: str
) -> None:
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    (tmp_path / "table.txt").write_text(line)
    refused = call(tmp_path, tmp_path, [])
    assert refused.returncode == 78
    assert refused.stderr.endswith("is no line of name, seeds, pretraining, --, probe\n")


def test_a_run_that_ends_before_it_is_done_is_not_probed(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / "images" / part).mkdir(parents=True)
    (tmp_path / "table.txt").write_text(TABLE)
    stopped = call(tmp_path / "images", tmp_path, ["--"], RECORD_PYTHON="true")
    assert stopped.returncode == 78
    assert stopped.stderr == "error: tiny-0 ended before it was done; remove what stops it\n"


def test_a_run_that_fails_ends_the_record_with_its_state(images: Path, tmp_path: Path) -> None:
    failed = record(images, tmp_path, "optim.lr=-1")
    assert failed.returncode == 78
    assert "optim.lr=-1.0 is not above 0" in failed.stderr
    missing = subprocess.run(
        ["bash", "launch/record.sh", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "RECORD_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert missing.returncode == 66
    assert missing.stderr.endswith("has no train and test; give the folder with both\n")
