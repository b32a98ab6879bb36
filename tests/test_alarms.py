"""Each alarm is told once of a cause that was really planted, and none of a healthy run."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.errors import NumbersError
from moco_dist.method import views
from moco_dist.pretrain import run as pretrain_run
from moco_dist.pretrain.trainer import Trainer
from tests import processes
from tests.test_launch import ROOT, python

SMALL = [
    *("batch_size=16", "bn_groups=8", "encoder.width=4", "encoder.dim=16", "encoder.head=mlp"),
    *("data.shapes_train=400", "data.shapes_test=20", "data.size=16", "views.size=16"),
    *("moco.queue_size=64", "optim.schedule=constant", "knn.every_epochs=0"),
    *("checkpoint.every_epochs=0", "runtime.device=cpu"),
    *("tracking.every_steps=2", "tracking.health_every_steps=5"),
]
# The one alarm that others who use the machine of the test can set off, after 90 lines.
BUSY = "throughput halved"
FIX = re.compile(r"\b(use|train again|check|look at) ")


def alarms(run: Path) -> list[tuple[int, str]]:
    """Return step and name of the alarms in the metrics of a run; each has its way out."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in found if "alarm" in line]
    for line in told:
        assert FIX.search(line["text"].lower()), line["text"]
        assert {"step", "time", "alarm", "text"} == line.keys()
    return [(line["step"], line["alarm"]) for line in told]


def draw(folder: Path, images: list[np.ndarray[Any, Any]]) -> None:
    """Write images as DIR/train/CLASS/n.png, with classes that say nothing."""
    random = np.random.default_rng(0)
    for name in ("0", "1"):
        (folder / "train" / name).mkdir(parents=True)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"train/{random.integers(2)}/{number}.png")


def of_folder(folder: Path) -> list[str]:
    return ["data.name=folder", f"data.root={folder}", f"data.cache={folder / 'cache'}"]


def test_a_healthy_run_has_no_alarm(tmp_path: Path) -> None:
    # These are 85 lines.
    healthy = ["optim.lr=0.03", "moco.temperature=0.2", "stop_at_step=140", "epochs=20"]
    healthy += ["moco.momentum=0.99", "batch_size=32", "bn_groups=4", "views.scale_min=0.5"]
    result = python("pretrain", *SMALL, *healthy, f"output={tmp_path}", "name=ok")
    assert (result.returncode, result.stderr) == (0, "")
    assert alarms(tmp_path / "ok") == []


def test_a_learning_rate_of_1000_collapses_and_it_is_told_once_over_a_resume(
    tmp_path: Path,
) -> None:
    run = [*SMALL, "optim.lr=1000", "moco.temperature=0.2", f"output={tmp_path}", "name=lr"]
    first = python("pretrain", *run, "stop_at_step=40")
    assert first.returncode == 0, first.stderr
    assert first.stderr.count("WARNING: collapse at step ") == 1
    assert "optim.lr below 1000" in first.stderr
    told = alarms(tmp_path / "lr")
    assert [name for _, name in told].count("collapse") == 1
    second = python("pretrain", *run, "stop_at_step=60")
    assert second.returncode == 0, second.stderr
    assert "collapse" not in second.stderr
    assert [name for _, name in alarms(tmp_path / "lr")].count("collapse") == 1


def test_an_alarm_that_a_resumed_run_comes_to_again_is_told_again(tmp_path: Path) -> None:
    run = [*SMALL, "optim.lr=1000", "moco.temperature=0.2", f"output={tmp_path}", "name=cut"]
    assert python("pretrain", *run, "stop_at_step=8").returncode == 0
    assert alarms(tmp_path / "cut") == []
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:  # of a part that was lost
        file.write('{"step": 20, "time": 1.0, "alarm": "collapse", "text": "lost"}\n')
    result = python("pretrain", *run, "stop_at_step=40")
    assert result.stderr.count("WARNING: collapse at step ") == 1
    names = [name for _, name in alarms(tmp_path / "cut")]
    assert names.count("collapse") == 1


def test_images_that_are_all_the_same_are_told_of(tmp_path: Path) -> None:
    draw(tmp_path / "same", [np.full((16, 16, 3), 128, np.uint8)] * 100)
    run = [*SMALL, *of_folder(tmp_path / "same"), "stop_at_step=110", "epochs=40"]
    result = python("pretrain", *run, "moco.queue_size=32", f"output={tmp_path}", "name=same")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("WARNING: collapse at step ") == 1
    assert "check that the images differ" in result.stderr
    assert [name for _, name in alarms(tmp_path / "same")] == ["collapse"]


def test_a_queue_longer_than_the_data_is_told_of_before_the_first_step(tmp_path: Path) -> None:
    run = [*SMALL, "moco.queue_size=360", "optim.lr=0.01", f"output={tmp_path}", "name=long"]
    for steps in (2, 4):
        result = python("pretrain", *run, f"stop_at_step={steps}")
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("moco.queue_size=360 is not below the 360 training images") == 1
    assert alarms(tmp_path / "long") == [(1, "queue longer than the data")]


@pytest.mark.slow
def test_keys_that_move_too_fast_make_the_loss_rise(tmp_path: Path) -> None:
    run = [*SMALL, "optim.lr=0.1", "moco.queue_size=256", "data.size=20", "epochs=40"]
    run += ["moco.momentum=0.9", "stop_at_step=630", f"output={tmp_path}", "name=rise"]
    result = python("pretrain", *run)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("WARNING: loss rises at step ") == 1
    assert "moco.momentum above 0.9" in result.stderr


def with_nan(output: str) -> str:
    make = views.make

    def spoiled(images: Tensor, config: Any, seed: int, epoch: int, *others: Any) -> Tensor:
        made = make(images, config, seed, epoch, *others)
        if epoch == 1:
            made[0, 1, 2, 3] = torch.nan
        return made

    views.make = spoiled  # type: ignore[assignment]
    try:
        pretrain_run.run(load(PretrainConfig, [*SMALL, f"output={output}", "name=nan"]))
    except NumbersError as error:
        return str(error)
    return "nothing"


def test_a_pixel_that_is_not_a_number_ends_the_run_and_stands_in_its_metrics(
    tmp_path: Path,
) -> None:
    text = processes.run(with_nan, 2, str(tmp_path))[0]
    assert "keys, train/loss, gradient not finite in step 22" in text
    assert alarms(tmp_path / "nan") == [(22, "not finite")]
    noted = json.loads((tmp_path / "nan" / "not_finite.json").read_text())
    assert noted["step"] == 22
    assert len(noted["samples"]) == 16
    assert noted["images_not_finite"]
    assert (tmp_path / "nan" / "checkpoints" / "step_00000022").is_dir()


def slowed(output: str) -> None:
    step = Trainer.train_step

    def waits(self: Trainer, *arguments: Any) -> Any:
        time.sleep(0.2 if self.step >= 70 else 0.0)
        return step(self, *arguments)

    Trainer.train_step = waits  # type: ignore[assignment, method-assign]
    fast = ["tracking.every_steps=1", "tracking.health_every_steps=0", "knn.every_epochs=1"]
    fast += ["checkpoint.every_epochs=1", "stop_at_step=115", "optim.lr=0.001"]
    pretrain_run.run(load(PretrainConfig, [*SMALL, *fast, f"output={output}", "name=slow"]))


def test_half_the_throughput_is_told_of_and_evaluations_and_saves_are_not(tmp_path: Path) -> None:
    processes.run(slowed, 1, str(tmp_path))
    ((step, name),) = alarms(tmp_path / "slow")
    assert name == BUSY
    assert 80 <= step <= 105


LEAKY = [
    *("data.size=16", "views.size=16", "views.scale_min=0.8", "views.jitter=0", "views.flip=0"),
    *("views.grayscale=0", "data.validation=0.4", "batch_size=8", "encoder.width=4"),
    *("encoder.dim=32", "moco.queue_size=32", "epochs=16", "knn.every_epochs=4"),
    *("knn.at_start=true", "runtime.device=cpu", "tracking.every_steps=5"),
]


@pytest.fixture(scope="module")
def blanks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of which each second one is blank: only its batch can tell it from other blanks."""
    folder = tmp_path_factory.mktemp("blanks")
    random, images = np.random.default_rng(0), []
    for number in range(800):
        pixels = np.full((16, 16, 3), 128, np.uint8)
        if number % 2 == 0:
            pixels[:], pixels[:8] = random.choice([0, 255], 3), random.choice([0, 255], 3)
        images.append(pixels)
    draw(folder, images)
    return folder


@pytest.mark.slow
def test_one_batchnorm_group_leaks_and_alarm_and_doctor_find_it(
    blanks: Path, tmp_path: Path
) -> None:
    run = [*LEAKY, *of_folder(blanks), f"output={tmp_path}"]
    leaks = python("pretrain", *run, "bn_groups=1", "name=leaks")
    assert leaks.returncode == 0, leaks.stderr
    assert leaks.stderr.count("WARNING: BatchNorm leak at step ") == 1
    told = [name for _, name in alarms(tmp_path / "leaks")]
    assert [name for name in told if name != BUSY] == ["BatchNorm leak"]
    sick = python("doctor", str(tmp_path / "leaks"), "--bn-leak")
    assert sick.returncode == 78
    assert sick.stderr.startswith("error: BatchNorm leak: under bn_groups=1, ")
    shared, shuffled = accuracies(sick.stdout)
    # No more than the images that aren't blank can be told by what they show.
    assert shared > 0.9
    assert shuffled < 0.55


def accuracies(table: str) -> tuple[float, float]:
    shared, shuffled = (float(number) / 100 for number in re.findall(r"([\d.]+)%", table))
    return shared, shuffled


@pytest.mark.slow
def test_shuffled_groups_do_not_leak(blanks: Path, tmp_path: Path) -> None:
    run = [*LEAKY, *of_folder(blanks), f"output={tmp_path}", "bn_groups=4", "name=safe"]
    trained = python("pretrain", *run, "stop_at_step=400")
    assert (trained.returncode, trained.stderr) == (0, "")
    assert alarms(tmp_path / "safe") == []
    for source in ([str(tmp_path / "safe")], run):  # the run, or the configuration that wrote it
        result = python("doctor", *source, "--bn-leak")
        assert (result.returncode, result.stderr) == (0, "")
        assert "No leak: bn_groups=4 keeps the groups of queries and keys apart." in result.stdout
        assert "after step 400" in result.stdout.replace("\n", " ")


def test_the_doctor_trains_for_a_while_where_there_is_no_run(tmp_path: Path) -> None:
    run = [*SMALL, "epochs=1", f"output={tmp_path}", "name=none"]
    result = python("doctor", *run, "bn_groups=1", "--bn-leak")
    assert result.returncode == 0, result.stderr
    assert "22 steps of training" in " ".join(result.stdout.split())
    assert not list(tmp_path.iterdir())


def test_the_doctor_refuses_what_it_can_not_measure_in_a_sentence(tmp_path: Path) -> None:
    sentence = (
        "error: there is no check --leak; give --bn-leak or --all-files, or none for the table\n"
    )
    result = python("doctor", f"output={tmp_path}", "--leak")
    assert (result.returncode, result.stderr, result.stdout) == (78, sentence, "")
    many = python("doctor", f"output={tmp_path}", "--bn-leak", WORLD_SIZE="2")
    assert many.returncode == 78
    assert many.stderr.startswith("error: 2 processes were started, and --bn-leak needs one")


@pytest.mark.slow
def test_the_demo_has_no_alarm(tmp_path: Path) -> None:
    command = ["bash", "launch/demo.sh", f"output={tmp_path}", "name=demo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert {name for _, name in alarms(tmp_path / "demo")} <= {BUSY}
