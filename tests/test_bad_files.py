"""Files of a streamed set that can't be read: the run goes on, the same on any processes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_dist.config.recipe import DataConfig, ViewsConfig
from moco_dist.data import datasets, image_file
from moco_dist.data.streamed_images import StreamedImages
from moco_dist.errors import DataError
from moco_dist.method import views
from moco_dist.randomness import Purpose, uniform
from tests import image_sets
from tests.faults.jobs import Job, account, last_step, status
from tests.faults.stops import slow_steps
from tests.test_streaming import RUN, on

SKIP = "data.skip_unreadable=true"
BAD = ("class_0/0003.jpg", "class_1/0004.jpg", "class_2/0005.jpg")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_sets.write_folder(tmp_path_factory.mktemp("whole") / "set", 60, side=40)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """The set with three files that are cut short, empty, or no image."""
    root = Path(shutil.copytree(whole, tmp_path / "set"))
    cut, empty, text = (root / "train" / name for name in BAD)
    cut.write_bytes(cut.read_bytes()[:700])
    empty.write_bytes(b"")
    text.write_text("no image")
    return root


def load(root: Path, **values: Any) -> datasets.Splits:
    given: dict[str, Any] = {"size": 32, "memory_gb": 0.0, "workers": 1, "validation": 0.0}
    config = DataConfig(name="folder", root=str(root), cache=f"{root}-cache", **given | values)
    return datasets.load(config)


def tensor(pixels: image_file.Pixels) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def stand_in(labels: list[int], bad: set[int], seed: int, epoch: int, row: int) -> int:
    """The rule, written once more: the first readable image of its class in the draws."""
    peers = [number for number, label in enumerate(labels) if label == labels[row]]
    draws = (
        float(uniform(seed, Purpose.STAND_IN, epoch, row, torch.tensor(attempt)))
        for attempt in itertools.count()
    )
    drawn = (peers[int(each * len(peers))] for each in draws)
    return next(other for other in drawn if other not in bad)


def test_an_image_of_the_class_stands_in_with_the_crop_that_was_drawn(folder: Path) -> None:
    streamed = load(folder, skip_unreadable=True).train
    assert isinstance(streamed, StreamedImages)
    places, labels = streamed.catalogue.all_places(), streamed.labels.tolist()
    bad = {row for row, place in enumerate(places) if place.path.endswith(BAD)}
    assert len(bad) == 3
    rows = torch.arange(60)
    recipe = image_file.Recipe(32)
    reads = [stand_in(labels, bad, 0, 0, row) if row in bad else row for row in range(60)]
    assert all(labels[read] == labels[row] for row, read in enumerate(reads))
    squares = [image_file.square(image_file.read(places[row]), recipe)[0] for row in reads]
    expected = torch.stack([tensor(each) for each in squares])
    for _ in range(2):  # found, and known
        assert streamed.squares(rows).equal(expected)
    assert streamed.aside.rows.keys() == bad

    config, epoch = ViewsConfig(size=24), 3
    crops = streamed.order_crops(config, 7, epoch, rows, (0, 1)).collect(torch.device("cpu"))
    recipe = image_file.Recipe(24, (0, 1), config.ratio_min, config.ratio_max)
    for row in bad:
        numbers = [views.crop_numbers(config, 7, epoch, torch.tensor([row]), v)[0] for v in (0, 1)]
        other = places[stand_in(labels, bad, 7, epoch, row)]
        cut = image_file.crops(image_file.read(other), [n.tolist() for n in numbers], recipe)
        for view in (0, 1):
            assert crops[row, view].equal(tensor(cut[view]))
    streamed.pool.close()


def test_a_class_without_a_readable_image_borrows_from_all(tmp_path: Path) -> None:
    root = image_sets.write_folder(tmp_path / "set", 12, side=32) / "train"
    for file in (root / "class_1").iterdir():
        file.write_bytes(b"")
    images = load(root, skip_unreadable=True).train
    assert isinstance(images, StreamedImages)
    pixels = images.squares(torch.arange(12))
    good = [number for number in range(12) if images.labels[number] != 1]
    for number in range(12):
        found = [other for other in good if pixels[other].equal(pixels[number])]
        assert found == [number] if number in good else len(found) == 1
    for file in root.rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="none of 12 images can be read; check the disk"):
        images.squares(torch.arange(12))
    images.pool.close()


def test_runs_with_bad_files_are_the_same_on_any_processes_and_when_interrupted(
    folder: Path, tmp_path: Path
) -> None:
    """An epoch has 3 steps; the last launch finds one file mended, one gone, one as it was."""
    straight = on(1, tmp_path / "straight", folder, 12, SKIP)
    plan = on(4, tmp_path / "plan", folder, 3, SKIP, "data.keys_by=plan", "runtime.micro_batches=2")
    for step, found in plan["hashes"].items():
        assert found == straight["hashes"][step], step
    begun = on(2, tmp_path / "cut", folder, 5, SKIP)
    first, second, _ = (folder / "train" / name for name in BAD)
    shutil.copy(first.with_name("0000.jpg"), first)
    second.unlink()
    resumed = on(4, tmp_path / "cut", folder, 12, SKIP)
    assert resumed["first"] == 5
    assert begun["hashes"] | resumed["hashes"] == straight["hashes"]
    for name, value in straight["state"].items():
        assert (resumed["state"][name] - value).abs().max() <= 1e-10, name


def settings(root: Path, *more: str) -> list[str]:
    place = [f"data.root={root}", f"data.cache={root}-cache", "data.name=folder"]
    own = ["knn.every_epochs=2", "epochs=6", "runtime.timeout_seconds=60"]
    return [*RUN, *place, *own, *more]


def launched(output: Path, processes: int, arguments: list[str], ends: int) -> str:
    with Job(output, *arguments, processes=processes) as job:
        states = job.wait(120)
        text = job.text()
        assert set(states) == {ends}, f"{states}\n{text}"
    job.log.unlink()
    return " ".join(text.split())


@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_that_goes_bad_ends_the_run_saved_and_it_goes_on_without_or_with_another(
    whole: Path, tmp_path: Path, processes: int
) -> None:
    root = Path(shutil.copytree(whole, tmp_path / "set"))
    with Job(tmp_path, *settings(root), processes=processes, plant=partial(slow_steps, 0.2)) as job:
        job.until_step(2)
        names = sorted(root.glob("train/*/*.jpg"))
        hurt = names[:6]
        kept = {file: file.read_bytes() for file in hurt}
        for file in hurt:
            file.write_bytes(kept[file][:300])
        assert set(job.wait(60)) == {65}, job.text()
        (said,) = job.errors()
    told = status(job.run)
    assert (told["state"], told["step"]) == ("data", last_step(job.run))
    bad = next(file for file in hurt if f"error: {file}: not a readable image" in said)
    assert "replace or remove this file, or give data.skip_unreadable=true" in said
    assert f"saved after step {told['step']} of 18; the same command resumes from there" in said
    assert account(job.run)["step"] == told["step"]
    noted = json.loads((job.run / "set_aside.json").read_text())["train"]
    assert {(str(root / "train" / each["file"]), each["set_aside"]) for each in noted} >= {
        (str(bad), False)
    }
    named = {root / "train" / each["file"] for each in noted}
    for file in set(hurt) - named:  # those that nobody came upon are as they were
        file.write_bytes(kept[file])
    bad.unlink()
    others = sorted(named - {bad})
    for file in others:
        file.write_bytes(kept[file] + b"mended")
    job.log.unlink()
    text = launched(tmp_path, 3 - processes, settings(root, "stop_at_step=12"), 0)
    assert (
        f"since this run began there are 1 gone (first {bad.relative_to(root / 'train')})" in text
    )
    assert f"1 unreadable file set aside: {bad} (it is gone); other images of its class" in text
    assert last_step(job.run) == 12
    # Another file that is gone was named by nobody.
    other = next(file for file in names[6:] if file not in named)
    other.unlink()
    text = launched(tmp_path, processes, settings(root), 78)
    assert "was trained on other images: of 60 files in" in text
    assert "give data.skip_unreadable=true to go on without those that are gone" in text
    text = launched(tmp_path, processes, settings(root, SKIP), 0)
    assert "2 unreadable files set aside: " in text
    assert last_step(job.run) == 18
    # A new file is another data set.
    shutil.copy(names[-1], names[-1].with_name("new.jpg"))
    text = launched(tmp_path, 1, settings(root, SKIP, "epochs=7"), 78)
    assert "1 new (first " in text
    os.unlink(names[-1].with_name("new.jpg"))
