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


def record(images: Path, home: Path, seconds: int, *pretrain: str) -> Any:
    (home / "table.txt").write_text(TABLE)
    environment = {
        **os.environ,
        **{"RECORD_PYTHON": sys.executable, "RECORD_TABLE": str(home / "table.txt")},
        **{"RECORD_OUTPUT": str(home / "record"), "RECORD_SECONDS": str(seconds)},
    }
    words = [*SMALL, *pretrain, f"data.cache={home}", "--", *PROBE, f"data.cache={home}"]
    command = ["bash", "launch/record.sh", str(images), *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_the_record_is_made_in_pieces_and_its_table_is_arithmetic(
    images: Path, tmp_path: Path
) -> None:
    over = record(images, tmp_path, 20)
    assert over.returncode == 75
    assert "the piece is over; the same call goes on with tiny-0" in over.stdout
    assert not (tmp_path / "record" / "tiny-0").exists()

    done = record(images, tmp_path, 500)
    assert done.returncode == 0, done.stderr
    again = record(images, tmp_path, 500)  # what is done is left alone
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
    assert line.split(" | ")[1:2] + line.split(" | ")[3:4] == ["0, 1", mean]
    assert "# tiny, seeds 0, 1: kNN " in shown


def test_a_run_that_fails_ends_the_record_with_its_state(images: Path, tmp_path: Path) -> None:
    failed = record(images, tmp_path, 500, "optim.lr=-1")
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
