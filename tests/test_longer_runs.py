"""A run that is given another length when it resumes: warned of where that matters, and noted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load, stored
from tests.faults.jobs import TINY, Job, figures, metrics

# 5 steps an epoch.
RUN = [*TINY, "knn.every_epochs=0", "optim.lr=0.03"]


def launch(output: Path, *arguments: str) -> str:
    with Job(output, *RUN, *arguments) as job:
        assert job.wait(60) == [0], job.text()
        text = job.text()
    job.log.unlink()
    return text


def rate(step: int, epochs: int) -> float:
    return 0.03 * (1 + math.cos(math.pi * step / (5 * epochs))) / 2


def test_more_epochs_on_a_finished_run_are_warned_of_and_noted_in_it(tmp_path: Path) -> None:
    assert "WARNING" not in launch(tmp_path, "epochs=4")
    text = launch(tmp_path, "epochs=8")
    lines = metrics(tmp_path / "run")
    rates = {line["step"]: line["train/lr"] for line in lines if "train/lr" in line}
    assert rates[20] == pytest.approx(rate(19, 4), rel=1e-12)
    assert rates[21] == pytest.approx(rate(20, 8), rel=1e-12)
    sentence = (
        f"epochs=8 was 4 until step 20, so the learning rate goes from {rate(19, 4):.3g} to "
        f"{rate(20, 8):.3g} in one step"
    )
    assert " ".join(text.split()).count(f"WARNING: {sentence}") == 1
    config = tmp_path / "run" / "config.yaml"
    (alarm,) = (each for each in lines if each.get("alarm") == "another length")
    assert alarm["step"] == 20
    assert alarm["text"].startswith(sentence)
    # What was noted stays, and the file is a configuration as before.
    assert "WARNING" not in launch(tmp_path, "epochs=8")
    launch(tmp_path, "epochs=9")
    assert config.read_text().splitlines()[:2] == [
        "# epochs was 4 before; it is 8 from step 20 on",
        "# epochs was 8 before; it is 9 from step 40 on",
    ]
    assert load(PretrainConfig, [str(config)]).epochs == stored(config)["epochs"] == 9


def test_in_the_middle_of_a_run_it_is_the_same_kind_of_change(tmp_path: Path) -> None:
    launch(tmp_path, "epochs=4", "stop_at_step=10", "moco.momentum_schedule=cosine")
    text = launch(tmp_path, "epochs=2", "stop_at_step=10", "moco.momentum_schedule=cosine")
    assert "WARNING" not in text  # nothing is left to do, and so nothing jumps
    text = launch(tmp_path, "epochs=8", "stop_at_step=12", "moco.momentum_schedule=cosine")
    momentum = [1 - 0.01 * rate(step, epochs) / 0.03 for step, epochs in ((9, 4), (10, 8))]
    assert f"goes from {rate(9, 4):.3g} to {rate(10, 8):.3g} and the key momentum goes" in text
    assert f"from {momentum[0]:.3g} to {momentum[1]:.3g} in one step" in text


def test_a_schedule_without_an_end_goes_on_as_if_it_had_been_longer(tmp_path: Path) -> None:
    settings = ["optim.schedule=step", "optim.milestones=[1,3]", "optim.warmup_epochs=1"]
    launch(tmp_path / "raised", "epochs=2", *settings)
    assert "WARNING" not in launch(tmp_path / "raised", "epochs=4", *settings)
    launch(tmp_path / "straight", "epochs=4", *settings)
    raised, straight = (figures(tmp_path / each / "run") for each in ("raised", "straight"))
    assert raised == straight
    first, *_ = (tmp_path / "raised" / "run" / "config.yaml").read_text().splitlines()
    assert first == "# epochs was 2 before; it is 4 from step 10 on"
