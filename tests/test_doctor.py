"""The doctor's table is of this configuration, and what is planted is in the list of faults."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.doctor import checks, images, run
from moco_dist.errors import FaultsError
from tests import processes

SMALL = [
    *("data.shapes_train=100", "data.size=16", "views.size=16", "encoder.width=4"),
    *("batch_size=16", "bn_groups=8", "moco.queue_size=32", "tracking.wandb=disabled"),
    "runtime.device=cpu",
]


def examined(*more: str) -> tuple[str, float]:
    """Return the list of faults, '' without one, and the CPU seconds of this process."""
    began = time.process_time()
    try:
        run.examine(load(PretrainConfig, [*SMALL, *more]))
    except FaultsError as error:
        return str(error), time.process_time() - began
    return "", time.process_time() - began


def test_two_processes_that_are_well_have_no_fault_in_under_30_seconds(tmp_path: Path) -> None:
    for faults, seconds in processes.run(examined, 2, f"output={tmp_path}"):
        assert faults == ""
        assert seconds < 30


def test_all_planted_faults_are_in_one_list_on_two_processes(tmp_path: Path) -> None:
    for number in range(12):
        Image.new("RGB", (20 + number, 30)).save(tmp_path / f"{number}.png")
    (tmp_path / "text.jpg").write_text("no image")
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    more = [f"output={tmp_path}", "data.name=folder", f"data.root={tmp_path}", "batch_size=9"]
    more += ["bn_groups=3", "runtime.processes=3", "moco.queue_size=500"]
    for faults, seconds in processes.run(examined, 2, *more):
        assert faults.startswith("4 will fail:")
        for sentence in (
            "runtime.processes=3 and 2 took part",
            "batch_size=9 can't be split over 2 processes",
            "moco.queue_size=500 is not below the 13 training images: every image meets its own "
            "older keys (masked); use moco.queue_size=9 or so",
            "2 of 14 sampled images can't be read",
            "text.jpg",
            "cut.png",
        ):
            assert sentence in faults
        assert seconds < 30


def test_a_wrong_number_of_groups_is_found_by_the_runs_own_rule() -> None:
    (faults, _), (same, _) = processes.run(examined, 2, "batch_size=18", "bn_groups=3")
    assert faults == same
    assert "bn_groups=3 can't be shared by 2 processes" in faults


def test_too_little_disk_and_memory_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(PretrainConfig, [*SMALL, f"output={tmp_path}/new/runs"])
    usage = shutil.disk_usage(tmp_path)
    needs = checks.estimate(config, 100, 1)
    assert not any(f.fault for f in checks.disk(config, 100))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    (finding,) = checks.disk(config, 100)
    assert "has 0.0 GB free and the checkpoints need" in finding.fault
    cpu = torch.device("cpu")
    for there, fault in ((2 * needs, False), (needs // 2, True)):
        monkeypatch.setattr(checks, "available", lambda n=there: n)
        (finding,) = checks.memory(config, cpu, 100)
        assert bool(finding.fault) == fault


def test_the_disk_must_hold_the_checkpoints_that_are_kept_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common, usage = [*SMALL, f"output={tmp_path}", "epochs=9"], shutil.disk_usage(tmp_path)

    def needed(*words: str) -> int:
        """Return the least free bytes with which there is no fault."""
        config, low, high = load(PretrainConfig, [*common, *words]), 0, 2**32
        while low < high:
            middle = (low + high) // 2
            monkeypatch.setattr(
                shutil, "disk_usage", lambda _, free=middle: usage._replace(free=free)
            )
            (finding,) = checks.disk(config, 100)
            low, high = (middle + 1, high) if finding.fault else (low, middle)
        return low

    steps = 100 // load(PretrainConfig, common).batch_size * 9
    one = needed("checkpoint.keep_last=3") - needed()
    assert needed("checkpoint.keep_every=2") - needed() == steps // 2 * one > 0


def test_the_estimate_grows_with_the_rows_of_a_process() -> None:
    """By what one more row keeps: the outputs of all layers, which two batches tell."""
    config = load(PretrainConfig, [*SMALL, "moco.queue_size=64"])
    one, two, four = (
        checks.estimate(dataclasses.replace(config, batch_size=16 * n), 0, 1) for n in (1, 2, 4)
    )
    assert four - two == 2 * (two - one) > 0
    split = dataclasses.replace(config.runtime, micro_batches=2)
    halves = dataclasses.replace(config, batch_size=32, runtime=split)
    assert (
        checks.estimate(halves, 0, 1)
        == one
        == checks.estimate(dataclasses.replace(config, batch_size=32), 0, 2)
    )


def test_a_silent_server_of_wandb_is_a_warning_after_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    config = load(PretrainConfig, [*SMALL, "tracking.wandb=online"])
    finding = checks.wandb(config)
    assert "does not answer" in finding.warning
    assert not finding.fault


def test_a_name_that_is_looked_up_for_long_is_a_warning_after_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_up = threading.Event()

    def connection(*_: object, **__: object) -> None:
        looked_up.wait()
        raise OSError

    monkeypatch.setattr(checks, "PATIENCE", 0.2)
    monkeypatch.setattr(socket, "create_connection", connection)
    finding = checks.wandb(load(PretrainConfig, [*SMALL, "tracking.wandb=online"]))
    looked_up.set()  # the answer did not wait for it
    assert "does not answer (nothing within 1.2 s)" in finding.warning


def test_unreadable_images_that_are_to_be_skipped_are_counted(tmp_path: Path) -> None:
    Image.new("RGB", (20, 30)).save(tmp_path / "good.png")
    (tmp_path / "text.jpg").write_text("no image")
    given = ["data.name=folder", f"data.root={tmp_path}", "data.skip_unreadable=true"]
    ((finding, *_), _) = images.data(load(PretrainConfig, given).data, channels=3)
    assert finding.fault == ""
    assert finding.found.endswith("in 2 sampled files, 1 of them unreadable and left out")


def test_colors_of_the_images_are_those_of_their_squares(tmp_path: Path) -> None:
    # Red is in all pixels of one image and in none of three; green is 51 of 255 in all.
    for number, red in enumerate((255, 0, 0, 0)):
        Image.new("RGB", (40, 30), (red, 51, 0)).save(tmp_path / f"{number}.png")
    config = load(PretrainConfig, ["data.name=folder", f"data.root={tmp_path}"]).data
    (_, colors, *_), _ = images.data(config, channels=3)
    spread = (0.25 * 0.75) ** 0.5
    assert f"views.mean=[0.2500,0.2000,0.0000] views.std=[{spread:.4f},0.0000," in colors.found
    (_, gray, *_), _ = images.data(config, channels=1)
    assert re.match(r"views.mean=\[0\.\d{4}\] views.std=\[0\.\d{4}\] are", gray.found)


def test_a_process_that_can_not_reach_the_others_is_told_so(tmp_path: Path) -> None:
    """The second of two processes is never started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    place |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    arguments = [*SMALL, f"output={tmp_path}", "runtime.timeout_seconds=2"]
    command = [sys.executable, "-m", "moco_dist.doctor", *arguments]
    done = subprocess.run(
        command, env=os.environ | place, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "process 0 of 2" in done.stderr
    assert f"did not meet the others at 127.0.0.1:{port} within 2 s" in done.stderr
