"""Folders as people lay them out: which images are trained on, which are tested on, what is said.

Each case is a tree of files, read in memory, streamed, by the probe and by the doctor.
"""

from __future__ import annotations

import logging
import subprocess
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import DataConfig
from moco_dist.data import datasets
from moco_dist.data.datasets import AnyImages, Images
from moco_dist.doctor import images as doctor
from moco_dist.errors import DataError, MissingError, UserError
from moco_dist.probe import run as probe
from tests.image_sets import picture


def write(root: Path, tree: dict[str, int]) -> Path:
    """Write, for each folder with a suffix as in "train/a .png", so many files."""
    seed = 0
    for place, count in tree.items():
        folder, _, suffix = place.rpartition(" ")
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            seed += 1
            path = root / folder / f"{number}{suffix}"
            if suffix in (".png", ".gif", ".jfif", ".avif", ".PNG", ".tiff"):
                kind = {".jfif": "JPEG"}.get(suffix)
                picture(seed, 12, 12).save(path, kind)
            else:
                path.write_bytes(b"\xff\xd8\xff" if suffix == "" else b"no image")
    return root


def config(root: Path, cache: Path, memory_gb: float = 16.0) -> DataConfig:
    name = "folder"
    return DataConfig(
        name=name,  # type: ignore[arg-type]
        root=str(root),
        size=8,
        validation=0.0,
        cache=str(cache),
        memory_gb=memory_gb,
        workers=1,
    )


def counts(images: AnyImages) -> dict[str, int]:
    """Return the number of images of each class, "-" for none."""
    names = [images.classes[label] if label >= 0 else "-" for label in images.labels.tolist()]
    return dict(Counter(names))


# Each tree, the images of training and testing by class, and the words of the banner.
READ: dict[str, tuple[dict[str, int], dict[str, int], dict[str, int], str]] = {
    "capitals": (
        {"Train/a .png": 3, "Train/b .png": 3, "Test/a .png": 2, "Test/b .png": 2},
        {"a": 3, "b": 3},
        {"a": 2, "b": 2},
        "trains on Train; tests on Test",
    ),
    "long names": (
        {"training/a .png": 3, "training/b .png": 3, "testing/a .png": 2},
        {"a": 3, "b": 3},
        {"a": 2},
        "trains on training; tests on testing",
    ),
    "valid": (
        {"train/a .png": 3, "train/b .png": 3, "valid/b .png": 2},
        {"a": 3, "b": 3},
        {"b": 2},
        "trains on train; tests on valid",
    ),
    "three parts": (
        {"TRAIN/a .png": 3, "TRAIN/b .png": 3, "VAL/a .png": 1, "test/a .png": 2},
        {"a": 3, "b": 3},
        {"a": 2},
        "trains on TRAIN; tests on test; leaves aside VAL (not needed)",
    ),
    "unlabelled test": (
        {"train/a .png": 3, "train/b .png": 3, "test .png": 4},
        {"a": 3, "b": 3},
        {},
        "trains on train; leaves aside test (no labels)",
    ),
    "unlabelled test, labelled validation": (
        {"train/a .png": 3, "train/b .png": 3, "test .png": 4, "validation/b .png": 2},
        {"a": 3, "b": 3},
        {"b": 2},
        "trains on train; tests on validation; leaves aside test (no labels)",
    ),
    "a test that is not read": (
        {"train/a .png": 3, "train/b .png": 3, "test/a .heic": 3, "val/a .png": 1},
        {"a": 3, "b": 3},
        {"a": 1},
        "trains on train; tests on val; leaves aside test (no images that are read)",
    ),
    "Tiny-ImageNet": (
        {"train/n1/images .png": 3, "train/n2/images .png": 3, "val/images .png": 4},
        {"n1": 3, "n2": 3},
        {},
        "trains on train; leaves aside val (class 'images' is not in training)",
    ),
    "unknown": (
        {"train/a .png": 3, "train/b .png": 3, "test/unknown .png": 4},
        {"a": 3, "b": 3},
        {},
        "trains on train; leaves aside test (class 'unknown' is not in training)",
    ),
    "repeated folders": (
        {
            "training_set/training_set/a .png": 3,
            "training_set/training_set/b .png": 3,
            "test_set/test_set/a .png": 2,
        },
        {"a": 3, "b": 3},
        {"a": 2},
        "trains on training_set; tests on test_set",
    ),
    "images and labels": (
        {"images/train/a .png": 3, "images/train/b .png": 3, "labels/train .txt": 6},
        {"a": 3, "b": 3},
        {},
        "trains on images/train",
    ),
    "one folder on top": (
        {"set/a .png": 3, "set/b .png": 3, "about .txt": 1},
        {"a": 3, "b": 3},
        {},
        "trains on set",
    ),
    "one class": ({"set/a .png": 3}, {"-": 3}, {}, ""),
    "a stray picture": (
        {"train .png": 1, "train/a .png": 5, "train/b .png": 5},
        {"-": 1, "a": 5, "b": 5},
        {},
        "trains on train",
    ),
    "unsorted pictures": ({" .png": 5, "a .png": 5, "b .png": 5}, {"-": 15}, {}, ""),
    "other suffixes": (
        {"a .png": 3, "a .gif": 2, "b .jfif": 2, "b .avif": 2, "b .PNG": 1},
        {"a": 5, "b": 5},
        {},
        "",
    ),
    "made by systems": (
        {"a .png": 3, "b .png": 3, "__MACOSX/a .png": 3, "@eaDir/b .png": 3, ".thumbs .png": 3},
        {"a": 3, "b": 3},
        {},
        "",
    ),
    "a class called test": (
        {"cat .png": 3, "dog .png": 3, "test .png": 3},
        {"cat": 3, "dog": 3, "test": 3},
        {},
        "",
    ),
    "a class called train": (
        {"train/bus .png": 3, "train/train .png": 3, "val/train .png": 1},
        {"bus": 3, "train": 3},
        {"train": 1},
        "trains on train; tests on val",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_the_parts_are_found_and_said(tmp_path: Path, name: str) -> None:
    tree, train, test, parts = READ[name]
    root = write(tmp_path / "set", tree)
    for memory_gb in (16.0, 0.0):
        loaded = datasets.load(config(root, tmp_path / "cache", memory_gb))
        assert (counts(loaded.train), counts(loaded.test)) == (train, test)
        assert loaded.parts == parts
        assert loaded.fault == ""
        assert isinstance(loaded.train, Images) == bool(memory_gb)
    findings, images = doctor.data(config(root, tmp_path / "cache"), 3)
    assert images == sum(train.values())
    said = {finding.about: finding.found for finding in findings}
    assert said.get("parts", "") == parts
    assert (f", {sum(test.values())} for testing, " in said["data"]) == bool(test)
    assert not any(finding.fault for finding in findings)


# Each tree, and what is wrong with it.
REFUSED: dict[str, tuple[dict[str, int], type[UserError], str]] = {
    "parts within other words": (
        {"seg_train/a .png": 3, "seg_test/a .png": 3, "seg_pred .png": 3},
        DataError,
        "the folders 'seg_train' and 'seg_test' are parts of the set and no classes, by their "
        "names; name them train and test, or give the folder of one part as data.root, as ",
    ),
    "only parts to test on": (
        {"test/a .png": 3, "val/a .png": 3},
        DataError,
        "the folders 'test' and 'val' are parts of the set and no classes",
    ),
    "parts within classes": (
        {"cat/train .png": 3, "cat/test .png": 3, "dog/train .png": 3},
        DataError,
        "the parts lie within the classes (cat/train and cat/test); use train/CLASS and test/CLASS",
    ),
    "two for training": (
        {"Train/a .png": 3, "training/a .png": 3},
        DataError,
        "'Train' and 'training' are both for training, by their names; move one of them away",
    ),
    "a class that is not read": (
        {"a .png": 3, "b .heic": 3, "b .jp2": 1},
        DataError,
        "class folder 'b' has no image that is read (3 .heic, 1 .jp2); save its images as PNG",
    ),
    "a part that is not read": (
        {"Train/a .heic": 3, "Train/b .heic": 3, "Test/a .png": 3, "Test/b .png": 3},
        MissingError,
        "no images in this folder (6 .heic are not read); data.root needs files that end",
    ),
    "nothing that is read": (
        {"a .heic": 3, "b .tga": 2},
        MissingError,
        "no images in this folder (3 .heic, 2 .tga are not read); data.root needs files that end",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_otherwise_than_it_is_meant_is_refused(tmp_path: Path, name: str) -> None:
    tree, kind, sentence = REFUSED[name]
    root = write(tmp_path / "set", tree)
    with pytest.raises(kind) as error:
        datasets.load(config(root, tmp_path / "cache"))
    part = root / "Train" if "Train/a .heic" in tree else root
    assert str(error.value).startswith(f"{part}: {sentence}")
    ((finding,), _) = doctor.data(config(root, tmp_path / "cache"), 3)
    assert finding.fault == str(error.value)


# Each tree, and a warning about it.
WARNED = {
    "unread": (
        {"a .png": 3, "b .png": 3, "a .heic": 2, "b .tga": 1, "b ": 2, "b .txt": 4},
        "files that look like images are not read (2 without a suffix, 2 .heic, 1 .tga; the first "
        "is {root}/a/0.heic); save them as PNG or JPEG, with that suffix",
    ),
    "stray": (
        {" .png": 1, "a .png": 5, "b .png": 5},
        "1 image without a class next to the class folders; the first is {root}/0.png",
    ),
    "unsorted": (
        {" .png": 5, "a .png": 5, "b .png": 5},
        "no classes, because 5 of 15 images lie next to the 2 folders; the first is {root}/0.png",
    ),
    "others": (
        {"train .png": 3, "bus .png": 3, "car .png": 3},
        "trains on 'train' alone; left aside 2 other folders: bus, car",
    ),
    "test alone": (
        {"cat .png": 3, "dog .png": 3, "test .png": 3},
        "trains on all folders, also on 'test', because none is called train",
    ),
    "next to the parts": (
        {" .png": 2, "train/a .png": 3, "train/b .png": 3},
        "left aside 2 images next to the folder that is read",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_is_left_out_is_warned_of_at_every_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    tree, sentence = WARNED[name]
    root = write(tmp_path / "set", tree)
    expected = f"{root}: {sentence.format(root=root)}"
    with caplog.at_level(logging.WARNING):
        for _ in ("listed", "from the cache"):
            caplog.clear()
            datasets.load(config(root, tmp_path / "cache"))
            assert caplog.messages == [expected]
    findings, _ = doctor.data(config(root, tmp_path / "cache"), 3)
    assert [finding.warning for finding in findings if finding.warning] == [expected]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_of_a_desktop_gives_what_its_folder_gives(tmp_path: Path, kind: str) -> None:
    tree = {"set/train/a .png": 3, "set/train/b .png": 3, "set/test/a .png": 2}
    write(tmp_path / "made", tree)
    for place in ("__MACOSX/set/train/a/._0.png", "set/._train", "set/.DS_Store", "README.txt"):
        path = tmp_path / "made" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5\x16\7")
    archive = tmp_path / f"desktop.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted((tmp_path / "made").rglob("*")):
                file.write(path, path.relative_to(tmp_path / "made"))
    else:
        command = ["tar", "-cf", str(archive), "-C", str(tmp_path / "made"), "."]
        subprocess.run(command, check=True)
    given = config(archive, tmp_path / "cache")
    before, images = doctor.data(given, 3)
    assert [finding.about for finding in before] == ["data", "parts"]
    assert before[0].found == "6 images, 2 for testing, 2 classes"
    loaded = datasets.load(given)
    plain = datasets.load(config(tmp_path / "made", tmp_path / "cache"))
    assert loaded.fingerprint == plain.fingerprint
    assert (counts(loaded.train), counts(loaded.test)) == ({"a": 3, "b": 3}, {"a": 2})
    assert images == len(loaded.train)


def test_a_zip_of_windows_has_folders(tmp_path: Path) -> None:
    tree = {"set/train/a .png": 3, "set/train/b .png": 3, "set/test/a .png": 2}
    made = write(tmp_path / "made", tree)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
        for path in sorted(made.rglob("*.png")):
            entry = zipfile.ZipInfo("x")
            entry.create_system = 0
            entry.filename = str(path.relative_to(made)).replace("/", "\\")
            file.writestr(entry, path.read_bytes())
    given = config(tmp_path / "set.zip", tmp_path / "cache")
    assert doctor.data(given, 3)[1] == 6
    loaded = datasets.load(given)
    assert (counts(loaded.train), counts(loaded.test)) == ({"a": 3, "b": 3}, {"a": 2})


def test_labels_that_pretraining_does_not_use_are_refused_by_the_probe_alone(
    tmp_path: Path,
) -> None:
    tree = {"train/a .png": 3, "train/b .png": 3, "test/a .png": 2, "test/fox .png": 2}
    root = write(tmp_path / "set", tree)
    for memory_gb in (16.0, 0.0):
        loaded = datasets.load(config(root, tmp_path / "cache", memory_gb))
        assert (len(loaded.train), len(loaded.test)) == (6, 0)
        assert loaded.parts == (
            "trains on train; leaves aside test (class 'fox' is not in training)"
        )
        with pytest.raises(DataError, match="class 'fox' is not among the 2 classes"):
            probe.labelled(loaded, ProbeConfig(top_k=2))
    findings, _ = doctor.data(config(root, tmp_path / "cache"), 3)
    (warning,) = [finding.warning for finding in findings if finding.warning]
    assert warning == f"a probe will be refused: {loaded.fault}"


def test_a_bad_test_image_is_refused_by_the_probe_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = {"train/a .png": 3, "train/b .png": 3, "test/a .png": 2}
    root = write(tmp_path / "set", tree)
    (root / "test" / "a" / "0.png").write_bytes(b"no image")
    loaded = datasets.load(config(root, tmp_path / "cache"))
    assert (len(loaded.train), len(loaded.test)) == (6, 0)
    (said,) = caplog.messages
    bad = f"{root / 'test' / 'a' / '0.png'}: not a readable image (its content is none of JPEG"
    assert said.startswith(f"the test images are left aside: {bad}")
    with pytest.raises(DataError, match="not a readable image"):
        probe.labelled(loaded, ProbeConfig(top_k=2))
    findings, _ = doctor.data(config(root, tmp_path / "cache"), 3)
    assert not any(finding.fault for finding in findings)
    (warning,) = [finding.warning for finding in findings if finding.warning]
    assert warning.startswith(f"1 of 2 decoded test images can't be read: {root / 'test'}")
