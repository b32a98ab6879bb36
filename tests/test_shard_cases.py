"""Tars as people have them, in pretraining, in the probe and before the doctor."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from moco_dist.config.recipe import DataConfig
from moco_dist.doctor import images
from tests.faults.jobs import Job
from tests.image_sets import add, jpeg, picture

RUN = [
    *("batch_size=8", "bn_groups=4", "encoder.width=4", "encoder.dim=8", "moco.queue_size=20"),
    *("data.size=16", "views.size=16", "epochs=1", "knn.every_epochs=0", "runtime.device=cpu"),
]
PROBE = [
    *("data.size=16", "views.size=16", "epochs=2", "batch_size=8", "top_k=2", "optim.lr=0.3"),
    "runtime.device=cpu",
]


def write(path: Path, names: list[tuple[str, str]]) -> None:
    """Write a tar of samples: key and label of each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, (key, label) in enumerate(names):
            add(tar, f"{key}.jpg", jpeg(picture(number, 20, 20)))
            add(tar, f"{key}.cls", label.encode())


def dotted(root: Path) -> None:
    kinds = ("n0{}/img{:03}", "n0{}/img.{:03}.v1")
    names = [(kinds[n % 3 == 0].format(n % 2, n), str(n % 2)) for n in range(60)]
    write(root / "train-0000.tar", names)


def from_one(root: Path) -> None:
    write(root / "a-000.tar", [(str(n), str(n % 2 + 1)) for n in range(60)])


def padded(root: Path) -> None:
    write(root / "a-000.tar", [(str(n), f"{n % 2:03}") for n in range(60)])


def parts(root: Path) -> None:
    for number, part in enumerate(("a-Train-", "valid-", "b_eval_")):
        write(root / f"{part}0.tar", [(str(n), str(n % 2)) for n in range(60 - 20 * number)])


@pytest.mark.parametrize(
    ("make", "classes", "tests"),
    [(dotted, ["0", "1"], 0), (from_one, ["1", "2"], 0), (padded, ["0", "1"], 0), (parts, [], 20)],
)
def test_all_images_with_their_classes_are_pretrained_on_probed_and_examined(
    make: Callable[[Path], None], classes: list[str], tests: int, tmp_path: Path
) -> None:
    root = tmp_path / "set"
    make(root)
    place = ["data.name=shards", f"data.root={root}", f"data.cache={tmp_path / 'cache'}"]
    with Job(tmp_path, *RUN, *place) as job:
        assert job.wait(60) == [0], job.text()
        text = " ".join(job.text().split())
    assert "54 training and 6 validation images, 2 classes" in text
    said = "20 images have a suffix of several parts" in text
    with Job(tmp_path, *PROBE, *place, f"encoder={job.run}", module="probe", name="p") as job:
        assert job.wait(60) == [0], job.text()
        shown = " ".join(job.text().split())
    assert f"54 training, 6 validation and {tests or 'no'} test images, 2 classes" in shown
    results = json.loads((job.run / "results.json").read_text())
    if classes:
        assert results["classes"] == classes
    findings, count = images.data(DataConfig("shards", str(root), size=16, cache=str(tmp_path)), 3)
    assert count == 54
    assert findings[0].fault == ""
    assert findings[0].found.startswith("60 images")
    assert ", 2 classes" in findings[0].found
    warnings = [finding.warning for finding in findings if finding.warning]
    assert said == (make is dotted) == any("a suffix of several parts" in w for w in warnings)


@pytest.mark.parametrize("cut", ["between members", "in a header"])
def test_a_tar_that_was_not_copied_whole_is_named_by_all(tmp_path: Path, cut: str) -> None:
    tar = tmp_path / "set" / "a-000.tar"
    write(tar, [(str(n), str(n % 2)) for n in range(48)])
    with tarfile.open(tar) as opened:
        start = next(member.offset for member in opened if member.name == "24.jpg")
    tar.write_bytes(tar.read_bytes()[: start + 100 * (cut == "in a header")])
    place = ["data.name=shards", f"data.root={tar.parent}", f"data.cache={tmp_path / 'cache'}"]
    sentence = f"{tar}: not a readable tar (it has no end mark, so it was not copied or written"
    with Job(tmp_path, *RUN, *place) as job:
        assert job.wait(60) == [65], job.text()
        assert f"error: {sentence} whole)" in job.text()
    (first, *_), _ = images.data(
        DataConfig("shards", str(tar.parent), size=16, cache=str(tmp_path)), 3
    )
    assert first.fault.startswith(sentence)
