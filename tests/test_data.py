"""Data sets: images, classes, the split, and what is said about bad files."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets, transforms

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import DataConfig
from moco_dist.data import datasets as data_datasets
from moco_dist.data import image_folder
from moco_dist.data.image_file import Recipe
from moco_dist.errors import ConfigError, DataError, MissingError
from moco_dist.probe import run as probe


def write_image(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (12, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def folder(root: Path, cache: Path, **values: object) -> DataConfig:
    return DataConfig(name="folder", root=str(root), size=8, cache=str(cache), **values)  # type: ignore[arg-type]


def held(images: data_datasets.AnyImages) -> torch.Tensor:
    assert isinstance(images, data_datasets.Images)
    return images.pixels


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    for number, name in enumerate(("cat", "dog", "emu")):
        for i in range(10):
            write_image(tmp_path / "set" / "train" / name / f"{i}.png", (80 * number, i, 7))
            write_image(tmp_path / "set" / "test" / name / f"{i}.png", (80 * number, i, 9))
    return tmp_path / "set"


def test_class_folders_give_labels_and_the_parts_are_apart(labelled: Path, tmp_path: Path) -> None:
    splits = data_datasets.load(folder(labelled, tmp_path / "cache", validation=0.2))
    assert splits.train.classes == ("cat", "dog", "emu")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (24, 6, 30)
    for part in (splits.train, splits.validation, splits.test):
        assert held(part).dtype == torch.uint8
        assert held(part).shape[1:] == (3, 8, 8)
        assert (held(part)[:, 0, 4, 4] == 80 * part.labels).all()
    seen = torch.cat([held(splits.train), held(splits.validation)])[:, :2, 0, 0].tolist()
    assert sorted(seen) == [[80 * c, i] for c in range(3) for i in range(10)]
    assert (held(splits.test)[:, 2] == 9).all()


def test_the_split_is_a_function_of_its_seed(labelled: Path, tmp_path: Path) -> None:
    def validation(seed: int) -> torch.Tensor:
        config = folder(labelled, tmp_path / "cache", validation=0.3, split_seed=seed)
        return held(data_datasets.load(config).validation)

    assert validation(0).equal(validation(0))
    assert not validation(0).equal(validation(1))


def test_a_limit_takes_fewer_training_images_and_the_same_validation(
    labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = data_datasets.load(folder(labelled, tmp_path / "cache"))
    few = data_datasets.load(folder(labelled, tmp_path / "cache", limit=5))
    assert len(few.train) == 5
    assert held(few.validation).equal(held(whole.validation))
    assert few.fingerprint == whole.fingerprint
    assert "data.limit" not in caplog.text
    all_of_them = data_datasets.load(folder(labelled, tmp_path / "cache", limit=5000))
    assert len(all_of_them.train) == len(whole.train)
    assert f"data.limit=5000 is above the {len(whole.train)} training images" in caplog.text


@pytest.mark.parametrize(
    "places", [["a.png", "b.PNG"], ["x/y/a.png", "x/b.png"], ["a.png", "x/b.png"]]
)
def test_flat_and_nested_folders_are_unlabelled_images(tmp_path: Path, places: list[str]) -> None:
    for place in places:
        write_image(tmp_path / "set" / place, (1, 2, 3))
    write_image(tmp_path / "set" / ".hidden" / "c.png", (1, 2, 3))
    (tmp_path / "set" / "notes.txt").write_text("no image")
    splits = data_datasets.load(folder(tmp_path / "set", tmp_path / "cache", validation=0.0))
    assert (len(splits.train), splits.train.classes) == (2, ())
    assert (splits.train.labels == -1).all()


def test_labels_none_ignores_class_folders(labelled: Path, tmp_path: Path) -> None:
    config = folder(labelled, tmp_path / "cache", labels="none")
    splits = data_datasets.load(config)
    assert splits.train.classes == ()
    with pytest.raises(DataError) as error:
        data_datasets.require_labels(splits, config)
    assert str(error.value) == (
        f"data.name=folder at data.root={labelled} has no labels, with data.labels=none, and a "
        "probe needs them; give data.labels=folders"
    )


def test_large_images_are_cut_to_a_centred_square(tmp_path: Path) -> None:
    image = np.zeros((40, 80, 3), dtype=np.uint8)
    image[:, 20:60] = 255
    path = tmp_path / "set" / "a.png"
    path.parent.mkdir()
    Image.fromarray(image).save(path)
    pixels = image_folder.decode(image_folder.scan(path.parent, labelled=True), Recipe(8))
    assert (pixels[:, :, :, 1:-1] == 255).all()
    assert (pixels > 200).all()


def test_decoded_images_are_kept_and_noticed_when_files_change(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = folder(labelled, tmp_path / "cache")
    first = data_datasets.load(config)

    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "decode", refuse)
        assert held(data_datasets.load(config).train).equal(held(first.train))
    write_image(labelled / "train" / "cat" / "0.png", (255, 255, 255))
    os.utime(labelled / "train" / "cat" / "0.png", (1, 1))
    changed = data_datasets.load(config)
    assert changed.fingerprint != first.fingerprint


def test_a_damaged_cache_is_named_and_decoded_again(
    labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = folder(labelled, tmp_path / "cache")
    first = data_datasets.load(config)
    for file in (tmp_path / "cache").iterdir():
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert data_datasets.load(config).fingerprint == first.fingerprint
    assert "its content changed on disk; decoding the images again" in caplog.text


def test_a_cache_that_cannot_be_written_costs_a_warning_only(
    labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    with caplog.at_level(logging.WARNING):
        splits = data_datasets.load(folder(labelled, tmp_path / "cache"))
    assert len(splits.train) == 27
    assert "can't keep the decoded images" in caplog.text


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere", "no such folder; give the folder of the images as data.root=DIR"),
        (
            "empty",
            "no images in this folder; data.root needs files that end in "
            ".jpg, .jpeg, .jpe, .jfif, .mpo, .png, .apng, .bmp, .gif, .webp, .avif, .avifs, "
            ".tif, .tiff, .ppm, .pgm, .pbm, .pnm",
        ),
    ],
)
def test_a_folder_without_images_has_its_sentence(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingError) as error:
        data_datasets.load(folder(tmp_path / name, tmp_path / "cache"))
    assert str(error.value) == f"{tmp_path / name}: {sentence}"
    assert error.value.exit_status == 66


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_corrupt_image_is_named_with_its_path(
    labelled: Path, tmp_path: Path, damage: str
) -> None:
    path = labelled / "train" / "dog" / "3.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:2000], "text": b"<html>", "empty": b""}[damage])
    with pytest.raises(DataError) as error:
        data_datasets.load(folder(labelled, tmp_path / "cache"))
    assert str(error.value).startswith(f"{path}: not a readable image (")
    assert str(error.value).endswith("remove this file, or give data.skip_unreadable=true")
    assert error.value.exit_status == 65


def test_a_test_class_that_training_lacks_is_the_probes_business_alone(
    labelled: Path, tmp_path: Path
) -> None:
    write_image(labelled / "test" / "fox" / "0.png", (0, 0, 0))
    splits = data_datasets.load(folder(labelled, tmp_path / "cache"))
    assert (len(splits.train), len(splits.test)) == (27, 0)
    assert splits.parts == "trains on train; leaves aside test (class 'fox' is not in training)"
    assert splits.fault == (
        f"{labelled / 'test'}: class 'fox' is not among the 3 classes of the training images; use "
        "the same classes in both"
    )
    with pytest.raises(DataError, match="class 'fox' is not among the 3 classes"):
        probe.labelled(splits, ProbeConfig())


def test_images_that_do_not_fit_into_memory_are_refused_before_decoding(tmp_path: Path) -> None:
    write_image(tmp_path / "set" / "a.png", (1, 2, 3))
    listing = image_folder.scan(tmp_path / "set", labelled=True)
    with pytest.raises(ConfigError, match=r"1 images of data\.size=1000000 need 3000 GB of memory"):
        image_folder.decode(listing, Recipe(1_000_000))


def test_a_download_that_fails_has_its_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(MissingError) as error:
        data_datasets.load(DataConfig(name="cifar10", root=str(tmp_path)))
    assert str(error.value) == (
        f"data.name=cifar10: not in data.root={tmp_path} and can't be downloaded (no network); "
        "put the unpacked archive there, or use data.name=folder with a folder of images"
    )


def test_cifar10_is_read_from_its_archive_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / datasets.CIFAR10.base_folder
    base.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
    batch = {"data": pixels.reshape(20, -1), "labels": [i % 10 for i in range(20)]}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (base / name).write_bytes(pickle.dumps(batch))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    splits = data_datasets.load(DataConfig(name="cifar10", root=str(tmp_path), validation=0.1))
    assert held(splits.test).equal(torch.from_numpy(pixels))
    assert splits.test.labels.tolist() == batch["labels"]
    assert (len(splits.train), len(splits.validation)) == (90, 10)
    assert splits.train.classes == tuple("abcdefghij")
    # Images of another size are resized by torchvision's filter for tensors.
    small = transforms.Resize([16, 16])(torch.from_numpy(pixels))
    filters: tuple[tuple[Literal["bicubic", "bilinear"], int], ...]
    filters = (("bicubic", 1), ("bilinear", 0))
    for resize, said in filters:
        caplog.clear()
        config = DataConfig(name="cifar10", root=str(tmp_path), size=16, resize=resize)
        found = held(data_datasets.load(config).test)
        assert (found.int() - small.int()).abs().max() <= 1
        assert caplog.text.count(f"to data.size=16 bilinearly, and data.resize={resize}") == said


def own_images(folder: Path) -> list[str]:
    """Write 200 images of the kinds that people have; return the names of the two bad ones."""
    random = np.random.default_rng(0)
    for number in range(200):
        mode = {1: "L", 2: "RGBA", 3: "CMYK"}.get(number, "RGB")
        shape = int(random.integers(20, 90)), int(random.integers(20, 90)), Image.getmodebands(mode)
        pixels = random.integers(0, 256, shape, dtype=np.uint8).squeeze()
        turned = Image.Exif()
        turned[0x0112] = 6 if number == 4 else 1
        path = folder / "ab"[number % 2] / f"{number:03}.{'png' if mode == 'RGBA' else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels, mode).save(path, exif=turned)
    half = folder / "a" / "100.jpg"
    half.write_bytes(half.read_bytes()[:200])
    (folder / "b" / "101.jpg").write_text("this is no picture")
    return [str(half), str(folder / "b" / "101.jpg")]


def test_unreadable_images_are_named_and_left_out_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = own_images(tmp_path / "own")
    where = {"name": "folder", "root": str(tmp_path / "own"), "size": 16, "validation": 0.0}
    strict = DataConfig(**where, cache=str(tmp_path / "cache"))  # type: ignore[arg-type]
    lenient = dataclasses.replace(strict, skip_unreadable=True)
    for _ in ("decoded", "from the cache"):
        with pytest.raises(DataError, match="2 of 200 images are not readable") as error:
            data_datasets.load(strict)
        assert all(name in str(error.value) for name in bad)
        caplog.clear()
        splits = data_datasets.load(lenient)
        (warning,) = caplog.messages
        assert warning.endswith("; they are left out")
        assert all(name in warning for name in bad)
        assert len(splits.train) == 198
        assert splits.train.labels.bincount().tolist() == [99, 99]
        assert splits.held.endswith("; 2 unreadable left out; 1 transparent, on white")
    whole = image_folder.scan(tmp_path / "own", labelled=True)
    good = [place.path for place in whole.all_places() if place.path not in bad]
    for row in (0, 2, 60, 197):  # row 1 is transparent
        with Image.open(good[row]) as image:
            square = ImageOps.fit(image.convert("RGB"), (16, 16), Image.Resampling.BICUBIC)
        found = splits.train.squares(torch.tensor(row)).permute(1, 2, 0)
        assert np.array_equal(found, np.asarray(square))


@pytest.mark.parametrize(("resize", "other"), [("bilinear", "bicubic"), ("bicubic", "bilinear")])
@pytest.mark.parametrize("memory_gb", [16.0, 0.0])
def test_squares_are_resized_by_the_filter_that_is_named(
    tmp_path: Path, resize: Literal["bilinear", "bicubic"], other: str, memory_gb: float
) -> None:
    """The oracle is the published evaluation: torchvision's Resize and CenterCrop of the file."""
    image = Image.effect_noise((120, 96), 80).convert("RGB")
    for kind in ("a", "b"):
        (tmp_path / "set/train" / kind).mkdir(parents=True)
        image.save(tmp_path / "set/train" / kind / "0.png")
    config = DataConfig(
        name="folder",
        root=str(tmp_path / "set"),
        size=32,
        resize=resize,
        validation=0,
        memory_gb=memory_gb,
        workers=1,
        cache=str(tmp_path / "cache"),
    )
    ours = data_datasets.load(config).train.squares(torch.arange(1))[0].double()

    def theirs(name: str) -> Tensor:
        mode = transforms.InterpolationMode(name)
        chain = transforms.Compose([transforms.Resize(32, mode), transforms.CenterCrop(32)])
        return transforms.functional.pil_to_tensor(chain(image)).double()

    named, unnamed = ((ours - theirs(name)).abs().mean() for name in (resize, other))
    assert float(named) < 1.5
    assert float(unnamed) > 2 * float(named)
