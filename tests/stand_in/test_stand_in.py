"""On a stand-in for GPUs: what a step launches and waits for, whole commands, several processes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import image_sets, stand_in
from tests.test_mechanisms import KINDS

pytestmark = pytest.mark.stand_in

PAPER = "configs/pretrain/paper.yaml"
ADAMW = ["optim.name=adamw", "views_2={blur: 0.1, solarize: 0.2}"]
DATA = ["data.shapes_train=100", "data.shapes_test=30", "data.size=16", "views.size=16"]
TINY = [
    *("batch_size=16", "bn_groups=8", "encoder.width=4", "encoder.dim=8", "moco.queue_size=40"),
    *(*DATA, "epochs=3", "knn.every_epochs=1", "knn.k=5", "tracking.every_steps=2"),
    *("tracking.media_every_epochs=1", "tracking.health_every_steps=3", "runtime.device=cuda"),
]


def steps_of(path: Path) -> list[dict[str, Any]]:
    """Return the `launches` of each step of a command, and its `waits` by place."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def status(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "status.json").read_text())
    return content


def pretrained(
    output: Path, *arguments: str, gpus: int = 2, **more: str
) -> subprocess.CompletedProcess[str]:
    """Pretrain on two processes."""
    command = ["pretrain", *TINY, f"output={output}", "name=run", *arguments]
    return stand_in.torchrun(
        2, "tests.stand_in.command", *command, folder=output, gpus=gpus, **more
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the arguments of a small set that is streamed."""
    root = image_sets.write_folder(tmp_path_factory.mktemp("images"), 100, 32)
    small = ["batch_size=32", "views.size=32", "data.size=32", "encoder.width=8"]
    return ["data.name=folder", f"data.root={root}", "data.memory_gb=0", "data.workers=1", *small]


def test_a_step_launches_few_kernels_and_waits_once(images: list[str]) -> None:
    groups, one_group, streamed, symmetric = stand_in.measured(
        [PAPER, "precision=bf16"],
        [PAPER, "precision=bf16", "bn_groups=1"],
        [PAPER, *images],
        [PAPER, *images, "moco.symmetric=true"],
    )
    assert groups["launches"] < 840
    assert groups["memsets"] < 30
    # Grouped BatchNorm takes as many kernels whatever the number of groups.
    assert groups["launches"] - one_group["launches"] < 100
    for found in (groups, one_group, streamed, symmetric):
        assert found["waits"] <= 1, found["where"]
        assert sum(found["where"].values()) <= 1, found["where"]


def test_a_captured_step_is_a_few_launches_without_a_wait(images: list[str]) -> None:
    streamed, memory, *others = stand_in.measured(
        [PAPER, *images],
        [PAPER, "precision=bf16"],
        *([PAPER, "encoder.width=8", *words] for words in (*KINDS.values(), ADAMW)),
        captured=True,
    )
    for found in (streamed, memory, *others):
        assert found["waits"] == 0, found["where"]
        assert not found["where"]
    # Streamed crops are put in order outside of the graphs.
    assert max(found["launches"] for found in (memory, *others)) <= 3
    assert memory["cpu_ms"] < 1
    # What eager steps held is given up for the graph, which holds as much.
    assert memory["held"] < 1.5


def test_a_captured_step_with_a_bad_number_is_refused_one_step_later_as_if_it_never_was() -> None:
    ended = stand_in.python("tests.stand_in.refused", PAPER, "encoder.width=8")
    assert ended.returncode == 0, ended.stderr
    marked, told, step, before, enqueued = json.loads(ended.stdout.splitlines()[-1])
    assert told == marked == step
    assert enqueued == before


def test_whole_commands_run_on_a_gpu(tmp_path: Path) -> None:
    command, output = "tests.stand_in.command", f"output={tmp_path}"
    words = [*TINY, output, "name=run", "precision=bf16", "monitor.linear=true"]
    ended = stand_in.python(command, "pretrain", *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert status(tmp_path / "run")["step"] == 15
    # What PyTorch says of an operation without a deterministic kernel would be there.
    assert "deterministic" not in ended.stderr, ended.stderr
    probe = ["batch_size=16", "epochs=2", "runtime.device=cuda", *DATA, "grid.lr=[0.1,1]"]
    probe += ["checkpoint.every_epochs=0"]  # the copies of a save wait, in a thread of their own
    arguments = [f"encoder={tmp_path / 'run'}", *probe, output]
    noted = {"STEPS": str(tmp_path / "steps")}
    ended = stand_in.python(command, "probe", *arguments, environment=noted)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    first, *others = (step["waits"] for step in steps_of(tmp_path / "steps0"))
    assert len(others) == 9
    # Whether the steps before it were good, and the capture of views and encoders.
    assert sum(first.values()) == 2
    assert not any(others), others
    several = ["name=several", "control=false", "augment=true"]
    ended = stand_in.torchrun(2, command, "probe", *arguments, *several, folder=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert status(tmp_path / "several")["step"] == 10


@pytest.mark.parametrize(
    ("words", "launches"),
    [
        ((), 40),
        (("moco.symmetric=true", "runtime.gradients=bf16", "precision=bf16"), 60),
        ((*KINDS["simclr"], "runtime.micro_batches=2"), 50),
        (KINDS["bank"], 40),
        (("bn_groups=1",), 1100),  # a group that spans both processes is never captured
    ],
)
def test_several_processes_call_the_same_collectives_and_launch_little(
    tmp_path: Path, words: tuple[str, ...], launches: int
) -> None:
    log, noted = tmp_path / "collectives.", tmp_path / "steps"
    several = {"FAKE_NCCL_LOG": str(log), "STEPS": str(noted)}
    calm = (
        "checkpoint.every_epochs=0",
        "checkpoint.keep_best=false",
    )  # made-up numbers choose the best
    ended = pretrained(tmp_path, *words, *calm, gpus=2, **several)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    first, second = (Path(f"{log}{rank}").read_text().splitlines() for rank in range(2))
    assert first == second
    assert len(first) > 15
    # Keys and notes are one collective, and no list of broadcasts.
    assert not any("broadcast" in each for each in first[-20:])
    for rank in range(2):
        steps = steps_of(Path(f"{noted}{rank}"))
        assert len(steps) == 15
        # Health is due in every third step, and the first ten of DistributedDataParallel are
        # measured now and then.
        for step in steps[12:14]:
            # What all agree on, and whether all is finite.
            assert sum(step["waits"].values()) <= 2, step
            assert step["launches"] < launches, step


def test_a_dead_process_is_named_while_a_collective_never_returns(tmp_path: Path) -> None:
    ended = pretrained(tmp_path, "epochs=99", "knn.every_epochs=0", KILL_AT="7")
    assert ended.returncode != 0
    found = status(tmp_path / "run")
    assert (found["exit_status"], found["again"]) == (70, True)
    assert found["reason"].startswith("process 1 (host ")
    assert "died, at step 7, " in found["reason"]
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {found['reason']}"]


def test_two_processes_on_one_gpu_are_refused(tmp_path: Path) -> None:
    ended = pretrained(tmp_path, gpus=1)
    assert ended.returncode != 0
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.stderr
    assert "processes 0 and 1 on " in errors[0]
    assert "have the same GPU " in errors[0]
    assert "start one process for each GPU" in errors[0]
    assert not (tmp_path / "run").exists()
