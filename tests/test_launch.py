"""The commands of the README, really launched: exit statuses, output, traps of launchers."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from moco_dist.runs import checkpoint

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TINY = [
    *("batch_size=16", "bn_groups=8", "encoder.width=4", "encoder.dim=8", "moco.queue_size=40"),
    *("data.shapes_train=100", "data.shapes_test=30", "data.size=16", "views.size=16"),
    *("epochs=2", "knn.every_epochs=1", "knn.at_start=true", "tracking.every_steps=2"),
]
# Groups of two rows blow up rounding: in fp32 up to 2e-2 in ten steps, between one process and two.
EXACT = [*TINY, "precision=fp64"]


def launch(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **environment}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        encoding="utf-8",
        errors="backslashreplace",  # some tests have a locale of another encoding
        env=environment,
        cwd=ROOT,
        check=False,
        timeout=300,
    )


def python(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return launch(sys.executable, "-m", f"moco_dist.{module}", *arguments, **environment)


def accelerate(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Start two gloo processes with the launcher's command of the README."""
    command = [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", *arguments]
    return launch(*command, ACCELERATE_USE_CPU="true")


def lines(run: Path) -> list[dict[str, float]]:
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert read[0] == {"schema": "moco_dist.metrics", "version": 1}
    return read[1:]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining by `accelerate launch` on two processes, with its output in console.txt."""
    output = tmp_path_factory.mktemp("runs")
    result = accelerate("-m", "moco_dist.pretrain", *EXACT, f"output={output}", "name=two")
    assert result.returncode == 0, result.stderr
    (output / "console.txt").write_text(result.stdout)
    return output / "two"


def test_accelerate_launch_writes_the_run_directory(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    files = {"config.yaml", "environment.json", "metrics.jsonl", "status.json"}
    assert names == files | {"checkpoints", "media", "run_id.json", "DONE"}
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    steps = [line["step"] for line in lines(run) if "train/loss" in line]
    assert steps == [1, 2, 4, 5, 6, 8, 10]  # 90 images are 5 steps of 16 an epoch
    assert [line["step"] for line in lines(run) if "knn/top1" in line] == [0, 5, 10]
    saved = {path.name for path in (run / "checkpoints").iterdir()}
    assert saved == {"step_00000005", "step_00000010"}
    assert "knn/top1" in json.loads((run / "DONE").read_text())


def test_the_console_without_a_terminal_is_plain_lines_from_one_process(run: Path) -> None:
    text = (run.parent / "console.txt").read_text()
    assert "\x1b" not in text
    assert text.count("moco_dist pretrain") == 1
    assert text.count(" 10/10 epoch   2.0 loss") == 1
    batch = "batch      16 = 2 x 8, 8 BatchNorm groups of 2"
    for word in ("processes  2 (CPU", batch, "fp64", "torch 2."):
        assert word in text


def test_the_queue_fills_and_the_loss_starts_from_nothing(run: Path) -> None:
    training = [line for line in lines(run) if "train/loss" in line]
    assert training[0]["train/loss"] == 0
    assert [line["queue/fill"] for line in training] == [0.4, 0.8, 1, 1, 1, 1, 1]
    assert training[2]["train/loss"] > training[1]["train/loss"] > 0


def test_python_m_and_torchrun_give_the_run_of_accelerate_launch(run: Path, tmp_path: Path) -> None:
    alone = python("pretrain", *EXACT, f"output={tmp_path}", "name=alone", "runtime.device=cpu")
    assert alone.returncode == 0, alone.stderr
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    torchrun += ["-m", "moco_dist.pretrain", *EXACT, f"output={tmp_path}", "name=torchrun"]
    result = launch(*torchrun, ACCELERATE_USE_CPU="true")
    assert result.returncode == 0, result.stderr
    by_accelerate = load_file(run / "checkpoints" / "step_00000010" / "model.safetensors")
    for name, tolerance in (("torchrun", 0.0), ("alone", 1e-8)):
        model = load_file(tmp_path / name / "checkpoints" / "step_00000010" / "model.safetensors")
        for key, tensor in model.items():
            assert (tensor - by_accelerate[key]).abs().max() <= tolerance, (name, key)


@pytest.mark.parametrize(
    ("file", "launchers", "processes"),
    [("one_gpu", 1, 1), ("eight_gpus", 1, 2), ("several_nodes", 2, 2), ("two_cpus", 1, 2)],
)
def test_the_accelerate_files_start_what_they_say(
    tmp_path: Path, file: str, launchers: int, processes: int
) -> None:
    """On CPUs, and eight_gpus and several_nodes with fewer processes, as their headers allow."""
    command = [str(BIN / "accelerate"), "launch", "--config_file", f"launch/{file}.yaml"]
    if file in ("eight_gpus", "several_nodes"):
        command += ["--num_processes", str(processes)]
    if launchers > 1:
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    run = [*TINY, "epochs=1", f"output={tmp_path}", "name=run", f"runtime.processes={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    started = []
    for machine in range(launchers):
        place = ["--machine_rank", str(machine)] if launchers > 1 else []
        line = [*command, *place, "-m", "moco_dist.pretrain", *run]
        started.append(subprocess.Popen(line, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL))
    assert [launcher.wait(timeout=120) for launcher in started] == [0] * launchers
    found = json.loads((tmp_path / "run" / "environment.json").read_text())["processes"]
    assert found == processes


def free_port() -> int:
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))
        port: int = mine.getsockname()[1]
        return port


def test_a_finished_run_says_so_and_is_left_as_it_is(run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}
    result = python("pretrain", *EXACT, f"output={run.parent}", "name=two", "runtime.device=cpu")
    assert result.returncode == 0, result.stderr
    assert "is at step 10 of 10: nothing is left to do." in result.stdout
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")} == before


def test_an_interrupted_run_resumes_and_no_step_is_logged_twice(tmp_path: Path) -> None:
    common = [*TINY, f"output={tmp_path}", "runtime.device=cpu", "tracking.every_steps=1"]
    straight = python("pretrain", *common, "name=straight")
    first = python("pretrain", *common, "name=parts", "stop_at_step=7")
    assert first.returncode == straight.returncode == 0
    assert not (tmp_path / "parts" / "DONE").exists()
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:  # the last line is cut short
        file.write('{"step": 8, "train/loss": 1.0}\n{"step": 9, "train')
    second = python("pretrain", *common, "name=parts")
    assert "resumed    at step 7, from step_00000007" in second.stdout
    steps = [line["step"] for line in lines(tmp_path / "parts") if "train/loss" in line]
    assert steps == list(range(1, 11))
    parts, whole = (tmp_path / name / "checkpoints/step_00000010" for name in ("parts", "straight"))
    for name in checkpoint.FILES:
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"


def test_a_finished_run_can_be_trained_longer(tmp_path: Path) -> None:
    common = [*TINY, "knn.every_epochs=0", f"output={tmp_path}", "name=longer"]
    common += ["runtime.device=cpu"]
    assert python("pretrain", *common).returncode == 0
    result = python("pretrain", *common, "epochs=3")
    assert result.returncode == 0, result.stderr
    assert "resumed    at step 10" in result.stdout
    assert lines(tmp_path / "longer")[-1]["step"] == 15


@pytest.mark.parametrize("module", ["pretrain", "probe"])
def test_help_shows_the_commands_and_every_default(module: str) -> None:
    result = python(module, "--help")
    assert result.returncode == 0
    pretrain = "accelerate launch -m moco_dist.pretrain"
    for text in (pretrain, "moco_dist.probe", "temperature: 0.1", "lr: "):
        assert text in result.stdout


@pytest.mark.parametrize("module", ["doctor", "bench"])
def test_help_of_other_commands_shows_theirs_alone(module: str) -> None:
    text = python(module, "--help").stdout
    assert set(re.findall(r"moco_dist\.(\w+)", text)) == {module}
    assert "each key" in text
    assert "temperature: 0.1" in text


def test_a_mistake_is_one_sentence_and_exit_status_78() -> None:
    result = python("pretrain", "moco.queu_size=3")
    assert result.returncode == 78
    assert result.stderr == (
        "error: moco.queu_size=3: there is no key 'moco.queu_size'; "
        "did you mean 'moco.queue_size'?\n"
    )
    assert result.stdout == ""


def test_threads_that_wait_leave_their_core_to_other_programs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """OpenMP itself says what it read when PyTorch loaded it; it has another default."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # this process has imported moco_dist
    code = "import moco_dist, torch"
    result = launch(sys.executable, "-c", code, OMP_DISPLAY_ENV="VERBOSE")
    assert "GOMP_SPINCOUNT = '30000'" in result.stderr
    result = launch(sys.executable, "-c", code, OMP_DISPLAY_ENV="VERBOSE", OMP_WAIT_POLICY="ACTIVE")
    assert "OMP_WAIT_POLICY = 'ACTIVE'" in result.stderr
    assert "GOMP_SPINCOUNT = '30000'" not in result.stderr


def test_asking_for_more_processes_than_there_are_is_an_error(tmp_path: Path) -> None:
    # With --cpu and --num_processes 2 Accelerate 1.15 silently starts one process.
    command = [str(BIN / "accelerate"), "launch", "--cpu", "--num_processes", "2"]
    command += ["-m", "moco_dist.pretrain", *TINY, f"output={tmp_path}", "runtime.processes=2"]
    result = launch(*command)
    assert result.returncode != 0
    assert (
        "error: runtime.processes=2 and 1 took part; start that many (on CPUs: "
        "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 -m ...)"
    ) in result.stderr
    assert not list(tmp_path.iterdir())


def test_groups_that_the_processes_cannot_share_are_refused_once(tmp_path: Path) -> None:
    uneven = [*TINY, "batch_size=18", "bn_groups=3", f"output={tmp_path}"]
    result = accelerate("-m", "moco_dist.pretrain", *uneven)
    assert result.returncode != 0
    sentence = (
        "error: bn_groups=3 can't be shared by 2 processes; use 1 or 3 processes or a multiple "
        "of 3, or set bn_groups to 1 or 2 or a multiple of 2\n"
    )
    assert result.stderr.count(sentence) == 1


def test_warnings_say_what_is_lost(tmp_path: Path) -> None:
    tiny = [*TINY, "stop_at_step=1", "runtime.device=cpu", "knn.at_start=false"]
    tiny += [f"output={tmp_path}"]
    leak = python("pretrain", *tiny, "bn_groups=1", "name=leak")
    warning = "WARNING: bn_groups=1: queries and keys share their BatchNorm statistics"
    assert leak.stderr.count(warning) == 1
    long = python("pretrain", *tiny, "moco.queue_size=90", "name=long")
    assert long.stderr == (
        "WARNING: moco.queue_size=90 is not below the 90 training images: every image meets its "
        "own older keys (masked); use moco.queue_size=16 or so\n"
    )


def test_no_write_permission_has_its_sentence(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in the way")  # stops root too, which permissions don't
    result = python("pretrain", *TINY, f"output={tmp_path / 'runs'}", "runtime.device=cpu")
    assert result.returncode == 74
    assert result.stderr == (
        f"error: {tmp_path / 'runs' / 'pretrain'}: can't be written (Not a directory); "
        "free it, or choose output=FOLDER\n"
    )


def test_a_diverging_run_stops_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    tiny = [*TINY, f"output={tmp_path}", "runtime.device=cpu", "tracking.every_steps=1", "name=nan"]
    tiny += ["optim.lr=1e30", "checkpoint.every_steps=1", "knn.at_start=false"]
    result = python("pretrain", *tiny)
    assert result.returncode == 70
    sentence = "is not finite after step 2: this state was not saved, and the previous checkpoint "
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    found = checkpoint.newest(tmp_path / "nan")
    assert found is not None
    assert found.step == 1
    assert all(tensor.isfinite().all() for tensor in found.model.values())
