"""The sets of the recipes, in the layouts as they are published, are read as the headers say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from tests.image_sets import jpeg, picture
from tests.test_launch import ROOT, python

CLASSES = [f"n{number:08d}" for number in range(4)]
SIDES = {"tiny_imagenet": (64, 64), "imagenet100": (280, 260), "imagenette": (213, 160)}


def write(name: str, root: Path, each: int = 8) -> Path:
    """Write images of the set's size in its layout; return the folder that holds it."""
    width, height = SIDES[name]
    tiny, notes = name == "tiny_imagenet", list[str]()
    for part in ("train", "val", "test") if tiny else ("train", "val"):
        for number in range(each * len(CLASSES)):
            label = CLASSES[number % len(CLASSES)]
            folder = root / part / label
            if tiny:
                folder = root / part / (f"{label}/images" if part == "train" else "images")
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{part}_{number}.JPEG"
            file.write_bytes(jpeg(picture(number, width, height)))
            notes += [f"{file.name}\t{label}\t0\t0\t62\t62\n"] if part == "val" else []
    if tiny:
        (root / "val/val_annotations.txt").write_text("".join(notes))
    return root


def arranged(name: str, **places: Path) -> None:
    """Run the command in the header of a recipe, with its words for places replaced."""
    text = (ROOT / f"configs/pretrain/{name}.yaml").read_text()
    (command,) = re.findall(r"^#   ((?:cd DIR|for ).+)$", text, re.MULTILINE)
    for word, place in places.items():
        command = command.replace(word, str(place))
    subprocess.run(["bash", "-euc", command], cwd=places["DIR"].parent, check=True)


def splits(name: str, root: Path) -> datasets.Splits:
    config = load(PretrainConfig, [f"pretrain/{name}", f"data.root={root}"]).data
    return datasets.load(config, 3)


def test_tiny_imagenet_trains_as_published_and_is_tested_on_once_arranged(tmp_path: Path) -> None:
    root = write("tiny_imagenet", tmp_path / "tiny-imagenet-200")
    before = splits("tiny_imagenet", root)
    assert (before.train.classes, len(before.test)) == (tuple(CLASSES), 0)
    arranged("tiny_imagenet", DIR=root)
    after = splits("tiny_imagenet", root)
    assert (after.train.classes, len(after.test)) == (tuple(CLASSES), 32)
    assert len(after.train) == len(before.train)


def test_imagenet100_is_linked_from_imagenet(tmp_path: Path) -> None:
    write("imagenet100", tmp_path / "imagenet", each=3)
    (tmp_path / "imagenet100.txt").write_text("\n".join(CLASSES[:3]) + "\n")
    arranged("imagenet100", DIR=tmp_path / "hundred", IMAGENET=tmp_path / "imagenet")
    found = splits("imagenet100", tmp_path / "hundred")
    assert found.train.classes == tuple(CLASSES[:3])
    assert len(found.test) == 9


@pytest.mark.slow
@pytest.mark.parametrize("name", SIDES)
def test_a_recipe_trains_and_is_probed_on_images_of_its_layout(name: str, tmp_path: Path) -> None:
    root = write(name, tmp_path / "set")
    if name == "tiny_imagenet":
        arranged(name, DIR=root)
    place = [f"data.root={root}", f"output={tmp_path}", f"data.cache={tmp_path / 'cache'}"]
    place += ["runtime.device=cpu", "batch_size=8", "stop_at_step=2", "tracking.wandb=disabled"]
    small = ["encoder.width=8", "bn_groups=2", "moco.queue_size=32", "data.validation=0.25"]
    for job, more in (
        ("pretrain", small),
        ("probe", [f"encoder={tmp_path / name}", "top_k=2", "data.validation=0.25"]),
    ):
        done = python(job, f"{job}/{name}", *place, *more)
        assert done.returncode == 0, done.stderr
        assert "after step 2" in done.stdout or "2/2" in done.stdout
