"""A sweep of W&B: its overrides are read, its runs never meet, and their accuracies arrive."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.running import TrackingConfig
from moco_dist.config.yaml_files import load
from moco_dist.runs import slurm_job
from moco_dist.tracking.wandb_run import WandbRun
from tests.test_documents import blocks
from tests.test_launch import BIN, ROOT, TINY, lines
from tests.test_wandb import command
from tests.wandb_server import WandbServer

EXAMPLE: dict[str, Any] = yaml.safe_load(blocks(ROOT / "docs/tracking.md", "yaml")[0])
EPOCHS = ["tracking.media_every_epochs=0", "runtime.device=cpu", "data.validation=0.5"]


def in_sweep(monkeypatch: pytest.MonkeyPatch, sweep: str = "s1", run: str = "x7k2") -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
    monkeypatch.setenv("WANDB_RUN_ID", run)


def test_a_run_of_a_sweep_has_a_name_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    probe = ["probe/cifar10", "encoder=runs/a"]
    for sweep, names in (("s1", ["cifar10-x7k2", "a-probe-x7k2"]), ("", ["cifar10", "a-probe"])):
        in_sweep(monkeypatch, sweep)  # an exported WANDB_RUN_ID alone is no sweep
        assert load(PretrainConfig, ["pretrain/cifar10"]).name == names[0]
        assert load(ProbeConfig, probe).run_name() == names[1]
    in_sweep(monkeypatch)
    assert load(PretrainConfig, ["pretrain/cifar10", "name=mine"]).name == "mine"
    # What Slurm's scripts look for is where the run goes.
    found = slurm_job.directory("pretrain", ["pretrain/cifar10", f"output={tmp_path}"])
    assert found == tmp_path / "cifar10-x7k2"


@pytest.mark.parametrize(("own", "part"), [("x7k2", True), ("before", False)])
def test_a_run_with_another_id_is_not_written_into_that_of_the_sweep(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str, part: bool
) -> None:
    in_sweep(monkeypatch)
    said: list[str] = []
    identity: Mapping[str, str] = {"id": own, "name": "a", "group": "g", "job_type": "pretrain"}
    run = WandbRun(TrackingConfig(), tmp_path, identity, {}, said.append)
    assert (run.sweep == "s1") == part
    assert said == ([] if part else ["W&B: this run has its own id before; sweep s1 lacks it"])


def test_the_example_sweeps_keys_that_there_are() -> None:
    words = EXAMPLE["command"]
    place = words.index("moco_dist.pretrain")
    assert words[: place + 1] == ["accelerate", "launch", "-m", "moco_dist.pretrain"]
    assert words[-1] == "${args_no_hyphens}"
    for key, values in EXAMPLE["parameters"].items():
        for value in values.get("values", [values.get("value")]):
            load(PretrainConfig, [*words[place + 1 : -1], f"{key}={value}"])


def test_a_task_of_slurm_is_an_agent_that_passes_signals_on(tmp_path: Path) -> None:
    fake = tmp_path / "srun"
    fake.write_text('#!/bin/bash\necho "$@"\necho "$WANDB_MODE $PET_SIGNALS_TO_HANDLE"\n')
    fake.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "slurm/sweep.sbatch", "me/project/s1"],
        cwd=ROOT,
        env=os.environ | path,
        capture_output=True,
        text=True,
        check=True,
    )
    asked, environment = done.stdout.splitlines()
    assert asked == "--ntasks=1 wandb agent --forward-signals me/project/s1"
    assert environment.split()[0] == "online"
    assert "SIGUSR1" in environment


@pytest.mark.slow
def test_an_agent_runs_the_example_three_times_and_the_server_has_the_accuracies(
    tmp_path: Path,
) -> None:
    """The program is that of this checkout, and the run small; all else is the page's."""
    own = [*command("pretrain"), *TINY, *EPOCHS, "${args_no_hyphens}"]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(EXAMPLE | {"command": own}))
    with WandbServer() as server:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
        environment = kept | server.environment | {"PYTHONPATH": str(ROOT)}
        for words in (["sweep", "sweep.yaml"], ["agent", "me/moco_dist/sweep0"]):
            done = subprocess.run(
                [sys.executable, "-m", "wandb", *words],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                timeout=400,
            )
            assert done.returncode == 0, done.stdout + done.stderr
        rates = EXAMPLE["parameters"]["optim.lr"]["values"]
        assert sorted(server.runs) == server.begun["sweep0"] == [f"sweep0run{i}" for i in range(3)]
        for name, rate in zip(server.begun["sweep0"], rates, strict=True):
            run = tmp_path / "runs" / f"pretrain-{name}"
            assert server.runs[name]["sweep"] == "sweep0"
            assert server.runs[name]["exit"] == 0
            config = json.loads(server.runs[name]["config"])
            assert config["optim"]["value"]["lr"] == rate
            assert config["moco"]["value"]["temperature"] == 0.2
            measured = [line["knn/top1"] for line in lines(run) if "knn/top1" in line]
            assert len(measured) == 3
            assert server.summary(name)["knn/top1"] == pytest.approx(measured[-1])
            history = [row["knn/top1"] for row in server.history(name) if "knn/top1" in row]
            assert history == pytest.approx(measured)
