"""What a run says of files that it doesn't use: test images without labels, skipped, doubled."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets as torchvision_datasets

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import DataConfig, PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.doctor import images as doctor
from moco_dist.encoders.load import find
from moco_dist.errors import DataError
from moco_dist.pretrain import run as pretrain_run
from moco_dist.probe import run as probe_run
from moco_dist.probe.run import find_overlaps
from moco_dist.report.encoder import held_out
from tests import probes
from tests.image_sets import write_tars
from tests.probes import pretrained
from tests.test_folder_layouts import config, write

__all__ = ["pretrained"]

MODES = {
    "cached": ["data.name=folder"],
    "augmented": ["data.name=folder", "augment=true"],
    "fine-tuned": ["data.name=folder", "protocol=finetune", "optim.lr=0.1"],
    "streamed": ["data.name=folder", "data.memory_gb=0", "data.workers=1"],
    "shards": ["data.name=shards"],
}


@pytest.mark.parametrize("mode", MODES)
def test_a_probe_ends_well_next_to_test_images_without_labels(
    tmp_path: Path, pretrained: Path, mode: str
) -> None:
    root = write(tmp_path / "set", {"train/a .png": 40, "train/b .png": 40, "test .png": 6})
    if mode == "shards":
        write_tars(root / "train", tmp_path / "tars" / "train", 40)
        write_tars(root / "test", tmp_path / "tars" / "Test", 6, labels="txt")
        root = tmp_path / "tars"
    arguments = [*probes.PROBE, *MODES[mode], f"data.root={root}", f"data.cache={tmp_path / 'c'}"]
    arguments += [f"output={tmp_path}", "name=probe", "top_k=2", f"encoder={pretrained}"]
    probe_run.run(load(ProbeConfig, arguments))
    results = json.loads((tmp_path / "probe" / "results.json").read_text())
    assert set(results["majority_top1"]) == {"validation"}
    assert results["train_images"] == 72


def test_a_probe_warns_of_another_background(
    tmp_path: Path, pretrained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = find(pretrained)
    for background, warnings in (([255, 255, 255], 0), ([0, 0, 0], 1)):
        given = load(ProbeConfig, [*probes.PROBE, f"data.background={background}"])
        caplog.clear()
        probe_run.warn_of_views(given, source)
        assert len([said for said in caplog.messages if "data.background is" in said]) == warnings
    assert caplog.messages[-1] == (
        "data.background is [0, 0, 0] here but was [255, 255, 255] in pretraining; use the same"
    )


def test_all_skipped_files_are_listed_in_the_run_and_in_no_other(tmp_path: Path) -> None:
    root = write(tmp_path / "set", {"a .png": 60, "b .png": 60})
    bad = [root / "a" / f"{number}.png" for number in range(7, 60)]
    for path in bad:
        path.write_bytes(b"no image")
    arguments = [*probes.PRETRAIN, f"output={tmp_path}", "name=run", "data.name=folder"]
    arguments += [f"data.root={root}", f"data.cache={tmp_path / 'c'}", "stop_at_step=1"]
    pretrain_run.run(load(PretrainConfig, [*arguments, "data.skip_unreadable=true"]))
    listed = json.loads((tmp_path / "run" / "set_aside.json").read_text())["train"]
    assert [entry["file"] for entry in listed] == sorted(
        str(path.relative_to(root)) for path in bad
    )
    assert {entry["reason"][:27] for entry in listed} == {"its content is none of JPEG"}
    for path in bad:
        path.unlink()
    shutil.rmtree(tmp_path / "run")
    pretrain_run.run(load(PretrainConfig, [*arguments, "data.skip_unreadable=true"]))
    assert not (tmp_path / "run" / "set_aside.json").exists()


def test_a_class_whose_images_all_are_skipped_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "set", {"train/a .png": 3, "train/b .png": 2, "test/b .png": 1})
    given = DataConfig(**{**vars(config(root, tmp_path / "cache")), "skip_unreadable": True})
    (root / "train" / "b" / "0.png").write_bytes(b"no image")
    assert len(datasets.load(given).train) == 4
    (root / "train" / "b" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError) as error:
        datasets.load(given)
    assert str(error.value) == (
        f"{root / 'train'}: class 'b' has no readable image; replace its files, or move its folder "
        "away"
    )


def test_doubled_images_are_named_by_their_files(tmp_path: Path) -> None:
    root = write(tmp_path / "set", {"train/a .png": 4, "train/b .png": 4, "test/b .png": 3})
    shutil.copy(root / "train" / "a" / "2.png", root / "test" / "b" / "1.png")
    loaded = datasets.load(config(root, tmp_path / "cache"))
    found = {each.part: each for each in find_overlaps(loaded)}
    both = (str(root / "test" / "b" / "1.png"), str(root / "train" / "a" / "2.png"))
    assert found["test"].files == [both]
    assert (
        found["test"]
        .sentence()
        .startswith(
            f"1 of 3 test images are also training images, to the last pixel (test {both[0]} = "
            f"training {both[1]}), which inflates test accuracy"
        )
    )


def test_a_report_draws_the_labelled_test_images(tmp_path: Path) -> None:
    root = write(tmp_path / "set", {"Train/a .png": 4, "Train/b .png": 4, "Valid/b .png": 3})
    part, images = held_out(config(root, tmp_path / "cache"))
    assert (part, images.labels.tolist()) == ("test", [1, 1, 1])
    part, images = held_out(config(root / "Train", tmp_path / "cache"))
    assert (part, len(images)) == ("training", 8)


def test_the_folder_of_cifar10_itself_is_data_root_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / torchvision_datasets.CIFAR10.base_folder
    base.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8)
    batch = {"data": pixels, "labels": [0, 1, 0, 1]}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (base / name).write_bytes(pickle.dumps(batch))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": ["a", "b"]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    loaded = [
        datasets.load(DataConfig(name="cifar10", root=str(root))) for root in (tmp_path, base)
    ]
    assert loaded[0].fingerprint == loaded[1].fingerprint
    for root in (tmp_path, base):
        ((finding,), _) = doctor.data(DataConfig(name="cifar10", root=str(root)), 3)
        assert finding.found == f"cifar10: {base} is there"
    ((finding,), _) = doctor.data(DataConfig(name="cifar10", root=str(tmp_path / "new")), 3)
    assert finding.found == f"cifar10: {tmp_path / 'new' / base.name} will be downloaded"


def test_shards_follow_the_rules_of_folders(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tree = {"a .png": 3, "b .png": 3, "other/a .png": 1, "other/fox .png": 1, "third/b .png": 1}
    root = write(tmp_path / "set", tree)
    tars = tmp_path / "tars" / "all"
    tars.mkdir(parents=True)
    pack(tars / "TRAIN-0.tar", [root / "a", root / "b"])
    pack(tars / "Val-0.tar", [root / "third" / "b"])
    pack(tars / "test-0.tar", [root / "other" / "a", root / "other" / "fox"])
    given = DataConfig(**{**vars(config(tars.parent, tmp_path / "cache")), "name": "shards"})
    with caplog.at_level(logging.WARNING):
        loaded = datasets.load(given)
    assert (len(loaded.train), len(loaded.test)) == (6, 0)
    assert loaded.parts == (
        "trains on 1 tar from all/TRAIN-0.tar; leaves aside 1 tar from all/test-0.tar (class "
        "'fox' is not in training), 1 tar from all/Val-0.tar (not needed)"
    )
    with pytest.raises(DataError, match="class 'fox' is not among the 2 classes"):
        probe_run.labelled(loaded, ProbeConfig(top_k=2))
    (tars / "test-0.tar").unlink()
    loaded = datasets.load(given)
    assert loaded.test.labels.tolist() == [1]
    findings, images = doctor.data(given, 3)
    assert images == 6
    said = {finding.about: finding.found for finding in findings}
    assert (
        said["parts"]
        == loaded.parts
        == ("trains on 1 tar from all/TRAIN-0.tar; tests on 1 tar from all/Val-0.tar")
    )


def pack(path: Path, folders: list[Path]) -> None:
    """Write a tar of folders, each with its name, by the system's tar."""
    command = ["tar", "-cf", str(path)]
    for folder in folders:
        command += ["-C", str(folder.parent), folder.name]
    subprocess.run(command, check=True)
