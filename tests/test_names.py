"""Names in any script, on any console, in any locale: escaped where need be, never an error."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from moco_dist import notebook
from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.errors import shown
from moco_dist.report import figures, pictures
from moco_dist.report.figures import Chart, Series
from moco_dist.report.pictures import Tile
from moco_dist.tracking import fonts, media
from tests.test_launch import TINY, launch, python

# A name of each kind: bytes that are no UTF-8, Latin, Cyrillic, Greek, CJK.
BYTES = b"caf\xe9"
CLASSES = [BYTES, "größe".encode(), "кот".encode(), "δέντρο".encode(), "你好".encode()]
SMALL = [*TINY, "epochs=1", "bn_groups=2", "batch_size=8", "knn.k=3", "runtime.device=cpu"]
PROBE = ["epochs=1", "batch_size=8", "top_k=2", "data.size=16", "views.size=16", "knn.k=3"]
ASCII = {"PYTHONIOENCODING": "ascii:strict"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for part in ("train", "test"):
        for number, name in enumerate(CLASSES):
            place = folder / part / os.fsdecode(name)
            place.mkdir(parents=True)
            for file in range(6):
                colour = 40 * number, 40 * file, 9
                Image.new("RGB", (16, 16), colour).save(place / os.fsdecode(b"%d\xff.png" % file))
    return folder


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_shows_what_it_can_and_escapes_the_rest(
    encoding: str, images: Path, tmp_path: Path
) -> None:
    arguments = [*SMALL, f"output={tmp_path}", "name=größe_кот", "data.name=folder"]
    arguments += [f"data.root={images}", f"data.cache={tmp_path}", "stop_at_step=1"]
    command = ["env", f"PYTHONIOENCODING={encoding}:strict", "python", "-m", "moco_dist.pretrain"]
    done = subprocess.run([*command, *arguments], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    german = {"ascii": "gr\\xf6\\xdfe"}.get(encoding, "größe").encode(encoding)
    assert german + b"_\\u043a\\u043e\\u0442" in done.stdout


def test_names_of_any_bytes_pass_through_probe_report_and_tracking(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = tmp_path / os.fsdecode(BYTES)
    strange.symlink_to(images)
    data = ["data.name=folder", f"data.root={strange}", f"data.cache={tmp_path}"]
    online = [f"output={tmp_path}", "tracking.wandb=offline"]
    run = notebook.run_pretrain(load(PretrainConfig, [*SMALL, *data, *online]))
    assert "W&B" not in caplog.text
    assert list((run / "wandb").glob("offline-run-*"))
    assert load(PretrainConfig, [str(run / "config.yaml")]).data.root == str(strange)
    output = f"output={tmp_path / os.fsdecode(b'runs ' + BYTES)}"
    probe = load(ProbeConfig, [*PROBE, *data, f"encoder={run}", "runtime.device=cpu", output])
    found = notebook.run_probe(probe)
    assert sorted(found["classes"]) == sorted(map(os.fsdecode, CLASSES))
    runs = [str(run), str(Path(probe.output) / probe.run_name())]
    done = python("report", *runs, "--output", str(tmp_path / "page"), **ASCII)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    for name in (r"caf\udce9", "größe", "кот", "δέντρο", "你好"):
        assert name in page


def test_a_locale_of_one_byte_a_letter_changes_no_file(images: Path, tmp_path: Path) -> None:
    """With the locale de_DE.ISO-8859-1, made here, whose encoding Python takes for files."""
    made = ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(tmp_path / "de_DE.ISO-8859-1")]
    subprocess.run(made, check=True)
    latin = {"LOCPATH": str(tmp_path), "LC_ALL": "de_DE.ISO-8859-1"}
    data = ["data.name=folder", f"data.root={images}", f"data.cache={tmp_path}"]
    data += [f"output={tmp_path}", "runtime.device=cpu"]
    told = launch("python", "-c", "import locale; print(locale.getencoding())", **latin)
    assert told.stdout.strip() == "ISO-8859-1"
    run = notebook.run_pretrain(load(PretrainConfig, [*SMALL, *data, "name=run"]))
    done = python("probe", *PROBE, *data, f"encoder={run}", **latin)
    assert done.returncode == 0, done.stderr
    table = next((tmp_path / "run-probe" / "media").rglob("confusion.csv"))
    # That locale takes each byte of a name for a letter.
    names = sorted(name.decode("latin-1") for name in CLASSES)
    with table.open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file))[1:] == names


def test_a_confusion_table_has_the_names_of_its_classes(tmp_path: Path) -> None:
    names = ['a "good" one', "comma, and\nline", "größe", "猫"]
    media.Album(tmp_path).confusion(5, torch.arange(16).view(4, 4), names)
    with (tmp_path / "step_00000005" / "confusion.csv").open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["", *names]
    assert rows == [[name, *map(str, range(4 * i, 4 * i + 4))] for i, name in enumerate(names)]


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Only the fonts of an empty folder are installed, and of course that of matplotlib."""
    monkeypatch.setattr(fonts, "FOLDERS", (str(tmp_path),))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "own"))
    for cached in (fonts._installed, fonts._font):
        cached.cache_clear()
    yield tmp_path
    for cached in (fonts._installed, fonts._font):
        cached.cache_clear()


NAMES = ["größe", "кот", "δέντρο", "你好", "caf\udce9", "好"]


def test_names_that_no_font_has_are_numbered_and_a_note_says_so(no_fonts: Path) -> None:
    found, note = fonts.drawable(NAMES)
    texts = [each.text for each in found]
    assert texts == ["größe", "кот", "δέντρο", "#4", r"caf\udce9", "#6"]
    assert {each.font for each in found} == {fonts.plain()}
    assert "no font here" in note
    assert fonts.drawable(NAMES[:3])[1] == ""
    (no_fonts / "broken.ttf").write_bytes(b"no font")
    fonts._installed.cache_clear()
    assert fonts.drawable(["你"])[0][0].text == "#1"


def font_with(letters: str, file: Path) -> None:
    """Write a font in which each of the letters is a square."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [".notdef", *(f"u{ord(letter):04X}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): n for c, n in zip(letters, names[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(names, pen.glyph()))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(file)


def test_an_installed_font_is_used_for_the_letters_that_it_has(no_fonts: Path) -> None:
    file = no_fonts / "more" / "Squares-Regular.ttf"
    file.parent.mkdir()
    font_with("你好", file)
    found, note = fonts.drawable(["你好 1", "кот", "日本"])
    assert [(each.text, each.font) for each in found[:2]] == [
        ("你好 1", file),
        ("кот", fonts.plain()),
    ]
    assert found[2].text == "#3"
    assert note
    counts = torch.tensor([[3, 1], [0, 4]])
    drawn = media._matrix(counts, ["你好", "кот"])
    boxes = media._matrix(counts, ["日本", "кот"])
    assert drawn.tobytes() != boxes.tobytes()
    assert drawn.height < boxes.height  # which has the note


def test_every_picture_of_a_report_draws_any_name_without_a_warning(no_fonts: Path) -> None:
    """A letter without a font would be a warning, which is an error in these tests."""
    font_with("你好", no_fonts / "squares.ttf")
    names = [*NAMES, "日本", "ไทย"]
    size = len(names)
    counts = torch.eye(size).tolist()
    points = torch.arange(2.0 * size).view(size, 2).double().numpy()
    labels = torch.arange(size).numpy()
    made = [
        pictures.matrix("a", "Confusion", counts, names),
        pictures.scatter("b", "Map", points, labels, names, ("x", "y")),
        figures.chart(Chart("c", "Curve", [Series(name, [0, 1], [1, 2]) for name in names])),
        pictures.tiles("d", [[Tile(torch.zeros(4, 4, 3).byte().numpy(), n) for n in names]], ""),
    ]
    for picture in made:
        assert picture.light.startswith(b"\x89PNG")
        assert shown(picture.alt, 10**6).isprintable()
    media._matrix(torch.eye(size, dtype=torch.int64), names)
