"""Tar shards as webdataset writes them and as copies leave them: nothing is lost without a word."""

from __future__ import annotations

import gc
import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import webdataset

from moco_dist.data import tar_shards
from moco_dist.data.image_index import ImageIndex
from moco_dist.data.tar_members import Notes, read, split
from moco_dist.errors import DataError
from tests.image_sets import add, jpeg, picture


def image(number: int) -> bytes:
    return jpeg(picture(number, 20, 16))


def written(folder: Path, samples: list[dict[str, Any]], each: int = 7) -> list[str]:
    """Write samples with the library's own writer; return the names of the tars."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(f"{folder}/a-%06d.tar", maxcount=each, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)
    return sorted(path.name for path in folder.glob("*.tar"))


def contents(found: ImageIndex) -> list[bytes]:
    return [Path(p.path).read_bytes()[p.offset : p.offset + p.size] for p in found.all_places()]


def library(folder: Path, tars: list[str]) -> list[dict[str, Any]]:
    """Return the samples that the library reads."""
    urls = [str(folder / tar) for tar in tars]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        gc.collect()
    return samples


def names(found: ImageIndex) -> list[str | None]:
    return [found.classes[label] if label >= 0 else None for label in found.labels]


@pytest.mark.parametrize("label", ["cls", "json"])
def test_samples_are_those_that_the_library_reads(tmp_path: Path, label: str) -> None:
    samples = []
    for number in range(20):
        sample: dict[str, Any] = {"__key__": f"set/{number:04d}", "jpg": image(number)}
        sample |= {"seg.png": b"a mask", "txt": "a caption", "json": {"label": number % 3}}
        samples.append(sample | ({"cls": number % 3} if label == "cls" else {}))
    tars = written(tmp_path, samples)
    theirs = library(tmp_path, tars)
    ours = tar_shards.read(tmp_path, tars, True, None)
    assert len(tars) == 3
    assert contents(ours) == [sample["jpg"] for sample in theirs]
    assert [split(place.name).key for place in ours.all_places()] == [
        each["__key__"] for each in theirs
    ]
    expected = [
        str(int(each["cls"])) if label == "cls" else str(json.loads(each["json"])["label"])
        for each in theirs
    ]
    assert names(ours) == expected
    (said,) = ours.warnings
    assert said == (
        f"{tmp_path}: left out 20 files .seg.png of samples with an image of their own; the first "
        f"is {tmp_path}/a-000000.tar: set/0000.seg.png"
    )


@pytest.mark.parametrize("missing", [None, b""])
def test_a_folder_is_no_class_next_to_the_labels_of_other_samples(
    tmp_path: Path, missing: bytes | None
) -> None:
    samples = [{"__key__": f"photos/{n:03}", "jpg": image(n), "cls": n % 3} for n in range(20)]
    for sample in samples[1::2]:
        sample.pop("cls") if missing is None else sample.update(cls=missing)
    tars = written(tmp_path, samples)
    found = tar_shards.read(tmp_path, tars, True, None)
    theirs = [sample.get("cls", b"").decode() or None for sample in library(tmp_path, tars)]
    assert names(found) == theirs
    assert found.classes == ("0", "1", "2")
    (said,) = found.warnings
    assert "10 of 20 images have no label in their tar, as others have, and no class" in said
    assert tar_shards.read(tmp_path, tars, False, None).warnings == ()
    # Where the labels are folders, it is one.
    samples = [
        {"__key__": f"{'ab'[n % 2]}/{n}", "jpg": image(n), "cls": "ab"[n % 2]} for n in range(8)
    ]
    for sample in samples[::3]:
        sample.pop("cls")
    found = tar_shards.read(tmp_path / "b", written(tmp_path / "b", samples), True, None)
    assert names(found) == [*"abababab"]
    assert found.warnings == ()


def test_where_no_image_has_a_bare_suffix_each_is_read(tmp_path: Path) -> None:
    single = [
        {"__key__": f"{number}", "image.jpg": image(number), "label.cls": number % 2}
        for number in range(5)
    ]
    pairs = [
        {"__key__": f"p{n}", "left.jpg": image(10 + n), "right.jpg": image(20 + n), "cls": n % 2}
        for n in range(3)
    ]
    tars = written(tmp_path, [*single, *pairs])
    theirs = library(tmp_path, tars)
    ours = tar_shards.read(tmp_path, tars, True, None)
    images = [each[suffix] for each in theirs for suffix in each if suffix.endswith(".jpg")]
    assert contents(ours) == images
    assert names(ours) == [*"01010", *"001100"]
    (said,) = ours.warnings
    assert "11 images have a suffix of several parts" in said
    assert "(5 .image.jpg, 3 .left.jpg, 3 .right.jpg)" in said


def test_names_with_dots_lose_no_image_and_keep_their_labels(tmp_path: Path) -> None:
    """Every third image is called img.NNN.v1: for the library these are two samples."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(60):
            key = f"n0{n % 2}/img.{n:03}.v1" if n % 3 == 0 else f"n0{n % 2}/img{n:03}"
            add(tar, f"{key}.jpg", image(n))
            add(tar, f"{key}.cls", str(n % 2).encode())
    found = tar_shards.read(tmp_path, ["a.tar"], True, None)
    assert contents(found) == [image(n) for n in range(60)]
    assert names(found) == [str(n % 2) for n in range(60)]
    (said,) = found.warnings
    assert "20 images have a suffix of several parts, since WebDataset cuts a name at its" in said
    assert "(1 .000.v1.jpg, 1 .003.v1.jpg, 1 .006.v1.jpg, ...)" in said
    keys = {split(place.name).key for place in found.all_places()}
    assert keys == {each["__key__"] for each in library(tmp_path, ["a.tar"])}


def test_members_that_are_not_read_are_counted_by_their_reason(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("x/1.jpg", "y/2.jpg", "y/2.png", "y/2.JPG", "z/3.jpg"):
            add(tar, name, name.encode())
        link = tarfile.TarInfo("x/3.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "x/1.jpg"
        tar.addfile(link)
        folder = tarfile.TarInfo("x/4.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        add(tar, "x/5.HEIC", b"")
        for name in ("y/._2.jpg", "__MACOSX/y/2.jpg"):
            add(tar, name, b"of macOS")
    found = tar_shards.read(tmp_path, ["a.tar"], True, None)
    assert [place.name for place in found.all_places()] == ["x/1.jpg", "y/2.jpg", "z/3.jpg"]
    assert names(found) == [*"xyz"]
    place, first = tmp_path, f"the first is {tmp_path}/a.tar: "
    assert found.warnings == (
        f"{place}: left out 1 images with the name of the one before them in their tar; "
        f"{first}y/2.JPG",
        f"{place}: left out 1 images that are only links to other members; {first}x/3.jpg",
        f"{place}: left out 1 .heic images, which are not read; {first}x/5.HEIC",
        f"{place}: left out 1 second images of a sample; {first}y/2.png",
    )
    with pytest.raises(ValueError, match="duplicate file name in tar file"):
        library(tmp_path, ["a.tar"])


def test_a_key_that_comes_again_is_another_sample_as_for_the_library(tmp_path: Path) -> None:
    """As where the folders of the classes were left out of the names."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for label in range(3):
            for key in range(4):
                add(tar, f"{key}.jpg", image(4 * label + key))
                add(tar, f"{key}.cls", str(label).encode())
    found = tar_shards.read(tmp_path, ["a.tar"], True, None)
    theirs = library(tmp_path, ["a.tar"])
    assert contents(found) == [each["jpg"] for each in theirs]
    assert names(found) == [each["cls"].decode() for each in theirs]
    (said,) = found.warnings
    assert said.startswith(f"{tmp_path}/a.tar: 8 samples have the key of another one, and are read")


def test_labels_may_stand_anywhere_in_the_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for ending in ("jpg", "cls"):
            for key in range(4):
                add(tar, f"{key}.{ending}", b"%d" % (key % 2))
    assert names(tar_shards.read(tmp_path, ["a.tar"], True, None)) == [*"0101"]


@pytest.mark.parametrize(
    ("given", "classes", "found"),
    [
        (["1", "2", "10"], ("1", "2", "10"), ["1", "2", "10"]),  # counted from 1
        (["000", "001", "010"], ("0", "1", "10"), ["0", "1", "10"]),
        (["7", "007", "8"], ("7", "8"), ["7", "7", "8"]),
        (["10", "3"], ("3", "10"), ["10", "3"]),  # a part of some classes
        (["007", "bond"], ("007", "bond"), ["007", "bond"]),
    ],
)
def test_numbers_of_classes_are_those_that_have_images(
    tmp_path: Path, given: list[str], classes: tuple[str, ...], found: list[str]
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for place, label in enumerate(given):
            add(tar, f"{place}.jpg", b"")
            add(tar, f"{place}.cls", label.encode())
    train = tar_shards.read(tmp_path, ["a.tar"], True, None)
    assert train.classes == classes
    assert names(train) == found
    # The same labels name the same classes in another part.
    assert names(tar_shards.read(tmp_path, ["a.tar"], True, classes)) == found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """The bytes of a tar of three samples, and the place of its end mark."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(3):
            add(tar, f"{number}.jpg", image(number))
            add(tar, f"{number}.cls", b"%d" % number)
        end = tar.offset
    return buffer.getvalue(), end


def test_a_tar_that_is_cut_anywhere_is_named_and_not_read_in_part(
    whole: tuple[bytes, int], tmp_path: Path
) -> None:
    content, end = whole
    path, refused = tmp_path / "a.tar", 0
    for length in [*range(0, len(content), 128), end, end + 511, end + 512, len(content)]:
        path.write_bytes(content[:length])
        if length >= end + 512:  # a block of zeros says that there is nothing more
            assert len(read(path, 0, True, Notes())) == 3
            continue
        with pytest.raises(DataError) as error:
            read(path, 0, True, Notes())
        assert str(error.value).startswith(f"{path}: not a readable tar (")
        refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        ("no end", "it has no end mark, so it was not copied or written whole"),
        ("header", "the header at byte 1,536 is damaged"),
        ("joined", "it goes on after its end mark at byte "),
    ],
)
def test_what_tarfile_takes_for_the_end_is_looked_at(
    whole: tuple[bytes, int], tmp_path: Path, damage: str, sentence: str
) -> None:
    content, end = whole
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        second = tar.getmembers()[1].offset
    sentence = sentence.replace("1,536", f"{second:,}")
    damaged = bytearray(content)
    damaged[second + 150] ^= 1  # in the checksum
    kinds = {"no end": content[:end], "header": bytes(damaged), "joined": content * 2}
    (tmp_path / "a.tar").write_bytes(kinds[damage])
    with pytest.raises(DataError) as error:
        tar_shards.read(tmp_path, ["a.tar"], True, None)
    assert sentence in str(error.value)
    # tarfile itself says nothing.
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert len(tar.getmembers()) == (1 if damage == "header" else 6)


def test_a_long_end_of_zeros_is_said(whole: tuple[bytes, int], tmp_path: Path) -> None:
    """As a copy leaves it that reserved its place and was interrupted."""
    (tmp_path / "a.tar").write_bytes(whole[0] + bytes(3 * 2**20))
    found = tar_shards.read(tmp_path, ["a.tar"], True, None)
    assert len(found) == 3
    (said,) = found.warnings
    assert "bytes of zeros stand at its end; make sure that it was copied whole" in said
