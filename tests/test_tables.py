"""Tables of the datasets library: the same run as on a folder of the same images."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets as library
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image

from moco_dist.config.recipe import DataConfig, ViewsConfig
from moco_dist.data import datasets, tables
from moco_dist.data.streamed_images import StreamedImages
from moco_dist.distributed import fingerprint
from moco_dist.doctor import images
from moco_dist.encoders.load import load_encoder
from moco_dist.errors import DataError, UserError
from moco_dist.report import encoder as report
from tests import data_hub, image_sets
from tests.faults.jobs import KILL, Job, metrics
from tests.faults.stops import slow_steps
from tests.test_streaming import RUN, on

CLASSES = [f"class_{number}" for number in range(3)]
FEATURES = {"image": library.Image(), "label": library.ClassLabel(names=CLASSES)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of many sizes."""
    return image_sets.write_folder(tmp_path_factory.mktemp("files") / "set", 60)


def rows(part: Path) -> dict[str, list[Any]]:
    """Return the images of a part in the order in which a folder has them, and their classes."""
    files = sorted(part.rglob("*.jpg"))
    cells = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    return {"image": cells, "label": [CLASSES.index(file.parent.name) for file in files]}


def table(columns: dict[str, list[Any]], **features: Any) -> library.Dataset:
    return library.Dataset.from_dict(columns, features=library.Features(FEATURES | features))


def parts(folder: Path) -> library.DatasetDict:
    return library.DatasetDict({p: table(rows(folder / p)) for p in ("train", "test")})


def saved(folder: Path, root: Path) -> str:
    parts(folder).save_to_disk(str(root), num_shards={"train": 3, "test": 1})
    return str(root)


def parquet(folder: Path, root: Path) -> str:
    root.mkdir()
    made = parts(folder)
    for number in range(2):
        made["train"].shard(2, number).to_parquet(str(root / f"train-{number:05}-of-00002.parquet"))
    made["test"].to_parquet(str(root / "validation-00000-of-00001.parquet"))
    return str(root)


def arrow(folder: Path, root: Path) -> str:
    saved(folder, root.with_name("saved_first"))
    for part in ("train", "test"):
        (root / part).mkdir(parents=True)
        for file in (root.with_name("saved_first") / part).glob("*.arrow"):
            shutil.copy(file, root / part)
    return str(root)


WAYS: list[Callable[[Path, Path], str]] = [saved, parquet, arrow]


def config(root: str | Path, cache: Path, **values: Any) -> DataConfig:
    given: dict[str, Any] = {"name": "huggingface", "size": 32, "workers": 1, "root": str(root)}
    return DataConfig(**given | {"cache": str(cache)} | values)


@pytest.mark.parametrize("way", WAYS)
def test_a_table_has_the_pixels_and_crops_of_the_folder_it_was_made_of(
    way: Callable[[Path, Path], str], folder: Path, tmp_path: Path
) -> None:
    root = way(folder, tmp_path / "made")
    held, streamed = (datasets.load(config(root, tmp_path, memory_gb=gb)) for gb in (1, 0))
    expected = datasets.load(config(folder, tmp_path, name="folder"))
    views = datasets.load(config(folder, tmp_path, name="folder", memory_gb=0)).train
    assert isinstance(expected.train, datasets.Images)
    assert isinstance(streamed.train, StreamedImages)
    assert isinstance(views, StreamedImages)
    assert (len(held.train), len(held.validation), len(held.test)) == (54, 6, 15)
    for part in ("train", "validation", "test"):
        theirs = getattr(expected, part)
        for splits in (held, streamed):
            ours = getattr(splits, part)
            assert ours.squares(torch.arange(len(ours))).equal(theirs.pixels)
            assert ours.labels.equal(theirs.labels)
            assert ours.classes == theirs.classes == tuple(CLASSES)
    samples = torch.arange(54)
    ours, theirs = (
        part.order_crops([ViewsConfig(size=24)], 3, 1, samples, (0, 1)).collect(torch.device("cpu"))
        for part in (streamed.train, views)
    )
    assert ours.equal(theirs)
    tests = "validation" if way is parquet else "test"
    assert held.parts == f"trains on split train; tests on split {tests}"
    streamed.train.pool.close()
    views.pool.close()


def test_a_streamed_run_is_that_of_the_folder_on_other_processes_and_resumed(
    folder: Path, tmp_path: Path
) -> None:
    """An epoch has 3 steps. Only the first process of each run writes the table's cache."""
    root, tables = Path(parquet(folder, tmp_path / "made")), "data.name=huggingface"
    straight = on(1, tmp_path / "folder", folder, 7)
    begun = on(2, tmp_path / "cut", root, 5, tables)
    resumed = on(1, tmp_path / "cut", root, 7, tables)
    assert resumed["first"] == 5
    assert begun["hashes"] | resumed["hashes"] == straight["hashes"]
    for name, value in straight["state"].items():
        assert (resumed["state"][name] - value).abs().max() <= 1e-10, name


def test_a_killed_run_goes_on_on_other_processes_and_a_changed_table_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    root = saved(folder, tmp_path / "made")
    run = [*RUN, f"data.cache={tmp_path}", "checkpoint.every_steps=2", "runtime.timeout_seconds=60"]
    ours = [*run, "data.name=huggingface", f"data.root={root}", "data.skip_unreadable=true"]
    with Job(tmp_path, *ours, processes=2, plant=partial(slow_steps, 0.1)) as job:
        job.until_step(5)
        job.send(KILL)
        job.wait(60)
    with Job(tmp_path, *ours, processes=1) as job:
        assert job.wait(60) == [0], job.text()
        assert "resumes" in job.text() or "resumed" in job.text()
    theirs = [*run, "data.name=folder", f"data.root={folder}"]
    with Job(tmp_path, *theirs, name="folder") as other:
        assert other.wait(60) == [0], other.text()
    found, expected = (
        {line["step"]: line["train/loss"] for line in metrics(each.run) if "train/loss" in line}
        for each in (job, other)
    )
    assert sorted(found) == list(range(1, 13))
    assert found == pytest.approx(expected, abs=1e-10)
    # A row less, in the middle: all rows behind it are other images.
    shutil.rmtree(root)
    kept = [number for number in range(60) if number != 20]
    anonymous = table(rows(folder / "train")).select(kept)
    made = library.DatasetDict({"train": anonymous, "test": parts(folder)["test"]})
    made.save_to_disk(root)
    job.log.unlink()
    with Job(tmp_path, *ours, "epochs=6") as job:
        assert job.wait(60) == [78], job.text()
        (said,) = job.errors()
    assert f"{job.run}: was trained on other images: of 60 files in {root}/train there are" in said
    assert said.endswith("put them back as they were, or give name=... for a new run")


def test_cells_are_read_like_files_of_any_kind(tmp_path: Path) -> None:
    """16 bits, transparency, an orientation and frames, by the rules for files."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("clear.png", Image.fromarray(pixels), {}),
        ("turned.jpg", Image.fromarray(pixels[..., :3]), {"exif": turned}),
        (
            "moving.gif",
            Image.fromarray(pixels[..., 0]),
            {"save_all": True, "append_images": [Image.fromarray(pixels[..., 1])]},
        ),
        ("gray.tif", Image.fromarray(pixels[..., 0]), {}),
    ]
    cells: list[Any] = []
    for name, image, settings in sorted(kinds):
        (tmp_path / "set").mkdir(exist_ok=True)
        image.save(tmp_path / "set" / name, **settings)
        cells.append({"bytes": (tmp_path / "set" / name).read_bytes(), "path": name})
    library.Dataset.from_dict(
        {"picture": cells}, library.Features(picture=library.Image())
    ).save_to_disk(str(tmp_path / "saved"))
    colours: dict[str, Any] = {"background": [9, 90, 200], "size": 24, "validation": 0.0}
    ours = datasets.load(config(tmp_path / "saved", tmp_path, **colours))
    theirs = datasets.load(config(tmp_path / "set", tmp_path, name="folder", **colours))
    assert isinstance(ours.train, datasets.Images)
    assert isinstance(theirs.train, datasets.Images)
    assert ours.train.pixels.equal(theirs.train.pixels)
    assert ours.train.transparent == theirs.train.transparent == 1
    assert ours.train.file(0) == f"{tmp_path}/saved/data-00000-of-00001.arrow: row 0 (clear.png)"
    deep = io.BytesIO()
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(deep, "PNG")
    cells[1:3] = [{"bytes": deep.getvalue(), "path": None}, None]
    library.Dataset.from_dict(
        {"picture": cells}, library.Features(picture=library.Image())
    ).save_to_disk(str(tmp_path / "bad"))
    with pytest.raises(DataError) as error:
        datasets.load(config(tmp_path / "bad", tmp_path))
    place = f"{tmp_path}/bad/data-00000-of-00001.arrow"
    assert f"{place}: row 1 (its pixels have more than 8 bits" in str(error.value)
    assert f"{place}: row 2 (its content is none of JPEG" in str(error.value)
    skipped = datasets.load(config(tmp_path / "bad", tmp_path, skip_unreadable=True, **colours))
    assert isinstance(skipped.train, datasets.Images)
    assert skipped.train.pixels.equal(theirs.train.pixels[[0, 3]])


def test_paths_in_a_table_are_files(folder: Path, tmp_path: Path) -> None:
    files = sorted(map(str, (folder / "train").rglob("*.jpg")))
    made = library.Dataset.from_dict(
        {"image": files, "label": [Path(file).parent.name for file in files]}
    )
    made.to_parquet(str(tmp_path / "names.parquet"))
    with pytest.raises(UserError, match="no column holds encoded images, of image, label; save"):
        datasets.load(config(tmp_path / "names.parquet", tmp_path))
    made = made.cast_column("image", library.Image())
    # The library keeps such a table in its cache; save_to_disk would take the images in.
    index = tables.images(
        made.map(lambda row: {"n": 1}, cache_file_name=str(tmp_path / "map.arrow")),
        config(tmp_path, tmp_path),
    )
    assert [place.path for place in index.all_places()] == files
    assert index.classes == tuple(CLASSES)


@pytest.mark.parametrize(
    ("columns", "classes", "labels"),
    [
        ({"label": [3, 10, 3, -1]}, ("3", "10"), [0, 1, 0, -1]),
        ({"category": ["b", "a", None, "b"]}, ("a", "b"), [1, 0, -1, 1]),
        ({"cls": [True, False, True, True]}, ("False", "True"), [1, 0, 1, 1]),
        ({"label": [5, 5, 5, 5]}, (), [-1] * 4),
        ({"weight": [1.5, 2.0, 1.0, 0.0]}, (), [-1] * 4),
    ],
)
def test_labels_are_numbers_or_names(
    tmp_path: Path, columns: dict[str, list[Any]], classes: tuple[str, ...], labels: list[int]
) -> None:
    """In a parquet file that pandas or pyarrow wrote, with bytes and no more."""
    cells = [image_sets.jpeg(image_sets.picture(n, 20, 16)) for n in range(4)]
    content = pyarrow.table({"content": cells, **columns})
    pyarrow.parquet.write_table(content, tmp_path / "a.parquet")
    found = datasets.load(config(tmp_path / "a.parquet", tmp_path, validation=0.0))
    assert found.train.classes == classes
    assert found.train.labels.tolist() == labels
    assert found.parts == ""


ON_THE_HUB = """
import sys, torch
from moco_dist.config.recipe import DataConfig
from moco_dist.data import datasets
from moco_dist.distributed import fingerprint
from moco_dist.errors import UserError
for name in sys.argv[2:]:
    try:
        for limit in (1, 0):
            config = DataConfig("huggingface", name, size=32, cache=sys.argv[1], memory_gb=limit)
            train = datasets.load(config).train
            print("found", fingerprint.of_tensors(train.squares(torch.arange(len(train)))))
    except UserError as error:
        print("error", error.exit_status, error)
"""


def test_a_name_on_the_hub_is_downloaded_once_and_read_without_a_network(
    folder: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "hub" / "someone" / "photos"
    photos.parent.mkdir(parents=True)
    parquet(folder, photos)
    (photos / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n"
        "    path: train-*\n- config_name: other\n  data_files: validation-*\n---\n"
    )
    expected = datasets.load(config(folder, tmp_path, name="folder")).train
    assert isinstance(expected, datasets.Images)
    found = f"found {fingerprint.of_tensors(expected.pixels)}"

    def read(*names: str, **environment: str) -> list[str]:
        own = {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "home/sets")}
        done = subprocess.run(
            [sys.executable, "-c", ON_THE_HUB, str(tmp_path), *names],
            env={**os.environ, **own, **environment},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    names = ["someone/photos:small", "someone/photos", "someone/photos:big", "someone/else"]
    with data_hub.serving(tmp_path / "hub") as address:
        lines = read(*names, HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert lines[:2] == [found, found]
    assert lines[2].startswith("error 78 data.root=someone/photos: Config name is missing. Please")
    assert lines[3].startswith("error 78 data.root=someone/photos:big: BuilderConfig 'big' not")
    for line in lines[2:4]:
        assert "'small', 'other'" in line
        assert line.endswith("; give one as data.root=someone/photos:CONFIG")
    assert lines[4].startswith("error 66 data.root=someone/else: neither a file or folder here nor")
    assert len(lines) == 5
    assert read(names[0]) == [found, found]


def test_what_is_unclear_or_missing_is_said_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    columns = rows(folder / "test")
    two = {"mask": library.Image(), "fine": library.ClassLabel(names=CLASSES)}
    both = columns | {"mask": columns["image"], "fine": columns["label"]}
    root = str(tmp_path / "both")
    library.DatasetDict(a=table(both, **two), b=table(both, **two)).save_to_disk(root)
    plain = library.Dataset.from_dict({"text": ["a", "b"]})
    plain.save_to_disk(str(tmp_path / "plain"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    a, named = {"split": "a"}, {"split": "a", "image_column": "image"}
    cases: list[tuple[str, dict[str, str], int, str]] = [
        (root, {}, 78, "no split is called train, of a, b; choose the one to train on by data.spl"),
        (root, {"split": "c"}, 78, f"data.split=c: no such split in data.root={root}, which has a"),
        (root, a, 78, "several columns hold images, image and mask; choose by data.image_column=i"),
        (root, {**a, "image_column": "x"}, 78, "data.image_column=x: no such column in data.root="),
        (
            root,
            {**a, "image_column": "label"},
            78,
            "this column of data.root=" + root + " does not",
        ),
        (root, {**named, "label_column": "mask"}, 78, "does not hold one whole number or name for"),
        (
            str(tmp_path / "plain"),
            {},
            78,
            "no column holds encoded images, of text; save them with",
        ),
        (
            str(tmp_path / "empty"),
            {},
            66,
            "has no parquet or arrow files, and was not saved by sav",
        ),
        (str(tmp_path / "gone"), {}, 66, "no such file or folder; give a folder saved by save_to_"),
        (str(tmp_path / "cut.parquet"), {}, 65, "the datasets library can't read it ("),
        ("nobody/nothing", {}, 69, "and the hub can't be reached (Couldn't reach 'nobody/nothing'"),
        ("nobody/nothing", {}, 69, "unset HF_HUB_OFFLINE, or download it on a machine with a net"),
    ]
    for place, values, status, sentence in cases:
        with pytest.raises(UserError) as error:
            datasets.load(config(place, tmp_path, **values))
        assert sentence in str(error.value)
        assert error.value.exit_status == status
        assert "\n" not in str(error.value)
    # ClassLabel has two columns, of which one has the usual name.
    found = datasets.load(config(root, tmp_path, **named))
    assert found.train.classes == tuple(CLASSES)


def test_a_missing_extra_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    """In a process whose search path has a package of that name that can't be imported."""
    (tmp_path / "datasets.py").write_text("raise ImportError(\"No module named 'datasets'\")\n")
    (tmp_path / "set").mkdir()
    command = [sys.executable, "-m", "moco_dist.pretrain", "pretrain/demo", f"output={tmp_path}"]
    command += ["data.name=huggingface", f"data.root={tmp_path / 'set'}", "runtime.device=cpu"]
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', Path.cwd())}"
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 66
    assert (
        "error: data.name=huggingface needs the datasets library (No module named 'datasets'); "
        "pip install 'moco_dist[huggingface]'"
    ) in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_doctor_probe_and_report_read_a_table(folder: Path, tmp_path: Path) -> None:
    root = saved(folder, tmp_path / "made")
    (first, *others), count = images.data(config(root, tmp_path), 3)
    assert count == 54
    assert first.fault == ""
    assert first.found.startswith("60 images, 15 for testing, 3 classes, 40-148 x 36-102 pixels")
    assert others[1].found == "trains on split train; tests on split test"
    (finding,), count = images.data(config("someone/else", tmp_path), 3)
    assert (finding.found, count) == (
        "huggingface: someone/else is read from the hub, or from the library's cache, at the start",
        0,
    )
    place = [f"data.root={root}", f"data.cache={tmp_path}", "data.name=huggingface"]
    with Job(tmp_path, *RUN, *place, "epochs=1") as job:
        assert job.wait(60) == [0], job.text()
    probe = [*place, "data.size=32", "data.workers=1", "views.size=24", "batch_size=16", "epochs=1"]
    probe += ["top_k=2", "runtime.device=cpu", f"encoder={job.run}"]
    with Job(tmp_path, *probe, module="probe", name="probe") as job:
        assert job.wait(60) == [0], job.text()
        assert "54 training, 6 validation and 15 test images, 3 classes" in " ".join(
            job.text().split()
        )
    part, some = report.held_out(config(root, tmp_path))
    assert (part, len(some)) == ("test", 15)
    assert load_encoder(tmp_path / "run")
