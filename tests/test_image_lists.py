"""Cached lists of images, and tar shards: their content, and when a list is made again."""

from __future__ import annotations

import dataclasses
import os
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_dist.config.recipe import DataConfig
from moco_dist.data import datasets, image_file, image_folder, image_index, tar_shards
from moco_dist.data.image_file import Recipe
from moco_dist.data.image_index import ImageIndex
from moco_dist.data.set_aside import Aside
from moco_dist.data.streamed_images import StreamedImages
from moco_dist.data.worker_pool import WorkerPool
from moco_dist.errors import ConfigError, DataError, MissingError
from tests import image_sets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_sets.write_folder(tmp_path / "set", 24, side=16)


def settle(root: Path) -> None:
    """Let all files and folders look as if they had not been changed for long."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (1_000_000, 1_000_000))


def config(root: Path, cache: Path, **values: Any) -> DataConfig:
    given: dict[str, Any] = {"name": "folder", "root": str(root), "cache": str(cache), "size": 16}
    return DataConfig(**given | values)


def listed(root: Path, cache: Path, tars: Sequence[str] = ()) -> ImageIndex:
    """Return the images of a folder, or of some tars in it, by way of the cache."""
    if tars:
        return image_index.kept(cache, tar_shards.read, root, tars, True, None)
    return image_index.kept(cache, image_folder.scan, root, True, None)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders whose images, or tars, were listed."""
    made: list[Path] = []

    def counted(real: Callable[..., Any], root: Path, *rest: Any) -> Any:
        made.append(root)
        return real(root, *rest)

    monkeypatch.setattr(image_folder, "scan", partial(counted, image_folder.scan))
    monkeypatch.setattr(tar_shards, "read", partial(counted, tar_shards.read))
    return made


def test_a_list_is_made_once_and_again_when_a_folder_changes(
    folder: Path, tmp_path: Path, walks: list[Path]
) -> None:
    train, cache = folder / "train", tmp_path / "cache"
    settle(folder)
    first = listed(train, cache)
    again = listed(train, cache)
    assert walks == [train]
    assert again.fingerprint() == first.fingerprint()
    assert again.all_places() == first.all_places()
    assert again.labels.equal(first.labels)
    assert again.classes == first.classes
    (train / "class_1" / "9999.jpg").write_bytes(image_sets.jpeg(image_sets.picture(1, 16, 16)))
    changed = listed(train, cache)
    assert len(changed) == len(first) + 1
    assert changed.fingerprint() != first.fingerprint()
    # It was changed a moment ago, and may change again within the clock's grain.
    listed(train, cache)
    assert walks == [train] * 3


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_list_without_what_was_out_of_reach_is_not_kept(
    folder: Path, tmp_path: Path, walks: list[Path], is_folder: bool
) -> None:
    """As where another disk is mounted later: no folder of the set changes."""
    root, disk = folder / "train", image_sets.write_folder(tmp_path / "disk", 3, side=16)
    number, more = (len(list(each.rglob("*.jpg"))) for each in (root, disk))
    part = next(path for path in sorted(root.iterdir()) if path.is_dir())
    (part / "more.jpg").symlink_to(disk if is_folder else next(disk.rglob("*.jpg")))
    (part / "again").symlink_to(root)
    settle(tmp_path)
    disk.rename(tmp_path / "away")
    first = listed(root, tmp_path / "cache")
    assert len(first) == number
    assert "left out 1 links to nothing" in " ".join(first.warnings)
    (tmp_path / "away").rename(disk)
    found = listed(root, tmp_path / "cache")
    assert len(found) == number + (more if is_folder else 1)
    # What is left out for good is no reason to list the folder again.
    (said,) = found.warnings
    assert "links to folders that are read already" in said
    assert len(listed(root, tmp_path / "cache")) == len(found)
    assert len(walks) == 2


def test_a_list_names_the_files_as_the_folder_does(folder: Path, tmp_path: Path) -> None:
    odd = folder / "train" / "class_0" / "ünï cödé\n.jpg"
    odd.write_bytes(b"")
    os.rename(odd, os.fsencode(odd.parent) + b"/\xff.jpg")  # no text in any encoding
    settle(folder)
    files = sorted((folder / "train").glob("*/*"))
    for _ in range(2):  # made, and kept
        index = listed(folder / "train", tmp_path / "cache")
        assert [place.path for place in index.all_places()] == [str(f) for f in files]
        assert index.sizes.tolist() == [f.stat().st_size for f in files]
        assert [index.classes[n] for n in index.labels] == [f.parent.name for f in files]


def test_a_fingerprint_knows_names_sizes_and_classes_but_not_the_place(
    folder: Path, tmp_path: Path
) -> None:
    def now(root: Path) -> str:
        return listed(root, tmp_path / "no cache").fingerprint()

    first = now(folder / "train")
    moved = folder.rename(tmp_path / "moved") / "train"
    assert now(moved) == first
    file = next((moved / "class_0").iterdir())
    content = file.read_bytes()
    file.write_bytes(content + b" ")
    assert now(moved) != first
    file.write_bytes(bytes(len(content)))
    assert now(moved) == first  # content is not read
    file.rename(file.with_name("other.jpg"))
    assert now(moved) != first


def test_a_damaged_list_is_named_and_made_again(
    folder: Path, tmp_path: Path, walks: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    settle(folder)
    first = listed(folder / "train", tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    content = bytearray(kept.read_bytes())
    content[-3] ^= 1
    kept.write_bytes(content)
    again = listed(folder / "train", tmp_path / "cache")
    assert f"{kept}: its content changed on disk; listing it again" in caplog.text
    kept.write_bytes(b"nothing")
    third = listed(folder / "train", tmp_path / "cache")
    assert "listing the images again" in caplog.text
    assert len({each.fingerprint() for each in (first, again, third)}) == 1
    assert len(walks) == 3


@pytest.mark.parametrize("labels", ["cls", "json"])
def test_shards_hold_the_images_of_the_folder_they_were_made_of(
    folder: Path, tmp_path: Path, labels: str
) -> None:
    shards = image_sets.write_shards(folder, tmp_path / "tars", labels=labels)
    plain = datasets.load(config(folder, tmp_path / "c", validation=0.0))
    settings = config(shards, tmp_path / "c", name="shards", validation=0.0, workers=1)
    held = datasets.load(settings)
    streamed = datasets.load(dataclasses.replace(settings, memory_gb=0))
    assert held.train.classes == ("0", "1", "2")
    for part in ("train", "test"):
        expected = getattr(plain, part)
        for found in (getattr(held, part), getattr(streamed, part)):
            assert found.labels.equal(expected.labels)
            assert found.squares(torch.arange(len(found))).equal(expected.pixels)
    assert isinstance(streamed.train, StreamedImages)
    streamed.train.pool.close()


def test_a_list_of_shards_is_made_once_and_again_when_a_tar_changes(
    folder: Path, tmp_path: Path, walks: list[Path]
) -> None:
    shards = image_sets.write_shards(folder, tmp_path / "tars") / "train"
    settle(shards)
    tars = ["000000.tar", "000001.tar", "000002.tar"]
    for _ in range(2):
        assert len(listed(shards, tmp_path / "cache", tars)) == 24
    assert walks == [shards]
    with tarfile.open(shards / tars[2], "a") as tar:
        image_sets.add(tar, "new.jpg", b"x")
    assert len(listed(shards, tmp_path / "cache", tars)) == 25
    assert walks == [shards] * 2


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            image_sets.add(tar, name, content)


def test_labels_are_those_of_the_sample_and_extensions_begin_at_the_first_dot(
    tmp_path: Path,
) -> None:
    long = "folder/" * 30 + "k" * 200
    write_tar(
        tmp_path / "a.tar",
        {
            "a/1.cls": b"2",
            "a/1.jpg": b"one",
            "a/1.seg.png": b"no image of the set",
            "a/1.json": b'{"label": 0}',
            "a/2.JPEG": b"two",
            "a/2.png": b"a second image of one key",
            f"{long}.webp": b"three",
            f"{long}.json": b'{"cls": 0, "label": 7}',
            "b/.hidden.jpg": b"",
            "c/4.json": b"[1]",
            "c/4.png": b"four!",
            "c/4.cls": b"1\n",
        },
    )
    found = tar_shards.read(tmp_path, ["a.tar"], True, None)
    places = found.all_places()
    assert [p.name for p in places] == ["a/1.jpg", "a/2.JPEG", f"{long}.webp", "c/4.png"]
    content = (tmp_path / "a.tar").read_bytes()
    assert [content[p.offset :][: p.size] for p in places] == [b"one", b"two", b"three", b"four!"]
    assert found.classes == ("0", "1", "2")
    assert found.labels.tolist() == [2, -1, 0, 1]  # "a" is the label of no image
    assert tar_shards.read(tmp_path, ["a.tar"], False, None).classes == ()


def test_tars_are_shared_out_by_folders_or_by_words_of_their_names(tmp_path: Path) -> None:
    for name in ("net-train-0.tar", "net-train-1.tar", "net-val-0.tar", "intervals.tar"):
        write_tar(tmp_path / "one" / name, {})
    for name in ("train/1.tar", "train/0.tar", "val/0.tar", "other.tar"):
        write_tar(tmp_path / "two" / name, {})
    one, two = tmp_path / "one", tmp_path / "two"
    tests = [(one, ["net-val-0.tar"])]
    train = one, ["intervals.tar", "net-train-0.tar", "net-train-1.tar"]
    assert tar_shards.parts(one) == (train, tests, ())
    found = tar_shards.parts(two)
    assert found[:2] == ((two / "train", ["0.tar", "1.tar"]), [(two / "val", ["0.tar"])])
    assert found[2] == (f"{two}: left aside 1 tar next to the folder that is read",)


@pytest.mark.parametrize(
    ("members", "kind", "sentence"),
    [
        (None, MissingError, "no such folder; give the folder of the tar files as data.root=DIR"),
        ({}, MissingError, "no images in 1 tar files; data.name=shards needs members that end in"),
        ({"1.jpg": b"", "1.cls": b"\xff"}, DataError, "1.cls is no label ('utf-8' codec can't"),
        ({"1.jpg": b"", "1.json": b"{"}, DataError, "1.json is no label (Expecting property name"),
    ],
)
def test_what_is_wrong_with_shards_is_said(
    tmp_path: Path, members: dict[str, bytes] | None, kind: type[Exception], sentence: str
) -> None:
    if members is not None:
        write_tar(tmp_path / "set" / "a.tar", members)
    with pytest.raises(kind) as error:
        datasets.load(config(tmp_path / "set", tmp_path / "cache", name="shards"))
    assert sentence in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "set"))


@pytest.mark.parametrize("damage", ["compressed", "cut", "text"])
def test_a_tar_that_cant_be_read_at_any_place_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "set" / "a.tar"
    write_tar(path, {"1.jpg": bytes(3000), "2.jpg": bytes(3000)})
    if damage == "compressed":
        content = path.read_bytes()
        with tarfile.open(path, "w:gz") as tar:
            image_sets.add(tar, "1.jpg", content)
    else:
        path.write_bytes({"cut": path.read_bytes()[:5000], "text": b"no tar" * 1000}[damage])
    with pytest.raises(DataError) as error:
        datasets.load(config(tmp_path / "set", tmp_path / "cache", name="shards"))
    assert str(error.value).startswith(f"{path}: not a readable tar (")
    assert str(error.value).endswith("needs complete tar files that are not compressed")


def test_a_member_that_goes_bad_is_named_with_its_tar(folder: Path, tmp_path: Path) -> None:
    shards = image_sets.write_shards(folder, tmp_path / "tars") / "train"
    index = listed(shards, tmp_path / "cache", ["000000.tar"])
    (place,) = index.places([4])
    with open(place.path, "r+b") as file:
        file.seek(place.offset)
        file.write(bytes(100))
    pool = WorkerPool(1)
    aside = Aside(index, skips=False)
    images = StreamedImages(index, aside, pool, torch.arange(len(index)), index.labels, Recipe(16))
    with pytest.raises(DataError) as error:
        images.squares(torch.tensor([4]))
    assert str(error.value).startswith(f"{shards / '000000.tar'}: {place.name}: not a readable")
    os.truncate(place.path, place.offset + 10)
    with pytest.raises(DataError, match=r"it ends .* bytes too early"):
        pool.fetch(pool.submit([place], image_file.Recipe(16), None))
    pool.close()


def test_memory_or_streaming_is_a_matter_of_the_configuration_alone(
    folder: Path, tmp_path: Path
) -> None:
    """24 training and 6 test images of 16 x 16 take 23,040 bytes."""
    below = datasets.load(config(folder, tmp_path / "cache", memory_gb=23040 / 1e9))
    above = datasets.load(config(folder, tmp_path / "cache", memory_gb=23039 / 1e9, workers=3))
    assert isinstance(below.train, datasets.Images)
    assert below.held == (
        "in memory: squares of 16 x 16 need 2.3e-05 GB, data.memory_gb=2.304e-05 allows it"
    )
    assert isinstance(above.train, StreamedImages)
    assert above.held == (
        "streamed by 3 workers per process: squares of 16 x 16 need 2.3e-05 GB, more than "
        "data.memory_gb=2.3039e-05; what is transparent on white"
    )
    assert above.train.pool.pids() == []  # they start when they are needed
    drawn = datasets.load(DataConfig(shapes_train=10, shapes_test=10, memory_gb=0))
    assert drawn.held == "in memory: squares of 32 x 32 need 6.14e-05 GB, shapes always is"


def test_a_run_does_not_resume_with_views_of_another_kind(folder: Path, tmp_path: Path) -> None:
    held = datasets.load(config(folder, tmp_path / "cache"))
    streamed = datasets.load(config(folder, tmp_path / "cache", memory_gb=0))
    datasets.require_same(held.fingerprint, held, tmp_path)
    datasets.require_same(streamed.fingerprint, streamed, tmp_path)
    with pytest.raises(ConfigError, match="images that were in memory, and now they are streamed"):
        datasets.require_same(held.fingerprint, streamed, tmp_path)
    with pytest.raises(ConfigError, match="images that were streamed, and now they are in memory"):
        datasets.require_same(streamed.fingerprint, held, tmp_path)
    other = datasets.load(config(folder, tmp_path / "cache", memory_gb=0, labels="none"))
    with pytest.raises(ConfigError, match="was trained on other images"):
        datasets.require_same(streamed.fingerprint, other, tmp_path)
