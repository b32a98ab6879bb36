"""A CSV file with the classes of the images of a folder."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_dist.config.recipe import DataConfig, PretrainConfig
from moco_dist.config.yaml_files import load as load_yaml
from moco_dist.data import datasets
from moco_dist.data.streamed_images import StreamedImages
from moco_dist.doctor import images
from moco_dist.errors import ConfigError, UserError
from tests import image_sets


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    return image_sets.write_folder(tmp_path / "labelled", 24, side=16)


def flattened(labelled: Path, root: Path) -> dict[str, str]:
    """Copy the images to ROOT/PART/NUMBER.jpg; return the class of each by that path."""
    classes = {}
    for file in sorted(labelled.rglob("*.jpg")):
        place = f"{file.relative_to(labelled).parts[0]}/{file.stem}.jpg"
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / place)
        classes[place] = file.parent.name
    return classes


def write(path: Path, rows: list[list[str]], **dialect: Any) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, **dialect).writerows(rows)
    return path


def load(root: Path, **values: Any) -> datasets.Splits:
    given: dict[str, Any] = {"name": "folder", "root": str(root), "size": 16, "workers": 1}
    return datasets.load(DataConfig(**given | {"cache": f"{root}-cache"} | values))


def by_content(part: datasets.AnyImages) -> dict[bytes, str]:
    """Return the class of each image by its pixels."""
    squares = part.squares(torch.arange(len(part))).flatten(1)
    texts = (part.classes[label] for label in part.labels.tolist())
    return {row.numpy().tobytes(): text for row, text in zip(squares, texts, strict=True)}


def paths(classes: dict[str, str]) -> list[list[str]]:
    return [["file", "label"], *map(list, classes.items())]


def no_header(classes: dict[str, str]) -> list[list[str]]:
    return [[f"./{file}", label] for file, label in classes.items()]


def other_order(classes: dict[str, str]) -> list[list[str]]:
    return [["n", "Class", "split", "Path"], *([".", c, "x", f] for f, c in classes.items())]


def windows(classes: dict[str, str]) -> list[list[str]]:
    return [["image", "breed"], *([f.replace("/", "\\"), c] for f, c in classes.items())]


@pytest.mark.parametrize("rows", [paths, no_header, other_order, windows])
@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_a_table_gives_the_classes_that_folders_would(
    labelled: Path,
    tmp_path: Path,
    rows: Callable[[dict[str, str]], list[list[str]]],
    memory_gb: float,
) -> None:
    classes = flattened(labelled, tmp_path / "flat")
    table = write(tmp_path / "labels.csv", rows(classes), delimiter=";;,,"[len(rows.__name__) % 4])
    ours = load(tmp_path / "flat", labels=str(table), validation=0.0, memory_gb=memory_gb)
    theirs = load(labelled, validation=0.0)
    for part in ("train", "test"):
        assert by_content(getattr(ours, part)) == by_content(getattr(theirs, part))
    assert ours.parts == "trains on train; tests on test"
    if isinstance(ours.train, StreamedImages):
        ours.train.pool.close()


def test_names_alone_are_enough_and_the_table_may_lie_in_the_folder(
    labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a competition: train/ with names without suffix in the table, test/ without labels."""
    classes = flattened(labelled, tmp_path / "flat")
    known = {Path(f).stem: c for f, c in classes.items() if f.startswith("train/")}
    for file in (tmp_path / "flat" / "test").iterdir():
        file.rename(file.with_name(f"t{file.name}"))
    known.pop("0003")
    rows = [["id", "breed"], *map(list, known.items()), ["9999", "class_0"]]
    table = write(tmp_path / "flat" / "train.csv", rows)
    splits = load(tmp_path / "flat", labels="train.csv", validation=0.25)
    assert len(splits.train) + len(splits.validation) == 24
    assert (splits.train.labels == -1).sum() == 1  # and no image without a class is held out
    assert (splits.validation.labels >= 0).all()
    assert splits.train.classes == ("class_0", "class_1", "class_2")
    assert "leaves aside test (no labels)" in splits.parts
    said = " ".join(caplog.messages)
    assert f"{table}: 1 of 24 images in {tmp_path}/flat/train have no label there, and no c" in said
    assert f"{table}: 1 of 24 rows name no image that is read; the first is 9999" in said
    config = DataConfig(
        "folder", f"{tmp_path}/flat", labels="train.csv", size=16, cache=f"{tmp_path}"
    )
    findings, count = images.data(config, 3)
    assert count == 22
    assert any("1 of 24 rows name no image" in finding.warning for finding in findings)


@pytest.mark.parametrize("column", ["id", "image_id", "Name"])
def test_a_running_number_is_no_file_of_that_number(
    labelled: Path, tmp_path: Path, column: str
) -> None:
    """Files with numbers for names, and rows that are numbered in another order."""
    classes = {Path(f).stem: c for f, c in flattened(labelled, tmp_path / "flat").items()}
    stems = [str(int(stem)) for stem in classes]
    for file in (tmp_path / "flat").rglob("*.jpg"):
        file.rename(file.with_name(f"{int(file.stem)}.jpg"))
    order = [stems[(7 * number) % len(stems)] for number in range(len(stems))]
    names = {str(int(stem)): c for stem, c in classes.items()}
    rows = [[str(n), f"some/{stem}.jpg", names[stem]] for n, stem in enumerate(order)]
    table = str(write(tmp_path / "l.csv", [[column, "filename", "label"], *rows]))
    with pytest.raises(ConfigError, match=r"its row \d+ is about \d+ by one column and about \d+"):
        load(tmp_path / "flat", labels=table)
    plain = [[file.removeprefix("some/"), label] for _, file, label in rows]
    expected = load(tmp_path / "flat", labels=str(write(tmp_path / "m.csv", plain)), validation=0.0)
    rows = [[str(n), file, label] for n, (file, label) in enumerate(plain)]
    write(tmp_path / "l.csv", [[column, "filename", "label"], *rows])
    found = load(tmp_path / "flat", labels=table, image_column="filename", validation=0.0)
    assert by_content(found.train) == by_content(expected.train)
    # A second column that agrees, or says something else, is no reason to refuse.
    for second in ({s: f"/there/{s}.png" for s in stems}, dict.fromkeys(stems, "a dog")):
        same = [[stem, second[stem], label] for stem, label in names.items()]
        write(tmp_path / "l.csv", [[column, "path", "label"], *same])
        found = load(tmp_path / "flat", labels=table, validation=0.0)
        assert by_content(found.train) == by_content(expected.train)


def test_the_column_of_the_labels_is_named_where_several_could_be_it(
    labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classes = flattened(labelled, tmp_path / "flat")
    rows = [[f, "ab"[c == "class_0"], c] for f, c in classes.items()]
    table = str(write(tmp_path / "l.csv", [["file", "category", "Label"], *rows]))
    said = f"{table}: the labels are those of the column category, not of Label; data.label_column"
    assert load(tmp_path / "flat", labels=table).train.classes == ("a", "b")
    assert sum(message.startswith(said) for message in caplog.messages) == 1
    caplog.clear()
    named = load(tmp_path / "flat", labels=table, label_column="Label")
    assert named.train.classes == ("class_0", "class_1", "class_2")
    assert not caplog.messages


def test_numbers_are_classes_in_their_order(labelled: Path, tmp_path: Path) -> None:
    files = [str(f.relative_to(labelled)) for f in sorted(labelled.rglob("train/*/*.jpg"))]
    rows = [[file, str(10 - number % 3)] for number, file in enumerate(files)]
    splits = load(
        labelled, labels=str(write(tmp_path / "l.tsv", rows, delimiter="\t")), validation=0.0
    )
    assert splits.train.classes == ("8", "9", "10")
    assert splits.train.labels.tolist() == [2 - number % 3 for number in range(24)]


def test_what_is_wrong_with_a_table_is_said_in_one_sentence(labelled: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    cases: list[tuple[bytes, dict[str, str], int, str]] = [
        (b"", {}, 65, "has no rows; give a file and a label in each"),
        (
            b"file,label\nx.jpg,a\n",
            {},
            65,
            "none of its 1 rows (the first names x.jpg) is about one",
        ),
        (
            b"0001.jpg,a\n0001.jpg,b\n",
            {},
            65,
            "line 2 gives 0001.jpg the label 'b', and another li",
        ),
        (b"file,label\n0001.jpg\n", {}, 65, "line 2 has 1 column and needs 2; give a file"),
        (
            b"file,a,b\n0001.jpg,1,2\n",
            {},
            78,
            "which of its columns file, a, b is the label's is n",
        ),
        (b"file,a\n", {"label_column": "c"}, 78, "data.label_column=c: no such column in"),
        (b"\xff\xfe0", {}, 65, "can't be read ('utf-8' codec can't decode"),
        (b'"0001.jpg,a', {}, 65, "can't be read (unexpected end of data); save it as CSV in UTF-8"),
        (
            b"file,label\n0000,a\n0001,b\n",
            {},
            65,
            "its row 0000 is about two images, train/class_0/0000",
        ),
    ]
    (labelled / "train/x").mkdir()
    shutil.copy(labelled / "train/class_0/0000.jpg", labelled / "train/x")
    for content, values, status, sentence in cases:
        table.write_bytes(content)
        with pytest.raises(UserError) as error:
            load(labelled, labels=str(table), **values)
        assert sentence in str(error.value)
        assert str(table) in str(error.value)
        assert error.value.exit_status == status
    table.unlink()
    with pytest.raises(UserError, match=r"no such file, here or in .*; give a CSV file") as error:
        load(labelled, labels=str(table))
    assert error.value.exit_status == 66
    for settings, sentence in (
        (["data.labels=folder"], "data.labels=folder is unknown; use folders, none, or a FILE.csv"),
        (["data.name=shards", "data.labels=a.csv"], "is a table for data.name=folder, and data.na"),
    ):
        with pytest.raises(ConfigError) as refused:
            load_yaml(PretrainConfig, settings)
        assert sentence in str(refused.value)


def test_a_streamed_run_notices_that_labels_changed(labelled: Path, tmp_path: Path) -> None:
    classes = flattened(labelled, tmp_path / "flat")
    found = []
    for label in ("class_0", "class_1"):
        rows = paths({**classes, "train/0000.jpg": label})
        table = write(tmp_path / "labels.csv", rows)
        splits = load(tmp_path / "flat", labels=str(table), memory_gb=0.0)
        found.append(splits.fingerprint)
    assert found[0] != found[1]


def test_the_banner_says_where_the_labels_come_from() -> None:
    assert DataConfig(name="folder", labels="a b.csv").described == "folder with labels of a b.csv"
    assert DataConfig(name="folder").described == "folder"
