"""Arrays of images in .npz and .npy files: the same set as a folder of PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from moco_dist.config.recipe import DataConfig, ViewsConfig
from moco_dist.data import datasets
from moco_dist.data.streamed_images import StreamedImages
from moco_dist.doctor import images
from moco_dist.errors import UserError
from tests.test_streaming import build, on

Pixels = NDArray[np.uint8]


def drawn(count: int, *shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def as_folder(root: Path, **parts: Pixels) -> Path:
    """Write ROOT/PART/CLASS/NUMBER.png, in the order of the array within each of two classes."""
    for part, pixels in parts.items():
        for number, each in enumerate(pixels):
            file = root / part / f"{2 * number // len(pixels)}" / f"{number:04}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(each).save(file)
    return root


def labels(count: int) -> NDArray[np.int64]:
    return np.arange(count) * 2 // count


def config(root: Path, cache: Path, **values: Any) -> DataConfig:
    given: dict[str, Any] = {"name": "arrays", "size": 16, "workers": 1, "root": str(root)}
    return DataConfig(**given | {"cache": str(cache)} | values)


def keras(root: Path, train: Pixels, test: Pixels) -> Path:
    arrays: dict[str, Any] = {"x_train": train, "y_train": labels(len(train)).astype(np.uint8)}
    arrays |= {"x_test": test, "y_test": labels(len(test))}
    np.savez(root.with_suffix(".npz"), **arrays)
    return root.with_suffix(".npz")


def medmnist(root: Path, train: Pixels, test: Pixels) -> Path:
    """With three parts, and labels as a column."""
    arrays: dict[str, Any] = {"train_images": train, "train_labels": labels(len(train))[:, None]}
    arrays |= {"val_images": test[:2], "val_labels": labels(2)[:, None]}
    arrays |= {"test_images": test, "test_labels": labels(len(test))[:, None]}
    np.savez_compressed(root.with_suffix(".npz"), **arrays)
    return root.with_suffix(".npz")


def files(root: Path, train: Pixels, test: Pixels) -> Path:
    root.mkdir()
    for name, array in (("X_train", train), ("X_test", test)):
        np.save(root / f"{name}.npy", array)
        np.save(root / f"{name.replace('X', 'y')}.npy", np.array(["no", "yes"])[labels(len(array))])
    return root


def channels_first(root: Path, train: Pixels, test: Pixels) -> Path:
    if train.ndim == 3:
        return files(root, train[:, None], test[:, None])
    return files(root, *(np.asfortranarray(x.transpose(0, 3, 1, 2)) for x in (train, test)))


@pytest.mark.parametrize("way", [keras, medmnist, files, channels_first])
@pytest.mark.parametrize("shape", [(20, 24, 3), (18, 16)])
def test_arrays_have_the_pixels_and_crops_of_a_folder_of_png_files(
    tmp_path: Path, way: Any, shape: tuple[int, ...]
) -> None:
    train, test = drawn(40, *shape), drawn(8, *shape, seed=1)
    root = way(tmp_path / "made", train, test)
    as_folder(tmp_path / "png", train=train, test=test)
    held, streamed = (datasets.load(config(root, tmp_path, memory_gb=gb)) for gb in (1, 0))
    expected, from_disk = (
        datasets.load(config(tmp_path / "png", tmp_path, name="folder", memory_gb=gb))
        for gb in (1, 0)
    )
    assert isinstance(streamed.train, StreamedImages)
    assert isinstance(from_disk.train, StreamedImages)
    for part in ("train", "validation", "test"):
        theirs = getattr(expected, part)
        for splits in (held, streamed):
            ours = getattr(splits, part)
            assert ours.squares(torch.arange(len(ours))).equal(theirs.pixels)
            assert ours.labels.equal(theirs.labels)
    assert held.train.classes == (("no", "yes") if root.is_dir() else ("0", "1"))
    samples, view = torch.arange(36), ViewsConfig(size=12)
    ours, theirs = (
        part.order_crops([view], 3, 1, samples, (0, 1)).collect(torch.device("cpu"))
        for part in (streamed.train, from_disk.train)
    )
    assert ours.equal(theirs)
    mapped = streamed.train.catalogue.all_places()[0].path
    # What can be read where it lies is not written again.
    copied = way in (keras, medmnist) or (way is channels_first and len(shape) == 3)
    assert mapped.startswith(str(tmp_path / "arrays_" if copied else root))
    streamed.train.pool.close()
    from_disk.train.pool.close()


def test_a_streamed_run_on_arrays_is_that_of_the_folder_on_two_processes_and_resumed(
    tmp_path: Path,
) -> None:
    pixels = drawn(60, 30, 40, 3)
    root, name = files(tmp_path / "made", pixels, pixels[:8]), "data.name=arrays"
    straight = on(1, tmp_path / "folder", as_folder(tmp_path / "png", train=pixels), 5)
    begun = on(2, tmp_path / "cut", root, 2, name)
    resumed = on(1, tmp_path / "cut", root, 5, name)
    assert begun["hashes"] | resumed["hashes"] == straight["hashes"]
    # Of the same sizes, and of another shape.
    np.save(root / "X_train.npy", pixels.reshape(60, 40, 30, 3))
    with pytest.raises(UserError, match=r"was trained on other images: of 60 .* other shapes; put"):
        build(tmp_path / "cut", root, name)


def test_one_file_without_labels_is_trained_on_and_refused_by_a_probe(tmp_path: Path) -> None:
    np.save(tmp_path / "all.npy", drawn(20, 16, 16))
    splits = datasets.load(config(tmp_path / "all.npy", tmp_path, validation=0.0))
    assert isinstance(splits.train, datasets.Images)
    assert (len(splits.train), splits.train.classes) == (20, ())
    assert splits.train.file(3) == f"{tmp_path}/all.npy: row 3"
    with pytest.raises(UserError, match=r"has no labels, .* name them by data.label_column"):
        datasets.require_labels(splits, config(tmp_path / "all.npy", tmp_path))
    (first, *_), count = images.data(config(tmp_path / "all.npy", tmp_path), 3)
    assert (first.fault, count) == ("", 18)
    assert first.found.startswith("20 images, no classes, 16-16 x 16-16 pixels in 20 sampled")


def test_what_is_wrong_with_arrays_is_said_in_one_sentence(tmp_path: Path) -> None:
    good, cut = drawn(8, 16, 16, 3), np.float32(0.5) * np.ones((8, 16, 16, 3), np.float32)
    cases: list[tuple[dict[str, Any], dict[str, str], int, str]] = [
        ({"x_train": cut}, {}, 65, "x_train is float32 of shape (8, 16, 16, 3); save uint8 from 0"),
        (
            {"images": good[:, 0, 0]},
            {},
            65,
            "images is uint8 of shape (8, 3); images need the shape",
        ),
        ({"x": drawn(8, 16, 16, 4)}, {}, 65, "shape (8, 16, 16, 4); images need the shape (N, he"),
        ({"x": good[:0]}, {}, 65, "x is uint8 of shape (0, 16, 16, 3); images need"),
        (
            {"x": good, "y": np.zeros(7)},
            {},
            65,
            "y is float64 of shape (7,); labels need one whole",
        ),
        ({"x": good, "y": np.eye(8, dtype=int)}, {}, 65, "y is int64 of shape (8, 8); labels need"),
        (
            {"x": good, "y": np.array([None] * 8)},
            {},
            65,
            "y can't be read (Object arrays cannot be",
        ),
        (
            {"arr_0": good},
            {},
            78,
            "which of its arrays arr_0 are the images for training is not cl",
        ),
        (
            {"x": good, "data": good},
            {},
            78,
            "x and data are both the images for train, by their na",
        ),
        (
            {"x": good},
            {"label_column": "z"},
            78,
            "data.label_column=z: no such array in data.root=",
        ),
    ]
    for arrays, values, status, sentence in cases:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(UserError) as error:
            datasets.load(config(tmp_path / "a.npz", tmp_path / "cache", **values))
        assert sentence in str(error.value)
        assert error.value.exit_status == status
    np.savez(tmp_path / "a.npz", arr_0=good, arr_1=labels(8))
    named = {"image_column": "arr_0", "label_column": "arr_1"}
    found = datasets.load(config(tmp_path / "a.npz", tmp_path / "cache", validation=0.0, **named))
    assert found.train.labels.tolist() == labels(8).tolist()
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[:500])
    (tmp_path / "empty").mkdir()
    for root, status, sentence in (
        ("a.npz", 65, "this file can't be read ("),
        ("empty", 66, "no arrays there; give an .npz file, a folder of .npy files, or one .npy"),
        ("gone.npz", 66, "no arrays there; give"),
    ):
        with pytest.raises(UserError) as error:
            datasets.load(config(tmp_path / root, tmp_path / "cache"))
        assert sentence in str(error.value)
        assert error.value.exit_status == status
