"""Random folders are read as the rules of docs/data.md say: by a reading of their own, below."""

from __future__ import annotations

import functools
import io
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from moco_dist.config.recipe import DataConfig
from moco_dist.data import datasets
from moco_dist.data.datasets import AnyImages, Images
from moco_dist.data.worker_pool import WorkerPool
from moco_dist.errors import UserError
from tests.image_sets import add

TRAIN = ("train", "Train", "TRAINING", "train_set")
VALIDATION = ("val", "Valid", "validation")
TEST = ("test", "Testing", "TEST2017", "eval")
PARTS = dict.fromkeys(TRAIN, 0) | dict.fromkeys(TEST, 1) | dict.fromkeys(VALIDATION, 2)
# Other folders, whose names may have the words of parts in them.
OTHERS = ("a", "b", "Käse", "images", "seg_train", "seg_test")
JUNK = ("__MACOSX", ".git", "@eaDir")
READ = (".png", ".PNG", ".gif", ".jpg", ".jfif", ".bmp", ".tif", ".webp", ".ppm", ".avif")
UNREAD = (".heic", ".tga")
IGNORED = (".txt", ".json", "")

File = tuple[str, ...]
# Of each image of a part, its class.
Part = dict[File, str | None]


class RefusedError(Exception):
    """The rules refuse a folder."""


def below(files: set[File], at: File) -> set[File]:
    return {file[len(at) :] for file in files if file[: len(at)] == at and len(file) > len(at)}


def tops(files: set[File]) -> set[str]:
    return {file[0] for file in files if len(file) > 1}


def alone(files: set[File]) -> int:
    return sum(len(file) == 1 for file in files)


def top(files: set[File], unread: set[File], classes: set[str] | None = None) -> File:
    """Rule 3."""
    at: File = ()
    inner = files
    while True:
        names = tops(inner)
        if classes is None and tops(inner | below(unread, at)) & set(TRAIN):
            return at
        if len(names) != 1:
            return at if names else ()
        if names <= (classes or set()):
            return at
        if 10 * alone(inner) > len(inner):
            return ()
        at += tuple(names)
        inner = below(files, at)


def labels(files: set[File], unread: set[File], classes: set[str] | None = None) -> Part:
    """Rules 5 and 7."""
    names, empty = tops(files), tops(unread) - tops(files)
    few = classes is None and len(names | empty) < 2
    if not names or few or 10 * alone(files) > len(files):
        return dict.fromkeys(files)
    if classes is None:
        for words in (names, {file[1] for file in files if len(file) > 2}):
            trains = words & {*TRAIN, "seg_train"} if words is names else words & set(TRAIN)
            tests = words & ({*TEST, *VALIDATION} | ({"seg_test"} if words is names else set()))
            if trains and tests:
                raise RefusedError
        if empty or names <= set(PARTS):
            raise RefusedError
    return {file: file[0] if file[0] in (classes or names) else None for file in files}


def rules(files: set[File], unread: set[File]) -> tuple[dict[File, str | None], Part, File, File]:
    """Return the images of training and testing with their classes, and the folders of both."""
    if not files:
        raise RefusedError
    at = top(files, unread)
    trains = sorted(tops(below(files | unread, at)) & set(TRAIN))
    if len(trains) > 1 and "train" not in trains:
        raise RefusedError
    train, tests = at, list[File]()
    if trains:
        train = (*at, "train" if "train" in trains else trains[0])
        train += top(below(files, train), set(), set())
        order = sorted(
            (PARTS.get(n, 0), n not in ("test", "val"), n) for n in tops(below(files, at))
        )
        tests = [(*at, name) for number, _, name in order if number]
    if not below(files, train):
        raise RefusedError
    found = labels(below(files, train), below(unread, train))
    classes = {name for name in found.values() if name}
    for test in tests if classes else ():
        test += top(below(files, test), set(), classes)
        tested = labels(below(files, test), set(), classes)
        if any(tested.values()):
            if tops(set(tested)) - classes:  # for a probe to refuse
                break
            return found, {file: name for file, name in tested.items() if name}, train, test
    return found, {}, train, ()


@functools.cache
def content(number: int, suffix: str) -> bytes:
    """Return an image of a colour of its own."""
    file = io.BytesIO()
    kind = {".jpg": "JPEG", ".jfif": "JPEG", ".tif": "TIFF", ".ppm": "PPM"}.get(suffix.lower())
    image = Image.new("RGB", (8, 8), colour(number))
    image.save(file, kind or suffix[1:].upper())
    return file.getvalue()


def colour(number: int) -> tuple[int, int, int]:
    return 16 * (number % 16), 16 * (number // 16), 100


def number_of(pixels: torch.Tensor) -> int:
    red, green = ((pixels[:2].double().mean((1, 2)) + 8) // 16).int().tolist()
    return int(red + 16 * green)


folder_names = st.sampled_from([*TRAIN, *TEST, *VALIDATION, *OTHERS, *OTHERS, *JUNK])
suffixes = st.sampled_from([*READ * 2, *UNREAD, *IGNORED])
anywhere = st.tuples(st.lists(folder_names, max_size=4).map(tuple), suffixes)


@st.composite
def sorted_folders(draw: st.DrawFn) -> list[tuple[File, str]]:
    """Return the files of a folder as people have them: parts, classes, a folder on top."""
    above = draw(st.sampled_from([(), ("set",), ("set", "images")]))
    classes = draw(st.sampled_from([("a", "b"), ("a", "b", "Käse"), ("a",), ()]))
    parts: list[tuple[File, File]] = [((), classes)]
    if train := draw(st.sampled_from([(), *[(name,) for name in TRAIN]])):
        parts = [(train, classes)]
        for name in draw(st.lists(st.sampled_from([*TEST, *VALIDATION]), max_size=2, unique=True)):
            own = st.sampled_from([classes, classes, ("a",), ("other",), (*classes, "other"), ()])
            parts.append(((name,), draw(own)))
    files = []
    for part, names in parts:
        inner = draw(st.sampled_from([(), (), ("images",)]))
        again = draw(st.sampled_from([(), (), part]))
        for place in [(*above, *part, *again, name, *inner) for name in names] or [(*above, *part)]:
            files += [(place, draw(suffixes)) for _ in range(draw(st.integers(0, 3)))]
            files += [(place, ".png")] * draw(st.sampled_from([1, 2, 5]))
    return files


trees = st.one_of(
    st.lists(anywhere, min_size=1, max_size=12),
    sorted_folders(),
    st.tuples(sorted_folders(), st.lists(anywhere, max_size=2)).map(lambda both: both[0] + both[1]),
)
# A link to a folder outside, one back to the top, and one to a file, each in some folder or none.
linked = st.lists(folder_names, max_size=2).map(tuple)
links = st.tuples(*[st.none() | linked] * 3)


def write(root: Path, tree: list[tuple[File, str]]) -> dict[File, int]:
    """Write the files; return the number of each."""
    numbers = {}
    for number, (folder, suffix) in enumerate(tree):
        path = root.joinpath(*folder, f"{number}{suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(number, suffix) if suffix in READ else b"text")
        numbers[(*folder, path.name)] = number
    return numbers


def link(root: Path, wanted: tuple[File | None, ...], numbers: dict[File, int]) -> dict[File, int]:
    """Add links; return the numbers of all files that are read then."""
    outside, up, to_file = wanted
    if up is not None:
        root.joinpath(*up).mkdir(parents=True, exist_ok=True)
        root.joinpath(*up, "up").symlink_to(root)
    if outside is not None:
        pool = root.parent / "pool"
        found = write(pool, [((), ".png")] * 2)
        root.joinpath(*outside).mkdir(parents=True, exist_ok=True)
        root.joinpath(*outside, "b2").symlink_to(pool)
        numbers |= {(*outside, "b2", *file): number for file, number in found.items()}
    if to_file is not None:
        file, number = next(iter(numbers.items()))
        if file[-1].endswith(READ):
            root.joinpath(*to_file).mkdir(parents=True, exist_ok=True)
            root.joinpath(*to_file, f"link{file[-1]}").symlink_to(root.joinpath(*file))
            numbers |= {(*to_file, f"link{file[-1]}"): number}
    return numbers


def config(root: Path, **values: object) -> DataConfig:
    where = {"name": "folder", "root": str(root), "cache": str(root.parent / "cache")}
    kept: dict[str, object] = {"size": 8, "validation": 0.0, "workers": 1}
    return DataConfig(**(where | kept | values))  # type: ignore[arg-type]


def held(images: AnyImages, top: Path | None) -> Counter[tuple[object, int, str | None]]:
    """Return path, number and class of each image."""
    names = [images.classes[label] if label >= 0 else None for label in images.labels.tolist()]
    found: Counter[tuple[object, int, str | None]] = Counter()
    pixels = images.squares(torch.arange(len(images))) if names else torch.empty(0)
    for row, name in enumerate(names):
        place: object = None
        if top:
            listed = images.rows
            assert images.catalogue is not None
            assert listed is not None
            path = images.catalogue.places([int(listed[row])])[0].path
            place = Path(path).relative_to(top).parts
        found[place, number_of(pixels[row]), name] += 1
    return found


def check(tree: list[tuple[File, str]], wanted: tuple[File | None, ...], kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "whole"
        root.mkdir()
        numbers = link(root, wanted, write(root, tree))
        seen = {f for f in numbers if not any(p in JUNK for p in f)}
        files = {file for file in seen if file[-1].endswith(READ)}
        unread = {file for file in seen if file[-1].endswith(UNREAD)}
        given = config(root)
        try:
            train, test, train_at, test_at = rules(files, unread)
        except RefusedError:
            with pytest.raises(UserError):
                datasets.load(given)
            return

        def expected(part: Part, at: File, places: bool) -> Counter[tuple[object, int, str | None]]:
            return Counter(
                ((*at, *file) if places else None, numbers[(*at, *file)], name)
                for file, name in part.items()
            )

        def compare(given: DataConfig, top: Path | None) -> None:
            splits = datasets.load(given)
            assert isinstance(splits.train, Images) == (given.memory_gb > 0)
            assert held(splits.train, top) == expected(train, train_at, top is not None)
            assert held(splits.test, top) == expected(test, test_at, top is not None)
            assert set(splits.train.classes) == {name for name in train.values() if name}

        compare(given, root)
        compare(config(root, memory_gb=0.0), root)
        if not any(part is not None for part in wanted):
            archive = shutil.make_archive(folder + "/archive", kind, folder, "whole")
            (unpacked,) = (
                path
                for splits in [datasets.load(config(Path(archive)))]
                for path in Path(folder, "cache").glob("unpacked_*")
                if splits
            )
            compare(config(Path(archive)), unpacked / "whole")
        for part, at in ((train, train_at), (test, test_at)):
            name = next((n for n in at if n in (TRAIN if part is train else PARTS)), "shard")
            if part:
                path = Path(folder, "shards", f"{name}-0.tar")
                path.parent.mkdir(exist_ok=True)
                with tarfile.open(path, "w") as tar:
                    for row, (file, label) in enumerate(part.items()):
                        suffix = Path(file[-1]).suffix
                        inside = root.joinpath(*at, *file).read_bytes()
                        key = f"{label}/{row}" if label else f"{row}"
                        add(tar, f"{key}{suffix}", inside)
        compare(config(Path(folder, "shards"), name="shards"), None)


@pytest.fixture
def one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all folders share their workers, whose start takes longer than their work."""
    monkeypatch.setattr(datasets, "WorkerPool", functools.cache(WorkerPool))


def run(examples: int) -> Callable[[], None]:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )(given(trees, links, st.sampled_from(["zip", "tar"]))(check))


@pytest.mark.usefixtures("one_pool")
def test_random_folders_are_read_as_the_rules_say() -> None:
    run(40)()


@pytest.mark.slow
@pytest.mark.usefixtures("one_pool")
def test_two_hundred_random_folders_are_read_as_the_rules_say() -> None:
    run(200)()
