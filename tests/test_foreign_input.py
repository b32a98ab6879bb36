"""Folders, images, archives and configurations of strangers: a sentence, no code run, no memory."""

from __future__ import annotations

import ast
import bz2
import gzip
import io
import lzma
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from moco_dist.config.recipe import DataConfig, PretrainConfig
from moco_dist.config.yaml_files import from_dict, load, stored, to_dict
from moco_dist.data import datasets, image_file, image_folder
from moco_dist.data.image_file import Recipe
from moco_dist.data.image_folder import Seen
from moco_dist.distributed import fingerprint
from moco_dist.doctor import images
from moco_dist.errors import ConfigError, DataError, MissingError, shown

EIGHT = Recipe(8)
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
PACKAGE = Path(__file__).parent.parent / "moco_dist"


def write_image(path: Path, color: tuple[int, int, int] = (1, 2, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 12), color).save(path)


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of black pixels with a few bytes for each megabyte that it unpacks to."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(min(height, 100) * (1 + 3 * width)), 1)
    made = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")):
        checked = kind + content
        made += struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))
    return made


def test_a_loop_of_links_ends_and_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "cat" / "0.png")
    write_image(tmp_path / "dog" / "0.png")
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    (tmp_path / "dog" / "self").symlink_to(tmp_path / "dog")
    (tmp_path / "dog" / "circle.png").symlink_to(tmp_path / "dog" / "circle.png")
    listing = image_folder.scan(tmp_path, labelled=True)
    assert listing.all_labels() == ["cat/0.png", "dog/0.png"]
    assert listing.classes == ("cat", "dog")
    assert sorted(listing.warnings) == [
        f"{tmp_path}: left out 1 links to nothing; the first is {tmp_path / 'dog' / 'circle.png'}",
        f"{tmp_path}: left out 2 links to folders that are read already; "
        f"the first is {tmp_path / 'cat' / 'again'}",
    ]


def test_links_among_siblings_cost_no_more_than_folders(tmp_path: Path) -> None:
    for i in range(12):
        write_image(tmp_path / "set" / f"{i:02}" / "0.png")
        for j in range(12):
            (tmp_path / "set" / f"{i:02}" / f"to{j}").symlink_to(tmp_path / "set" / f"{j:02}")
    start = time.process_time()
    assert len(image_folder.scan(tmp_path / "set", labelled=True)) == 12
    assert time.process_time() - start < 5


def test_class_folders_that_are_links_hold_images(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_image(tmp_path / "pool" / name / "0.png")
    (tmp_path / "set").mkdir()
    for name in ("dog", "cat"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "pool" / name)
    (tmp_path / "set" / "cat" / "1.png").symlink_to(tmp_path / "pool" / "cat" / "0.png")
    listing = image_folder.scan(tmp_path / "set", labelled=True)
    assert listing.all_labels() == ["cat/0.png", "cat/1.png", "dog/0.png"]
    assert listing.labels.tolist() == [0, 0, 1]


def test_images_come_folder_by_folder_in_the_order_of_their_names(tmp_path: Path) -> None:
    places = ["b.png", "z.png", "a/y.png", "a/b/c.png", "a-b/c.png", "c/a.png"]
    for place in reversed(places):
        write_image(tmp_path / place)
    assert image_folder.scan(tmp_path, labelled=True).all_labels() == places


def test_pipes_dangling_links_and_closed_folders_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "cat" / "0.png")
    write_image(tmp_path / "closed" / "0.png")
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    scandir = os.scandir

    def refuse(folder: str) -> object:
        if folder.endswith("closed"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = image_folder.scan(tmp_path, labelled=True)
    assert image_folder.decode(listing, EIGHT).shape == (1, 3, 8, 8)
    said = "\n".join(listing.warnings)
    assert f"pipes or devices; the first is {tmp_path / 'cat' / 'pipe.jpg'}" in said
    assert f"links to nothing; the first is {tmp_path / 'cat' / 'gone.png'}" in said
    closed = f"folders that can't be read (Permission denied); the first is {tmp_path}/closed"
    assert closed in said


@pytest.mark.parametrize(
    "name",
    [b"line\nbreak.png", b"\xff\xfe\x80.png", b"x" * 251 + b".png", b"\x1b[31mred.png"],
    ids=["newline", "not UTF-8", "255 bytes", "escape"],
)
def test_any_file_name_is_read_cached_and_printable(tmp_path: Path, name: bytes) -> None:
    root = tmp_path / "set"
    write_image(root / "plain.png", (9, 9, 9))
    target = os.path.join(os.fsencode(root), name)
    os.rename(root / "plain.png", target)
    for _ in range(2):
        listing = image_folder.scan(root, labelled=True)
        assert (image_folder.load(listing, EIGHT, tmp_path / "cache", Seen()) == 9).all()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    Path(os.fsdecode(target)).write_bytes(b"no image")
    with pytest.raises(DataError) as error:
        image_folder.load(image_folder.scan(root, labelled=True), EIGHT, tmp_path / "cache", Seen())
    assert str(error.value).isprintable()
    assert str(error.value).encode()


def test_a_name_of_any_length_has_one_short_sentence() -> None:
    long = "A" * 60_000
    with pytest.raises(MissingError) as missing:
        datasets.load(load(PretrainConfig, ["data.name=folder", f"data.root={long}"]).data)
    assert str(missing.value) == (
        f"{'A' * 60}... (60000 characters): no such folder; "
        "give the folder of the images as data.root=DIR"
    )
    for argument in (long * 2, long * 2 + ".yaml"):
        with pytest.raises(ConfigError) as refused:
            load(PretrainConfig, [argument])
        assert len(str(refused.value)) < 300
    with pytest.raises(MissingError) as missing:
        datasets.load(DataConfig(name="cifar10", root=long))
    assert len(str(missing.value)) < 400


# It runs apart, because the peak of memory is measured for a whole process.
BOMB = """
import resource, sys
from dataclasses import replace
from pathlib import Path
from moco_dist.data import image_folder
from moco_dist.data.image_file import Recipe
from moco_dist.errors import DataError
listing = image_folder.scan(Path(sys.argv[1]), labelled=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(tuple(image_folder.decode(listing, Recipe(8)).shape))
except DataError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def decoded_apart(folder: Path, warnings: str) -> tuple[str, int]:
    """Return what decoding a folder says, and by how many MiB the peak of memory rose."""
    command = [sys.executable, "-W", warnings, "-c", BOMB, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    said, mebibytes = done.stdout.splitlines()
    return said, int(mebibytes)


@pytest.mark.parametrize("side", [80_000, 13_000])
def test_an_image_that_unpacks_to_gigabytes_is_refused_undecoded(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb(side, side))
    said, mebibytes = decoded_apart(tmp_path, "ignore")
    assert said.startswith(
        f"{tmp_path / 'bomb.png'}: not a readable image (too large, 160,000,000 pixels are "
        "allowed; scale it down:"
    )
    assert said.endswith("; replace or remove this file, or give data.skip_unreadable=true")
    assert mebibytes < 64


def test_a_photo_of_a_hundred_megapixels_is_read_without_a_warning(tmp_path: Path) -> None:
    Image.new("L", (11648, 8736), 7).save(tmp_path / "photo.png", compress_level=1)
    said, _ = decoded_apart(tmp_path, "error")
    assert said == "(1, 3, 8, 8)"


def test_postscript_behind_an_image_name_starts_no_interpreter(tmp_path: Path) -> None:
    header = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    (tmp_path / "x.jpg").write_text(header)
    with pytest.raises(DataError, match="its content is PostScript, which is not read"):
        image_folder.decode(image_folder.scan(tmp_path, labelled=True), EIGHT)


def test_all_unreadable_images_are_counted_and_five_are_named(tmp_path: Path) -> None:
    for i in range(9):
        write_image(tmp_path / f"{i}.png")
    for i in (1, 2, 4, 5, 6, 7, 8):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(DataError) as error:
        image_folder.decode(image_folder.scan(tmp_path, labelled=True), EIGHT)
    said = str(error.value)
    assert said.startswith(f"{tmp_path}: 7 of 9 images are not readable: {tmp_path / '1.png'} (")
    assert [i for i in range(9) if f"{tmp_path / f'{i}.png'} (" in said] == [1, 2, 4, 5, 6]
    assert said.endswith("; replace or remove these files, or give data.skip_unreadable=true")


def test_a_thousand_unreadable_images_are_not_all_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(1000):
        (tmp_path / f"{i:03}.png").write_bytes(b"")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    tried = []

    def square(content: bytes, recipe: Recipe) -> None:
        tried.append(content)
        time.sleep(0.001)
        raise ValueError("bad")

    monkeypatch.setattr(image_file, "square", square)
    with pytest.raises(DataError, match="100 or more of 1000 images are not readable"):
        image_folder.decode(image_folder.scan(tmp_path, labelled=True), EIGHT)
    assert len(tried) < 500


def test_a_file_as_root_is_refused_unless_it_is_an_archive_of_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar", "w"):
        pass
    (tmp_path / "notes.txt").write_text("no archive")
    for kind, name in (("cifar10", "set.tar"), ("folder", "notes.txt")):
        config = DataConfig(name=kind, root=str(tmp_path / name))  # type: ignore[arg-type]
        with pytest.raises(DataError) as error:
            datasets.load(config)
        assert str(error.value) == (
            f"data.root={tmp_path / name}: is a file; give a folder or, with data.name=folder, a "
            "tar or zip file of images"
        )


def packed(folder: Path, archive: Path, kind: str, around: bool) -> Path:
    """Return `archive`, made of `folder`: with the folder around its content, or without."""
    base = folder.name if around else "."
    root = folder.parent if around else folder
    return Path(shutil.make_archive(str(archive), kind, root, base))


@pytest.fixture(params=["as it is", "before 3.11.4"])
def python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with and without the filters of tarfile."""
    if request.param != "as it is":
        monkeypatch.delattr(tarfile, "data_filter", raising=False)


@pytest.mark.usefixtures("python")
@pytest.mark.parametrize("kind", ["tar", "gztar", "zip"])
@pytest.mark.parametrize("around", [True, False])
def test_an_archive_gives_what_its_folder_gives(tmp_path: Path, kind: str, around: bool) -> None:
    folder, cache = tmp_path / "set", str(tmp_path / "cache")
    for number, name in enumerate(["train/a", "train/a", "train/b", "train/b", "test/a", "test/b"]):
        write_image(folder / name / f"{number}.png")
    config = DataConfig(name="folder", root=str(folder), size=8, validation=0, cache=cache)
    plain = datasets.load(config)
    archive = packed(folder, tmp_path / "archive", kind, around)
    shutil.rmtree(folder)
    for _ in ("unpacked", "again, from the cache"):
        unpacked = datasets.load(replace(config, root=str(archive)))
        assert unpacked.fingerprint == plain.fingerprint
        assert unpacked.train.classes == ("a", "b")
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len([name for name in names if name.startswith("unpacked_")]) == 1
    assert not [name for name in names if name.endswith(".tmp")]


@pytest.mark.usefixtures("python")
@pytest.mark.parametrize("place", ["../evil", "/evil", "link"])
def test_an_archive_does_not_leave_its_folder(tmp_path: Path, place: str) -> None:
    archive, cache = tmp_path / "deep" / "set.tar", tmp_path / "cache"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        entry = tarfile.TarInfo(place if place != "/evil" else str(tmp_path / "evil"))
        if place == "link":
            entry.type, entry.linkname = tarfile.SYMTYPE, "../../../evil"
        tar.addfile(entry)
    with pytest.raises((DataError, MissingError), match=r"can't be unpacked|no images"):
        datasets.load(DataConfig(name="folder", root=str(archive), cache=str(cache)))
    assert [path for path in tmp_path.rglob("evil") if cache not in path.parents] == []
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_cut_archive_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    write_image(tmp_path / "set" / "a" / "1.png")
    archive = packed(tmp_path / "set", tmp_path / "set", "gztar", True)
    archive.write_bytes(archive.read_bytes()[:150])
    with pytest.raises(DataError, match="can't be unpacked"):
        datasets.load(DataConfig(name="folder", root=str(archive), cache=str(tmp_path / "cache")))
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.usefixtures("python")
@pytest.mark.parametrize("damage", ["cut", "cut in a header", "header", "joined", *COMPRESSORS])
def test_an_archive_that_unpacks_in_part_is_refused(tmp_path: Path, damage: str) -> None:
    """Python's tarfile says nothing of the first four, and reads no checksum of the others."""
    for number in range(8):
        write_image(tmp_path / "set" / "ab"[number % 2] / f"{number}.png", (number, 2, 3))
    archive = packed(tmp_path / "set", tmp_path / "whole", "tar", False)
    content = archive.read_bytes()
    with tarfile.open(archive) as tar:
        files = [entry for entry in tar if entry.isfile()]
    last = files[-1].offset
    torn = bytearray(content)
    torn[last + 150] ^= 1  # in the checksum
    kinds = {"cut": content[:last], "cut in a header": content[: last + 99], "joined": content * 2}
    if damage in COMPRESSORS:
        torn = bytearray(COMPRESSORS[damage](content))
        torn[-6] ^= 1  # the sum over all that was compressed, or its length
    broken = tmp_path / f"broken.tar{damage if damage in COMPRESSORS else ''}"
    broken.write_bytes(kinds.get(damage, bytes(torn)))
    with tarfile.open(broken) as tar:
        assert len([entry for entry in tar if entry.isfile()]) in (7, 8)
    cache = tmp_path / "cache"
    config = DataConfig(name="folder", root=str(broken), cache=str(cache))
    with pytest.raises(DataError, match=f"^data.root={broken}: can't be unpacked"):
        datasets.load(config)
    assert list(cache.iterdir()) == []
    (found,), _ = images.data(config, 3)
    assert f"data.root={broken}: can't be unpacked" in found.fault


class Planted:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(
    ("name", "archive", "batch"),
    [
        ("cifar10", "cifar-10-python.tar.gz", "cifar-10-batches-py/data_batch_1"),
        ("cifar100", "cifar-100-python.tar.gz", "cifar-100-python/train"),
        ("stl10", "stl10_binary.tar.gz", "stl10_binary/train_X.bin"),
    ],
)
def test_planted_archives_are_not_unpacked_and_planted_pickles_not_read(
    tmp_path: Path, name: str, archive: str, batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, content = tmp_path / "set", pickle.dumps(Planted(tmp_path / "ran"))
    (root / batch).parent.mkdir(parents=True)
    (root / batch).write_bytes(content)
    with tarfile.open(root / archive, "w:gz") as tar:
        for place in ("../evil", str(tmp_path / "evil"), "inside", batch):
            entry = tarfile.TarInfo(place)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    # A closed port stands for the network, so that no name server is asked.
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    start = time.monotonic()
    with pytest.raises(MissingError, match="and can't be downloaded") as error:
        datasets.load(DataConfig(name=name, root=str(root)))  # type: ignore[arg-type]
    assert time.monotonic() - start < 20
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"set"}
    assert not (root / "inside").exists()


def test_a_planted_cache_of_another_shape_is_not_used(tmp_path: Path) -> None:
    write_image(tmp_path / "set" / "0.png", (9, 9, 9))
    listing = image_folder.scan(tmp_path / "set", labelled=True)
    image_folder.load(listing, EIGHT, tmp_path / "cache", Seen())
    (cached,) = (tmp_path / "cache").iterdir()
    other = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    for metadata in ({"fingerprint": fingerprint.of_tensors(other)}, None):
        save_file({"pixels": other}, cached, metadata)
        assert image_folder.load(listing, EIGHT, tmp_path / "cache", Seen()).shape == (1, 3, 8, 8)


def refusal(text: str, file: Path) -> str:
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(PretrainConfig, [str(file)])
    assert str(error.value).isprintable()
    assert str(error.value).startswith(f"{file}: ")
    return str(error.value).removeprefix(f"{file}: ")


@pytest.mark.parametrize(
    "value", ["${oc.env:HUSH}", "a${oc.decode:x}", "${seed}", "${mine:1}", "${", "\\${oc.env:HUSH}"]
)
def test_nothing_in_a_value_is_replaced(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUSH", "secret")
    sentence = (
        f"'{shown(value)}' has a '${{', which is not replaced here; let the shell do it, "
        "or write the value out"
    )
    assert refusal(f"output: '{value}'\n", tmp_path / "a.yaml") == sentence
    assert refusal(f"data:\n  root: '{value}'\n", tmp_path / "a.yaml") == sentence
    assert refusal(f"views:\n  mean: ['{value}']\n", tmp_path / "a.yaml") == sentence
    with pytest.raises(ConfigError) as error:
        load(PretrainConfig, [f"output='{value}'"])
    assert str(error.value) == f"output='{value}': {sentence}"
    stored = to_dict(PretrainConfig()) | {"output": value}
    with pytest.raises(ConfigError, match="is not replaced here"):
        from_dict(PretrainConfig, stored)


def test_text_within_text_is_not_read_as_yaml_again(tmp_path: Path) -> None:
    hidden = """'output: "$\\x7boc.env:HOME}"'\n"""
    said = refusal(hidden, tmp_path / "a.yaml")
    assert said == "holds no 'key: value' lines; see --help for the keys"


def test_a_tag_runs_nothing(tmp_path: Path) -> None:
    tag = "!!python/object/apply:os.mkdir"
    text = f"name: {tag} ['{tmp_path / 'ran'}']\n"
    assert "could not determine a constructor for the tag" in refusal(text, tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="is no folder name"):
        load(PretrainConfig, [text.replace(": ", "=", 1)])
    with pytest.raises(ConfigError, match="could not determine a constructor for the tag"):
        load(PretrainConfig, [f"views.mean={tag} ['{tmp_path / 'ran'}']"])
    assert stored(tmp_path / "a.yaml") == {}
    assert not (tmp_path / "ran").exists()


def test_aliases_are_read_and_what_they_make_too_large_or_too_deep_is_refused(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("views: {mean: &half [0.5, 0.5, 0.5], std: *half}\n")
    assert load(PretrainConfig, [str(file)]).views.std == [0.5, 0.5, 0.5]
    laughs = "a: &a {b: 1, c: 1}\n" + "".join(
        f"{b}: &{b} {{x: *{a}, y: *{a}}}\n"
        for a, b in zip("abcdefghijklmnopqrstuvw", "bcdefghijklmnopqrstuvwx", strict=True)
    )
    assert refusal(laughs, file).startswith("there is no key 'a'; ")
    assert stored(file) == {}
    merged = "views: &a {flip: 1}\noptim: {<<: [*a, *a]}\n"
    assert refusal(merged, file).startswith("there is no key 'optim.<<'; ")
    assert refusal("optim: &a {lr: *a}\n", file) == "optim.lr=&a {lr: *a} is not a number"
    for text in ("name: *a\n", "name: " + "{a: " * 900 + "}" * 900):
        assert "not valid YAML (" in refusal(text, file)
        assert stored(file) == {}
    for nested in ("name: " + "[" * 10_000, "name: " + "{a: " * 10_000, "- " * 10_000):
        assert "not valid YAML (" in refusal(nested, file)
    assert refusal("- 1", file) == "holds no 'key: value' lines; see --help for the keys"
    assert "found duplicate key lr in line 3" in refusal("optim:\n  lr: 1\n  lr: 2\n", file)
    assert refusal("output: ???\n", file) == "'???' is no value; give one"


FORBIDDEN_CALLS = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load", "os.system", "os.popen"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "marshal.loads"),
    *("eval", "exec", "compile", "__import__"),
}


# It reads state dicts of strangers, and may load them as tensors alone.
READER = "encoders/state_dict.py"


def unsafe_calls(source: str, loads_tensors: bool = False) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            shell = any(keyword.arg == "shell" for keyword in node.keywords)
            name, named = ast.unparse(node.func), [ast.unparse(each) for each in node.keywords]
            tensors = loads_tensors and name == "torch.load" and "weights_only=True" in named
            found += [name] * ((name in FORBIDDEN_CALLS and not tensors) or shell)
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in imported if name in FORBIDDEN_CALLS]
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("**/*.py")), ids=lambda path: path.stem)
def test_no_file_calls_what_runs_the_code_of_its_input(path: Path) -> None:
    found = unsafe_calls(path.read_text(), path == PACKAGE / READER)
    # An export runs the code that it has just written, of numbers and known names.
    assert found == (["exec", "compile"] if path.stem == "targets" else [])


def test_each_call_that_runs_code_would_be_found() -> None:
    for name in FORBIDDEN_CALLS:
        assert unsafe_calls(f"{name}(x)") == [name]
    assert unsafe_calls("subprocess.run(x, shell=True)") == ["subprocess.run"]
    assert unsafe_calls("from torch import load") == ["torch.load"]
    assert unsafe_calls("torch.load(x, weights_only=True)", True) == []
    for loose in ("torch.load(x)", "torch.load(x, weights_only=False)"):
        assert unsafe_calls(loose, True) == ["torch.load"]
    assert unsafe_calls("module.eval(); safetensors.load(x)") == []
