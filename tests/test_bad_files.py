"""Files of a streamed set that can't be read: the run goes on, the same on any processes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_dist.config.recipe import DataConfig, ViewsConfig
from moco_dist.data import datasets, image_file
from moco_dist.data.streamed_images import StreamedImages
from moco_dist.doctor import images
from moco_dist.errors import DataError
from moco_dist.method import views
from moco_dist.randomness import Purpose, uniform
from tests import image_sets
from tests.faults.jobs import KILL, Job, account, last_step, status
from tests.faults.stops import family, slow_steps
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
    crops = streamed.order_crops([config], 7, epoch, rows, (0, 1)).collect(torch.device("cpu"))
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
    streamed = load(root, skip_unreadable=True).train
    assert isinstance(streamed, StreamedImages)
    pixels = streamed.squares(torch.arange(12))
    good = [number for number in range(12) if streamed.labels[number] != 1]
    for number in range(12):
        found = [other for other in good if pixels[other].equal(pixels[number])]
        assert found == [number] if number in good else len(found) == 1
    for file in root.rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="none of 12 images can be read; check the disk"):
        streamed.squares(torch.arange(12))
    streamed.pool.close()


def test_runs_with_bad_files_are_the_same_on_any_processes_and_when_interrupted(
    folder: Path, tmp_path: Path
) -> None:
    """An epoch has 3 steps; the last launch finds one file mended, one gone, one as it was."""
    straight = on(1, tmp_path / "straight", folder, 12, SKIP)
    plan = on(2, tmp_path / "plan", folder, 3, SKIP, "data.keys_by=plan", "runtime.micro_batches=2")
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


def test_the_doctor_finds_the_bad_file_among_many(tmp_path: Path) -> None:
    """In any part, and beyond the sample; without time it says how many it has looked at."""
    root = image_sets.write_folder(tmp_path / "set", 320, side=16)
    hurt = [root / "train/class_1/0100.jpg", root / "test/class_0/0300.jpg"]
    for file in hurt:
        file.write_bytes(file.read_bytes()[:400])
    config = DataConfig("folder", str(root), size=16, cache=f"{root}-cache")
    (first, *others), _ = images.data(config, 3)
    assert first.fault.startswith(f"1 of 320 decoded images can't be read: {hurt[0]} (")
    # Pretraining doesn't read it.
    (warning,) = [finding.warning for finding in others if finding.warning]
    assert warning.startswith(f"1 of 80 decoded test images can't be read: {hurt[1]} (")
    assert ", all 400 decoded" in first.found
    (first, *_), _ = images.data(replace(config, skip_unreadable=True), 3)
    assert (first.fault, first.found[-49:]) == (
        "",
        ", all 400 decoded, 2 of them unreadable and left out"[-49:],
    )
    (first, *_), _ = images.data(config, 3, seconds=0)
    assert ", 200 of 400 decoded in 0 s (--all-files decodes all)" in first.found


def test_the_doctor_reads_shards_and_names_the_tar_that_was_cut(tmp_path: Path) -> None:
    folder = image_sets.write_folder(tmp_path / "set", 24, side=16)
    root = image_sets.write_shards(folder, tmp_path / "tars")
    config = DataConfig("shards", str(root), size=16, cache=f"{root}-cache")
    (first, *_), _ = images.data(config, 3)
    assert first.fault == ""
    assert first.found.startswith("24 images, 6 for testing, 3 classes, 16-16 x 16-16 pixels in 24")
    tar = root / "train" / "000001.tar"
    with tarfile.open(tar) as opened:
        start = [member.offset for member in opened][10]
    content = tar.read_bytes()
    with tar.open("r+b") as file:  # a member that is no image
        file.seek(start + 512)
        file.write(b"no image")
    (first, *_), _ = images.data(config, 3)
    assert f"{tar}: " in first.fault
    tar.write_bytes(content[: start + 100])
    (first, *_), _ = images.data(config, 3)
    assert first.fault.startswith(f"{tar}: not a readable tar (the header at byte") or (
        first.fault.startswith(f"{tar}: not a readable tar (it has no end mark")
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_a_worker_that_is_killed_ends_all_processes_alike_with_the_state_saved(
    whole: Path, tmp_path: Path, processes: int
) -> None:
    with Job(
        tmp_path, *settings(whole), processes=processes, plant=partial(slow_steps, 0.2)
    ) as job:
        job.until_step(2)
        (worker, *_) = family(job.pid(processes - 1))[1:]
        os.kill(worker, KILL)
        assert set(job.wait(60)) == {65}, job.text()
        assert "the data worker with pid" in job.text()
    told = status(job.run)
    assert (told["state"], told["again"]) == ("data", True)
    assert account(job.run)["step"] == told["step"] == last_step(job.run)


def test_a_bad_validation_image_ends_the_run_at_its_evaluation(whole: Path, tmp_path: Path) -> None:
    """Only one of two processes reads it, and no accuracy is logged that was measured without."""
    root = Path(shutil.copytree(whole, tmp_path / "set"))
    validation = load(root, validation=0.1).validation
    assert isinstance(validation, StreamedImages)
    (place,) = validation.catalogue.places([int(validation.rows[3])])
    Path(place.path).write_bytes(b"no image")
    text = launched(tmp_path, 2, settings(root), 65)
    assert f"error: {place.path}: not a readable image (" in text
    run = tmp_path / "run"
    assert (status(run)["state"], last_step(run), account(run)["step"]) == ("data", 6, 6)
    assert not any("knn/top1" in line for line in account(run)["metrics"])
    text = launched(tmp_path, 2, settings(root, SKIP), 0)
    assert f"1 unreadable file set aside: {place.path} (" in text
    measured = [each["step"] for each in account(run)["metrics"] if "knn/top1" in each]
    assert measured == [6, 12, 18]


def test_a_probe_goes_on_like_its_pretraining(folder: Path, tmp_path: Path) -> None:
    place = [
        f"data.root={folder}",
        f"data.cache={folder}-cache",
        "data.name=folder",
        "data.size=32",
    ]
    streams = [*place, "data.memory_gb=0", "data.workers=1", "runtime.device=cpu"]
    launched(tmp_path, 1, settings(folder, SKIP, "epochs=1"), 0)
    probe = [*streams, "views.size=24", "batch_size=16", "top_k=2", "optim.lr=0.3", "epochs=3"]
    probe += [f"encoder={tmp_path / 'run'}"]

    def probed(processes: int, ends: int, *more: str) -> str:
        with Job(tmp_path, *probe, *more, processes=processes, module="probe", name="probe") as job:
            assert set(job.wait(120)) == {ends}, job.text()
            text = job.text()
        job.log.unlink()
        return " ".join(text.split())

    text = probed(2, 65)
    assert "jpg: not a readable image (" in text
    text = probed(1, 0, SKIP, "stop_at_step=3")
    noted = json.loads((tmp_path / "probe" / "set_aside.json").read_text())
    assert sorted(each["file"] for each in noted["train"]) == list(BAD)
    assert "unreadable files set aside: " in text
    (folder / "train" / BAD[0]).unlink()
    text = probed(2, 0, SKIP)
    assert "since this run began there are 1 gone" in text
    results = json.loads((tmp_path / "probe" / "results.json").read_text())
    assert results["schema"] == "moco_dist.probe"
