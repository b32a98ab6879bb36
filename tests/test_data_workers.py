"""Data workers: what they decode, and what happens if one, a file or the trainer fails."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageOps

from moco_dist.data import image_file
from moco_dist.data.image_file import Place, Recipe
from moco_dist.data.worker_pool import WorkerPool, images_of_request
from moco_dist.distributed import peers
from moco_dist.errors import ConfigError, DataError
from tests import image_sets

# The whole image, twice: share and ratio 1, no room to move.
WHOLE = torch.tensor([1.0] * 20 + [0.0, 0.0], dtype=torch.float64).repeat(2, 1)
CENTRED = Recipe(16)


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    made = WorkerPool(1)
    yield made
    made.close()


def files(root: Path, count: int = 3) -> list[Place]:
    paths = [root / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(image_sets.jpeg(image_sets.picture(number, 40, 40)))
    return [Place(str(path)) for path in paths]


def formats(root: Path) -> list[Path]:
    """Write one picture in the modes and formats that occur."""
    rgb = image_sets.picture(1, 50, 40)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees for display
    images: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("rgb.jpg", rgb, {}),
        ("gray.jpg", rgb.convert("L"), {}),
        ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("exif.jpg", rgb, {"exif": turned}),
        ("progressive.jpg", rgb, {"progressive": True}),
        ("rgba.png", rgb.convert("RGBA"), {}),
        ("palette.png", rgb.convert("P"), {}),
        ("gray_alpha.png", rgb.convert("LA"), {}),
        ("bits.png", rgb.convert("1"), {}),
        ("lossless.webp", rgb, {"lossless": True}),
        ("plain.bmp", rgb, {}),
    ]
    for name, image, settings in images:
        image.save(root / name, **settings)
    return [root / name for name, _, _ in images]


def test_images_of_any_mode_are_cut_as_they_are_held_in_memory(
    tmp_path: Path, pool: WorkerPool
) -> None:
    """The colours are those of PIL, and EXIF rotation is ignored."""
    for path in formats(tmp_path):
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        expected = np.asarray(ImageOps.fit(rgb, (16, 16), Image.Resampling.BICUBIC))
        window = rgb.crop((0, 0, 40, 40)).resize((16, 16), Image.Resampling.BILINEAR)
        crop = np.asarray(window)
        place = [Place(str(path))]
        square = pool.fetch(pool.submit(place, CENTRED, None))[0, 0]
        assert np.array_equal(square.permute(1, 2, 0).numpy(), expected), path
        # 40 x 40 of the 50 x 40 image, from the upper left corner on.
        numbers = torch.tensor([[0.8] * 10 + [1.0] * 10 + [0.0, 0.0]], dtype=torch.float64)
        ticket = pool.submit(place, Recipe(16, (1,), 0.75, 1.34), numbers.repeat(1, 2, 1))
        assert np.array_equal(pool.fetch(ticket)[0, 0].permute(1, 2, 0).numpy(), crop), path


@pytest.mark.parametrize("side", [120, 500, 1000])
def test_a_large_jpeg_is_decoded_at_a_smaller_scale_with_the_same_look(side: int) -> None:
    image = image_sets.picture(3, side + side // 3, side)
    numbers = WHOLE.clone()
    numbers[:, :10] = 0.75 * 0.8  # a square of the height, less a fifth of the area
    numbers[:, 20:] = torch.tensor([0.3, 0.6])
    recipe = Recipe(32, (0, 1), 0.75, 1.34)
    found = image_file.crops(image_sets.jpeg(image), numbers.tolist(), recipe)
    box = image_file.box(numbers[0].tolist(), image.height, image.width, recipe)
    with Image.open(io.BytesIO(image_sets.jpeg(image))) as decoded:
        window = decoded.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        exact = np.asarray(window.resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    difference = np.abs(found[0].astype(int) - exact)
    if side == 120:  # less than twice the view's pixels would be left
        assert difference.max() == 0
    assert difference.mean() < 2
    assert np.array_equal(found[0], found[1])


def test_the_scale_is_the_same_whichever_views_are_wanted() -> None:
    content = image_sets.jpeg(image_sets.picture(4, 640, 480))
    numbers = WHOLE.clone()
    numbers[0, :10] = 0.02  # a crop that is too small for any smaller scale, next to a large one
    rows = numbers.tolist()
    both = image_file.crops(content, rows, Recipe(32, (0, 1), 0.75, 1.34))
    for view in (0, 1):
        (alone,) = image_file.crops(content, rows, Recipe(32, (view,), 0.75, 1.34))
        assert np.array_equal(alone, both[view])
    large = image_file.crops(content, [rows[1], rows[1]], Recipe(32, (1,), 0.75, 1.34))
    assert not np.array_equal(large[0], both[1])  # which that scale would have changed


def test_more_images_than_a_request_holds_come_in_their_order(
    tmp_path: Path, pool: WorkerPool
) -> None:
    places = files(tmp_path, 7)
    tickets = [pool.submit([place], CENTRED, None) for place in places]
    for place, ticket in reversed(list(zip(places, tickets, strict=True))):
        expected, _ = image_file.square(Path(place.path).read_bytes(), CENTRED)
        found = pool.fetch(ticket)[0, 0].permute(1, 2, 0)
        assert np.array_equal(found.numpy(), expected)


def test_memory_is_used_again(tmp_path: Path, pool: WorkerPool) -> None:
    places = files(tmp_path)
    for number in range(30):
        ticket = pool.submit(places, CENTRED, None)
        if number % 3:
            pool.fetch(ticket)
        pool.release(ticket)  # one in three before it is done
        pool.fetch(last := pool.submit(places, CENTRED, None))
        pool.release(last)
    assert len(pool._slots) <= 2


def test_images_too_large_for_a_request_are_refused() -> None:
    assert images_of_request(Recipe(224, (0, 1))) == 2**21 // (2 * 3 * 224 * 224)
    with pytest.raises(ConfigError, match=r"5000 pixels a side are too many for streaming"):
        images_of_request(Recipe(5000, (0, 1)))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("gone", "it is gone"),
        ("text", "its content is none of JPEG, PNG, PPM, BMP, TIFF, WEBP, "),
        ("cut", "image file is truncated"),
        ("empty", "its content is none of JPEG"),
    ],
)
def test_a_file_that_goes_bad_is_named_and_leaves_the_others(
    tmp_path: Path, pool: WorkerPool, damage: str, reason: str
) -> None:
    places = files(tmp_path)
    whole = pool.fetch(pool.submit(places, CENTRED, None)).clone()
    path = Path(places[1].path)
    if damage == "gone":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes({"text": b"<html>", "cut": content[:-200], "empty": b""}[damage])
    ticket = pool.submit(places, CENTRED, None)
    found = pool.fetch(ticket)
    ((number, why),) = ticket.answer.bad
    assert (number, why.startswith(reason)) == (1, True), why
    for good in (0, *range(2, len(places))):
        assert found[good].equal(whole[good])


def test_a_disk_that_is_gone_is_no_bad_file(tmp_path: Path, pool: WorkerPool) -> None:
    places = files(tmp_path)
    for place in places:
        Path(place.path).unlink()  # and so the folder is empty, as where nothing is mounted
    with pytest.raises(DataError) as error:
        pool.fetch(pool.submit(places, CENTRED, None))
    assert str(error.value) == (
        f"{places[0].path}: can't be read (No such file or directory); put it back as it was"
    )
    assert error.value.exit_status == 65
    assert not error.value.again


def test_a_passing_error_is_tried_three_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place,) = files(tmp_path, 1)
    real, failures = image_file._read, [OSError(5, "I/O error"), OSError(116, "Stale handle")]
    slept: list[float] = []

    def flaky(place: Place) -> bytes:
        if failures:
            raise failures.pop()
        return real(place)

    monkeypatch.setattr(image_file, "_read", flaky)
    monkeypatch.setattr(time, "sleep", slept.append)
    assert image_file.read(place) == Path(place.path).read_bytes()
    assert slept == [1.0, 2.0]
    for error, given, left in ((OSError(5, "I/O error"), 3, 0), (OSError(2, "No such file"), 2, 1)):
        failures[:] = [error] * given
        with pytest.raises(OSError, match=str(error.strerror)):
            image_file.read(place)
        assert len(failures) == left


def test_a_worker_that_is_killed_is_named(tmp_path: Path, pool: WorkerPool) -> None:
    places = files(tmp_path)
    pool.fetch(pool.submit(places, CENTRED, None))
    (pid,) = pool.pids()
    os.kill(pid, signal.SIGSTOP)
    ticket = pool.submit(places, CENTRED, None)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(DataError) as error:
        pool.fetch(ticket)
    assert str(error.value) == (
        f"the data worker with pid {pid} was ended by SIGKILL (most likely for lack of memory) at "
        f"3 images from {places[0].path} on; the same command resumes from the last checkpoint; "
        "fewer data.workers need less memory"
    )
    assert error.value.again  # a job script may start it again


def test_a_worker_that_hangs_is_named(
    tmp_path: Path, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = files(tmp_path)
    pool.fetch(pool.submit(places, CENTRED, None))
    (pid,) = pool.pids()
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(peers.me, "timeout", 0.5)
    with pytest.raises(DataError, match=rf"no data for 0\.4 s: the data worker with pid {pid} is"):
        pool.fetch(pool.submit(places, CENTRED, None))
    os.kill(pid, signal.SIGCONT)


def test_workers_ignore_the_signals_of_a_run(tmp_path: Path, pool: WorkerPool) -> None:
    places = files(tmp_path)
    pool.submit(places, CENTRED, None)
    (pid,) = pool.pids()
    for _ in ("before it ignores them", "after"):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            os.kill(pid, number)
        pool.fetch(pool.submit(places, CENTRED, None))
    assert pool.pids() == [pid]


TRAINER = """
import json, os, sys, time
from moco_dist.data.image_file import Place, Recipe
from moco_dist.data.worker_pool import WorkerPool
pool = WorkerPool(2)
places = [Place(path) for path in sys.argv[1:]]
for _ in range(200):
    pool.submit(places, Recipe(16), None)
print(json.dumps(pool.pids()), flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["time.sleep(60)", "os._exit(75)", "sys.exit(0)"])
def test_workers_end_with_the_trainer_however_it_ends(tmp_path: Path, end: str) -> None:
    paths = [place.path for place in files(tmp_path)]
    code = TRAINER.format(end=end)
    with subprocess.Popen(
        [sys.executable, "-c", code, *paths], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as trainer:
        assert trainer.stdout
        pids = json.loads(trainer.stdout.readline())
        assert len(pids) == 2
        if "sleep" in end:
            assert all(psutil.pid_exists(pid) for pid in pids)
            trainer.kill()
        trainer.wait()
    deadline = time.monotonic() + 120
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker is left"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
