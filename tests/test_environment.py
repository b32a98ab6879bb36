"""What shells, launchers, job schedulers and limits of a machine leave around a command."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from moco_dist import notebook
from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.distributed.stopping import StopRequests
from moco_dist.errors import ConfigError, DataError, MachineError, machine_error
from moco_dist.method.plan import check_images
from moco_dist.runs import checkpoint, launch, memory, session
from moco_dist.runs.memory import available
from tests.test_launch import BIN, ROOT, TINY, free_port, python
from tests.test_launch import launch as started

BARE = [*TINY, "epochs=1", "knn.every_epochs=0", "knn.at_start=false", "runtime.device=cpu"]
JOB = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
JOB |= {"MASTER_PORT": "29500"}
LEFT = "error: RANK=1 in the environment without WORLD_SIZE, LOCAL_RANK"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that no launcher has touched."""
    for name in (*JOB, "LOCAL_WORLD_SIZE", "SLURM_JOB_ID", "SLURM_JOB_END_TIME"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"},
        {"RANK": "0"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        JOB,
        JOB | {"RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": ""},
        {"ACCELERATE_USE_SAGEMAKER": "true", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "NO"},
    ],
)
def test_a_whole_launch_is_accepted(environment: dict[str, str]) -> None:
    launch.check(environment)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "1"}, LEFT.removeprefix("error: ")),
        ({"RANK": ""}, "RANK='' in the environment is no whole number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1' in the environment is no whole number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment is no whole number"),
        (JOB | {"MASTER_PORT": "a"}, "MASTER_PORT='a' in the environment is no whole number"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "WORLD_SIZE=2 MASTER_ADDR=x in the environment"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 in the environment without RANK, WORLD_SIZE"),
        ({k: v for k, v in JOB.items() if k != "RANK"}, "without RANK: these are left over"),
        (JOB | {"MASTER_ADDR": ""}, "without MASTER_ADDR: these are left over"),
        (JOB | {"RANK": "2"}, "RANK=2 in the environment is not below WORLD_SIZE=2"),
    ],
)
def test_what_is_left_of_a_launch_is_named(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        launch.check(environment)
    assert said in str(error.value)
    assert "for one process run `unset RANK WORLD_SIZE LOCAL_RANK" in str(error.value)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "ParallelismConfig"),
        ("ACCELERATE_USE_SAGEMAKER", "SageMaker"),
    ],
)
def test_what_accelerate_config_cannot_mean_here_is_refused_by_name(name: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=true: {answer}, an answer of `accelerate conf"):
        launch.check({name: "true"})


@pytest.mark.parametrize("gpus", [True, False])
@pytest.mark.parametrize("word", ["maybe", ""])
def test_a_word_that_is_no_truth_value_has_a_sentence_with_gpus_and_without(
    bare: pytest.MonkeyPatch, tmp_path: Path, word: str, gpus: bool
) -> None:
    bare.setenv("ACCELERATE_USE_CPU", word)
    bare.setattr(torch.cuda, "is_available", lambda: gpus)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ConfigError, match=f"ACCELERATE_USE_CPU={word}"):
        session.join(tiny(tmp_path, "runtime.device=auto"))


def test_a_refusal_is_printed_whatever_rank_is_left_over(tmp_path: Path) -> None:
    for argument, said in (("nonsense=1", "error: nonsense=1: there is no key"), ("seed=1", LEFT)):
        result = python("pretrain", *BARE, f"output={tmp_path}", argument, RANK="1")
        assert result.returncode == 78
        assert result.stderr.startswith(said)
        assert result.stderr.count("\n") == 1


def test_a_refusal_is_never_lost_between_processes() -> None:
    """Whichever ends first, the launcher ends the other one."""
    command = [str(BIN / "accelerate"), "launch", "--use_fsdp", "--num_processes", "2"]
    command += ["--main_process_port", "0", "-m", "moco_dist.pretrain"]
    result = started(*command, ACCELERATE_USE_CPU="true")
    assert result.stderr.count("error: ACCELERATE_USE_FSDP=true: FSDP, an answer of `acc") == 1
    # A process that alone has the error says so itself.
    other = JOB | {"RANK": "1", "LOCAL_RANK": "1"}
    result = python("pretrain", "nonsense=1", **other)
    assert result.returncode == 78
    assert result.stderr.startswith("error: nonsense=1: there is no key 'nonsense'")


def tiny(tmp_path: Path, *arguments: str) -> PretrainConfig:
    return load(PretrainConfig, [*BARE, f"output={tmp_path}", *arguments])


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.newest(run)
    assert found is not None
    return found.model


def test_accumulation_of_the_launcher_is_ignored_in_pretraining_and_probe(
    tmp_path: Path, bare: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    losses = []
    for steps in (None, "4"):
        if steps:
            bare.setenv(name, steps)
        run = notebook.run_pretrain(tiny(tmp_path, f"name=a{steps}"))
        for kind in ("linear", "finetune"):
            probe = [f"encoder={run}", "epochs=1", "batch_size=16", "views.size=16", "top_k=2"]
            probe += ["data.size=16", "data.shapes_train=100", "data.shapes_test=30", "seed=3"]
            probe += [f"output={tmp_path}", f"name={kind}{steps}", f"protocol={kind}"]
            notebook.run_probe(load(ProbeConfig, [*probe, "runtime.device=cpu"]))
            lines = (tmp_path / f"{kind}{steps}" / "metrics.jsonl").read_text().splitlines()
            found = [json.loads(line) for line in lines]
            losses.append([line["train/loss"] for line in found if "train/loss" in line])
    assert losses[:2] == losses[2:]
    assert all(losses)
    one, four = weights(tmp_path / "aNone"), weights(tmp_path / "a4")
    assert all(tensor.equal(four[key]) for key, tensor in one.items())
    said = "the launcher's gradient accumulation over 4 steps is ignored"
    assert caplog.text.count(said) == 3


def test_a_second_run_in_one_python_may_have_another_precision(
    tmp_path: Path, bare: pytest.MonkeyPatch
) -> None:
    for precision in ("fp32", "bf16", "fp64", "bf16"):
        run = tiny(tmp_path, f"name={precision}", f"precision={precision}", "stop_at_step=1")
        notebook.run_pretrain(run)
    dtypes = {name: weights(tmp_path / name)["queue.keys"].dtype for name in ("fp32", "fp64")}
    assert dtypes == {"fp32": torch.float32, "fp64": torch.float64}


def test_ctrl_c_in_a_notebook_interrupts_a_run_that_the_same_call_resumes(tmp_path: Path) -> None:
    config = tiny(tmp_path, "epochs=200", "checkpoint.every_steps=2", "tracking.every_steps=1")
    run = tmp_path / config.name

    def press() -> None:
        while not checkpoint.step_folders(run):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell's job in the background ignores SIGINT, and so do the tests in it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=press)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            notebook.run_pretrain(config)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_status"], status["again"]) == ("interrupted", 130, False)
    assert status["reason"] == "stopped by Ctrl-C; the last checkpoint stands"
    saved = checkpoint.newest(run)
    assert saved is not None
    notebook.run_pretrain(replace(config, stop_at_step=saved.step + 1))
    assert json.loads((run / "status.json").read_text())["step"] == saved.step + 1


def test_a_limit_of_the_machine_is_recorded_by_its_name_in_a_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(datasets, "load", full)
    with pytest.raises(OSError, match="Too many open files"):
        notebook.run_pretrain(tiny(tmp_path))
    status = json.loads((tmp_path / tiny(tmp_path).name / "status.json").read_text())
    assert (status["state"], status["exit_status"], status["again"]) == ("machine", 71, True)


def test_a_device_of_the_environment_is_no_surprise(
    tmp_path: Path, bare: pytest.MonkeyPatch
) -> None:
    result = python("pretrain", *BARE, f"output={tmp_path}", ACCELERATE_TORCH_DEVICE="meta")
    assert result.returncode == 78
    assert result.stderr == (
        "error: runtime.device=cpu, and ACCELERATE_TORCH_DEVICE=meta in the environment chooses "
        "meta; unset it, or give runtime.device=auto\n"
    )
    bare.setenv("ACCELERATE_USE_CPU", "maybe")
    with pytest.raises(ConfigError, match=r"Accelerate refuses this launch \(invalid truth value"):
        launch.accelerator("cpu", 10.0)


def test_tf32_of_the_environment_is_ignored(
    bare: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bare.setenv("NVIDIA_TF32_OVERRIDE", "1")
    launch.accelerator("cpu", 10.0)
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ
    assert "NVIDIA_TF32_OVERRIDE=1 in the environment is ignored" in caplog.text
    assert not torch.backends.cuda.matmul.allow_tf32


def test_details_that_crash_pytorch_are_refused(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("TORCH_DISTRIBUTED_DEBUG", "detail")
    launch.accelerator("cpu", 10.0)  # alone it does no harm
    for name, value in JOB.items():
        bare.setenv(name, value)
    with pytest.raises(ConfigError, match="TORCH_DISTRIBUTED_DEBUG=DETAIL in the environment mak"):
        launch.accelerator("cpu", 10.0)


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))
        mine.listen()
        yield mine.getsockname()[1]


def test_a_port_in_use_and_missing_processes_are_unavailable(tmp_path: Path) -> None:
    arguments = [*BARE, f"output={tmp_path}"]
    with taken_port() as port:
        result = python("pretrain", *arguments, **JOB | {"MASTER_PORT": str(port)})
    assert result.returncode == 69
    assert f"error: port {port} of 127.0.0.1 is in use, most likely by another" in result.stderr
    assert "Traceback" not in result.stderr
    port = free_port()
    other = JOB | {"MASTER_PORT": str(port), "RANK": "1", "LOCAL_RANK": "1"}
    result = python("pretrain", *arguments, "runtime.timeout_seconds=1", **other)
    assert result.returncode == 69
    assert f"did not meet the others at 127.0.0.1:{port} within 1 s" in result.stderr
    alone = JOB | {"MASTER_PORT": str(port), "WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "eth77"}
    result = python("pretrain", *arguments, **alone)
    assert result.returncode == 69
    assert "error: GLOO_SOCKET_IFNAME=eth77 in the environment is no network int" in result.stderr


def test_the_limit_of_open_files_is_named(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / "images" / f"{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{number}.png")
    data = ["data.name=folder", f"data.root={tmp_path / 'images'}", "data.memory_gb=0"]
    data += [f"data.cache={tmp_path}", "data.workers=30", "bn_groups=2", "stop_at_step=1"]
    command = [sys.executable, "-m", "moco_dist.pretrain", *BARE, f"output={tmp_path}", *data]
    result = started("bash", "-c", 'ulimit -n 40; exec "$@"', "bash", *command)
    assert result.returncode == 71
    assert "this machine's limit of open files is reached; raise it with `ulimit" in result.stderr
    assert "Traceback" not in result.stderr
    assert json.loads((tmp_path / "pretrain" / "status.json").read_text())["state"] == "machine"


def test_a_limit_of_the_machine_is_not_the_fault_of_a_file(
    tmp_path: Path, bare: pytest.MonkeyPatch
) -> None:
    run = notebook.run_pretrain(tiny(tmp_path, "stop_at_step=1"))
    (folder,) = (run / "checkpoints").iterdir()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path(os.devnull).open() as last:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno(), before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files") as error:
            checkpoint.newest(run, set_aside=True)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert "limit of open files" in str(machine_error(error.value))
    assert folder.exists()
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError):
        checkpoint.newest(run)


@pytest.mark.parametrize(
    ("error", "limit"),
    [
        (MemoryError(), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
        (RuntimeError("can't start new thread"), "processes and threads"),
        (OSError(23, "Too many open files in system"), "open files"),
    ],
)
def test_limits_are_known_by_their_errors_and_causes(error: Exception, limit: str) -> None:
    outer = ValueError("outer")
    outer.__cause__ = error
    for each in (error, outer):
        found = machine_error(each)
        assert isinstance(found, MachineError)
        assert f"this machine's limit of {limit} is reached; " in str(found)
    assert machine_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert machine_error(FileNotFoundError(2, "No such file")) is None


def test_the_end_of_a_job_that_is_over_is_ignored(
    tmp_path: Path, bare: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert launch.job_end() is None
    bare.setenv("SLURM_JOB_END_TIME", "1700000000")
    assert launch.job_end() is None
    assert "SLURM_JOB_END_TIME=1700000000 is in the past, so it is left over" in caplog.text
    assert (notebook.run_pretrain(tiny(tmp_path)) / "DONE").exists()

    soon = int(time.time()) + 3600
    bare.setenv("SLURM_JOB_END_TIME", str(soon))
    bare.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    bare.setenv("SLURM_JOB_ID", "7")
    squeue = tmp_path / "squeue"
    for answer, expected in (
        ("echo RUNNING", soon),
        ("echo COMPLETED", None),
        ("echo CANCELLED; echo TIMEOUT", None),
        ("echo COMPLETED; echo RUNNING", soon),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", None),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", soon),
    ):
        squeue.write_text(f"#!/bin/sh\n{answer}\n")
        squeue.chmod(0o755)
        assert launch.job_end() == expected
    assert "is that of job 7, which no longer runs, so it is left over" in caplog.text
    stop = StopRequests()
    stop.limit(tmp_path, 0, 25, time.time() + 60)
    assert stop.end is not None
    assert 0 < stop.end - time.monotonic() <= 60


def test_a_job_script_without_slurm_says_how_to_submit_it() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    for script in ("pretrain", "probe"):
        command = ["bash", f"slurm/{script}.sbatch", f"configs/{script}/demo.yaml"]
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
        )
        assert result.returncode == 78
        assert result.stderr == (
            "error: this is no Slurm job; submit the script with sbatch slurm/"
            f"{script}.sbatch, or without Slurm run python -m moco_dist.{script}\n"
        )


def test_what_is_available_is_what_the_kernel_and_the_container_give(tmp_path: Path) -> None:
    none = tmp_path / "none"
    machine = psutil.virtual_memory()
    lines = Path("/proc/meminfo").read_text().splitlines()
    meminfo = dict(line.split(":") for line in lines)
    known = int(meminfo["MemAvailable"].split()[0]) * 1024
    # The two are read one after the other on a busy machine.
    assert abs(available(none, none) - known) < 0.2 * machine.total
    membership = tmp_path / "cgroup"
    outer, inner = tmp_path / "groups" / "job", tmp_path / "groups" / "job" / "step"
    inner.mkdir(parents=True)
    membership.write_text("0::/job/step\n")
    stat = "anon 1\ninactive_file 20000000\nactive_file 10000000\nslab 5\n"
    for folder, limit, used in ((outer, 300_000_000, 250_000_000), (inner, "max", 90_000_000)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(stat)
    assert available(tmp_path / "groups", membership) == 300e6 - 250e6 + 30e6
    # In a container the group of this process is the top one.
    membership.write_text("0::/../elsewhere\n")
    assert available(outer, membership) == 80e6
    first = tmp_path / "groups" / "memory" / "slurm"
    first.mkdir(parents=True)
    membership.write_text("4:memory:/slurm\n5:cpu:/job\n")
    (first / "memory.limit_in_bytes").write_text("100000000\n")
    (first / "memory.usage_in_bytes").write_text("95000000\n")
    (first / "memory.stat").write_text("total_inactive_file 1000000\ntotal_active_file 2000000\n")
    assert available(tmp_path / "groups", membership) == 8e6


def test_a_run_is_not_refused_for_the_cache_of_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where 30 MB of the container's 50 MB are cached files: they make room for 20 MB."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(20):
        Image.new("RGB", (600, 600), (number, 0, 0)).save(images / f"{number}.png")
    arguments = [*BARE, f"output={tmp_path}", "data.name=folder", f"data.root={images}"]
    arguments += ["data.size=600", "bn_groups=2", "stop_at_step=1", f"data.cache={tmp_path}"]
    monkeypatch.setattr(memory, "_left", lambda *_: iter([20_000_000]))
    with pytest.raises(ConfigError, match=r"need 0.0216 GB of memory and 0.02 GB are available"):
        notebook.run_pretrain(load(PretrainConfig, arguments))
    monkeypatch.setattr(memory, "_left", lambda *_: iter([50_000_000 - 45_000_000 + 30_000_000]))
    notebook.run_pretrain(load(PretrainConfig, arguments))


@pytest.mark.parametrize(
    ("batch", "groups", "processes", "images", "advice"),
    [
        (512, 8, 1, 54, "use batch_size=48 or less"),
        (54, 1, 1, 50, "use batch_size=50 or less"),
        (512, 8, 2, 12, "use bn_groups=6 and batch_size=12 or less"),
        (512, 8, 4, 13, "use bn_groups=4 and batch_size=12 or less"),
        (512, 8, 8, 13, "use bn_groups=4 and batch_size=8 or less"),
        (512, 2, 8, 29, "use batch_size=24 or less"),
        (512, 8, 3, 4, "use bn_groups=1 and batch_size=3 or less"),
        (512, 8, 8, 7, "too few; a batch has two or more, and one or more for each process (8)"),
        (512, 8, 1, 1, "too few; a batch has two or more, and one or more for each process (1)"),
    ],
)
def test_the_advice_on_a_batch_can_be_followed(
    batch: int, groups: int, processes: int, images: int, advice: str
) -> None:
    with pytest.raises(ConfigError, match=f"^batch_size={batch} is more than the {images}") as said:
        check_images(batch, groups, processes, images)
    assert advice in str(said.value)
    given = [word.strip(";") for word in str(said.value).split("; use ")[-1].split() if "=" in word]
    if "use " in advice:
        followed = load(PretrainConfig, [f"bn_groups={groups}", *given])
        check_images(followed.batch_size, followed.bn_groups, processes, images)
        assert followed.bn_groups % processes == 0 or processes % followed.bn_groups == 0
        assert followed.batch_size % processes == 0


def test_few_images_can_be_held_out_as_the_sentence_says(
    tmp_path: Path, bare: pytest.MonkeyPatch
) -> None:
    run = notebook.run_pretrain(tiny(tmp_path, "stop_at_step=1"))
    for number in range(4):
        folder = tmp_path / "images" / f"{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(folder / f"{number}.png")
    arguments = [f"encoder={run}", f"output={tmp_path}", "epochs=1", "batch_size=2", "top_k=2"]
    arguments += ["data.name=folder", f"data.root={tmp_path / 'images'}", "views.size=16"]
    arguments += [f"data.cache={tmp_path}", "data.size=16", "runtime.device=cpu", "knn.k=1"]
    with pytest.raises(DataError, match=r"validation=0\.1 holds none of 4 out") as error:
        notebook.run_probe(load(ProbeConfig, arguments))
    fix = str(error.value).rpartition("give ")[2]
    assert fix == "data.validation=0.25"
    results = notebook.run_probe(load(ProbeConfig, [*arguments, fix, "name=again"]))
    assert results["verdict"]


def test_a_checkpoint_in_the_current_folder_has_the_name_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "resnet" / "checkpoints" / "step_00000010"
    folder.mkdir(parents=True)
    for place, given in (
        (folder, "."),
        (folder.parent, "step_00000010"),
        (tmp_path, "resnet/checkpoints/step_00000010"),
        (tmp_path, "resnet"),
        (folder.parents[1], "."),
    ):
        monkeypatch.chdir(place)
        assert ProbeConfig(encoder=given).run_name() == "resnet-probe"
