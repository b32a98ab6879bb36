"""The scripts of slurm/ on a real Slurm: what is submitted comes out as the undisturbed run."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from tests import wandb_files
from tests.slurm.cluster import ROOT, Cluster, booted
from tests.test_scripts import shell_scripts

pytestmark = pytest.mark.slurm

BIN = Path(sys.executable).parent
TINY = [
    *("batch_size=16", "bn_groups=4", "encoder.width=4", "encoder.dim=8", "moco.queue_size=40"),
    *("data.shapes_train=100", "data.shapes_test=30", "data.size=16", "views.size=16"),
    *("knn.every_epochs=0", "tracking.every_steps=25", "checkpoint.every_epochs=0"),
    *("checkpoint.every_steps=25", "checkpoint.keep_last=2", "tracking.wandb=disabled"),
]
# 300 steps, some seconds on one process; there are 5 steps in an epoch.
SHORT = [*TINY, "epochs=60"]
CPUS = ["--gpus-per-node=0", "--cpus-per-gpu=1"]


@pytest.fixture(scope="session")
def cluster(runs: Path) -> Iterator[Cluster]:
    with booted() as mine:
        mine.environment["SBATCH_OUTPUT"] = f"{runs}/%x-%j.out"
        yield mine


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


class Slurm:
    """Submits jobs and follows them."""

    def __init__(self, cluster: Cluster, runs: Path) -> None:
        self.cluster, self.runs = cluster, runs

    def submit(self, *command: str) -> str:
        """Submit a job script as a user does; return the job's id."""
        return self.cluster.run("sbatch", "--parsable", *command).strip()

    def pretrain(self, name: str, *arguments: str, options: tuple[str, ...] = ()) -> str:
        """Submit a pretraining on CPUs."""
        where = [f"output={self.runs}", f"name={name}"]
        return self.submit(*CPUS, *options, "slurm/pretrain.sbatch", *arguments, *where)

    def facts(self, job: str) -> dict[str, str]:
        """Return what Slurm says of a job: JobState, Restarts, ExitCode."""
        text = self.cluster.run("scontrol", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def text(self, job: str) -> str:
        """Return a job's output."""
        return "".join(path.read_text() for path in self.runs.glob(f"*-{job}.out"))

    def wait(self, job: str, ready: Callable[[], bool] | None = None, seconds: int = 240) -> None:
        """Wait until a job has ended, or until something else holds."""
        deadline = time.monotonic() + seconds
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        while not (ready and ready()):
            over = self.facts(job)["JobState"] in ended
            if over and not ready:
                return
            late = over or time.monotonic() > deadline
            assert not late, f"{self.facts(job)}\n{self.text(job)}"
            time.sleep(0.3)

    def trains(self, name: str) -> Callable[[], bool]:
        """Return a test of whether a run has come to its first checkpoint."""
        return lambda: bool(list((self.runs / name / "checkpoints").glob("step_*")))

    def swept(self, overrides: str) -> str:
        """Return the table at the end of a sweep over the four lines of a list."""
        arguments = [overrides, *TINY, "epochs=2", "tracking.every_steps=1", f"output={self.runs}"]
        job = self.submit("--array=1-4", *CPUS, "slurm/sweep.sbatch", *arguments)
        self.wait(job, lambda: "report" in self.cluster.run("squeue", "-h", "-o", "%j"))
        listed = self.cluster.run("squeue", "-h", "-o", "%j %i").splitlines()
        (table,) = [line.split()[1] for line in listed if line.startswith("report ")]
        self.wait(table)
        return self.text(table)


@pytest.fixture(scope="session")
def slurm(cluster: Cluster, runs: Path) -> Slurm:
    return Slurm(cluster, runs)


@pytest.fixture(scope="session")
def undisturbed(runs: Path) -> dict[int, Path]:
    """The run of SHORT on this machine, without Slurm, on one and on two processes."""
    return {count: workstation(runs, count, f"undisturbed_{count}", *SHORT) for count in (1, 2)}


@pytest.fixture(scope="session")
def limited(
    slurm: Slurm, runs: Path, undisturbed: dict[int, Path]
) -> Iterator[tuple[str, Future[Path]]]:
    """A job that needs a minute and a half, and may run for half a minute; it runs beside tests.

    And the same run without Slurm, which goes on beside them as well.
    """
    lines = [
        json.loads(line) for line in (undisturbed[1] / "metrics.jsonl").read_text().splitlines()
    ]
    times = {line["step"]: line["time"] for line in lines if "train/loss" in line}
    seconds_a_step = (times[300] - times[50]) / 250
    arguments = [*TINY, f"epochs={round(90 / seconds_a_step / 5)}"]
    options = ("--time=1", "--signal=USR1@15")
    job = slurm.pretrain("limited", *arguments, "tracking.wandb=offline", options=options)
    with ThreadPoolExecutor(1) as pool:
        yield job, pool.submit(workstation, runs, 1, "whole", *arguments)


def workstation(runs: Path, processes: int, name: str, *arguments: str) -> Path:
    """Return the run directory of a pretraining by Accelerate's launcher, outside Slurm."""
    command = [sys.executable, "-m"]
    if processes > 1:
        launcher = [str(BIN / "accelerate"), "launch", "--multi_gpu", "--main_process_port", "0"]
        command = [*launcher, "--num_processes", str(processes), "-m"]
    command += ["moco_dist.pretrain", *arguments, f"output={runs}", f"name={name}"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True)
    return runs / name


def tensors(run: Path) -> list[bytes]:
    """Return the files of tensors of the last checkpoint."""
    last = max((run / "checkpoints").glob("step_*"))
    return [(last / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")]


def losses(run: Path) -> dict[int, float]:
    """Return the loss of each step that metrics.jsonl has; no step may stand twice."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    pairs = [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def requeues(run: Path) -> list[dict[str, object]]:
    """Return what the job noted of its own requeues."""
    path = run / "requeues.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def status(run: Path) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((run / "status.json").read_text())
    return loaded


def assert_no_orphans(cluster: Cluster) -> None:
    """No process of a run is left on any node that runs no job, after five seconds."""
    deadline = time.monotonic() + 5
    while True:
        busy = cluster.run("squeue", "--noheader", "--format=%N").split()
        left = {n: cluster.processes(n) for n in cluster.nodes if n not in ",".join(busy)}
        found = [line for node in left.values() for line in node.values() if "moco_dist" in line]
        if not found:
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def test_two_nodes_give_the_run_of_four_processes_then_probe_and_report(
    slurm: Slurm, runs: Path, limited: tuple[str, Future[Path]]
) -> None:
    options = [*CPUS, "--nodes=2", "--ntasks-per-node=2"]
    arguments = [*TINY, "epochs=12", f"output={runs}", "name=nodes"]
    probe = [
        "epochs=2",
        "augment=false",
        "batch_size=16",
        *(a for a in TINY if a.startswith(("data", "views"))),
    ]
    shown = slurm.cluster.run("bash", "slurm/pipeline.sh", *options, *arguments, "--", *probe)
    jobs = {line.split()[0]: line.split()[1] for line in shown.splitlines()}
    alone = workstation(runs, 4, "alone", *TINY, "epochs=12")
    slurm.wait(jobs["report"])
    for job in jobs.values():
        assert slurm.facts(job)["JobState"] == "COMPLETED", slurm.text(job)
    assert "processes  4 (CPU" in slurm.text(jobs["pretrain"])
    assert tensors(runs / "nodes") == tensors(alone)
    assert losses(runs / "nodes") == losses(alone)
    results = json.loads((runs / "nodes-probe" / "DONE").read_text())
    text = slurm.text(jobs["report"])
    assert "nodes-probe" in text
    assert f"{100 * results['probe']['test']['top1']:.2f}" in text
    logs = {path.name for path in (runs / "nodes" / "logs").iterdir()}
    assert logs == {f"process_{rank}.log" for rank in (1, 2, 3)}


def test_a_node_does_not_know_the_other_by_name(cluster: Cluster) -> None:
    for node, other in (("node1", "node2"), ("node2", "node1")):
        assert cluster.run("getent", "hosts", other, host=node, check=False) == ""


@pytest.mark.parametrize(
    ("how", "own_requeues"),
    [("scancel --signal=USR1", 1), ("scancel --batch --signal=USR1", 1), ("scontrol requeue", 0)],
)
def test_a_signal_or_a_requeue_by_hand_saves_and_goes_on(
    slurm: Slurm, runs: Path, undisturbed: dict[int, Path], how: str, own_requeues: int
) -> None:
    name = re.sub(r"\W+", "_", how)
    job = slurm.pretrain(name, *SHORT)
    slurm.wait(job, slurm.trains(name))
    slurm.cluster.run(*how.split(), job)
    slurm.wait(job)
    facts = slurm.facts(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), slurm.text(job)
    assert len(requeues(runs / name)) == own_requeues
    assert re.search(r"resumed +at step \d", slurm.text(job))
    assert tensors(runs / name) == tensors(undisturbed[1])
    assert losses(runs / name) == losses(undisturbed[1])


def test_preemption_saves_and_goes_on_when_the_nodes_are_free(
    slurm: Slurm, runs: Path, undisturbed: dict[int, Path]
) -> None:
    job = slurm.pretrain("preempted", *SHORT, options=("--nodes=2",))
    slurm.wait(job, slurm.trains("preempted"))
    higher = ["--partition=urgent", "--exclusive", "--nodes=2", "--wrap=true"]
    urgent = slurm.submit(*higher)
    slurm.wait(urgent)
    assert_no_orphans(slurm.cluster)
    slurm.wait(job)
    facts = slurm.facts(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), slurm.text(job)
    assert len(requeues(runs / "preempted")) == 1
    assert tensors(runs / "preempted") == tensors(undisturbed[2])


@pytest.mark.parametrize(
    ("how", "state", "word"),
    [
        ("scancel", "CANCELLED", "stopped"),
        ("scancel --signal=INT", "FAILED", "interrupted"),
        ("touch STOP", "FAILED", "stopped"),
    ],
)
def test_what_a_person_ends_is_saved_and_not_requeued(
    slurm: Slurm, runs: Path, how: str, state: str, word: str
) -> None:
    name = f"ended_by_{how.split()[0]}_{word}"
    job = slurm.pretrain(name, *SHORT, options=("--ntasks-per-node=2",))
    slurm.wait(job, slurm.trains(name))
    if how == "touch STOP":
        (runs / name / "STOP").touch()
    else:
        slurm.cluster.run(*how.split(), job)
    slurm.wait(job)
    assert_no_orphans(slurm.cluster)
    facts = slurm.facts(job)
    assert (facts["JobState"], facts["Restarts"]) == (state, "0"), slurm.text(job)
    assert status(runs / name)["state"] == word
    last = max((runs / name / "checkpoints").glob("step_*")).name
    assert last == f"step_{status(runs / name)['step']:08}"


def test_without_the_right_to_requeue_the_job_ends_with_75_and_says_how_to_go_on(
    slurm: Slurm, runs: Path
) -> None:
    job = slurm.pretrain("no_requeue", *SHORT, options=("--no-requeue",))
    slurm.wait(job, slurm.trains("no_requeue"))
    slurm.cluster.run("scancel", "--signal=USR1", job)
    slurm.wait(job)
    facts = slurm.facts(job)
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "75:0"), slurm.text(job)
    assert "submit the same command again to resume from the last checkpoint" in slurm.text(job)


def test_a_process_killed_on_one_node_brings_the_job_back(
    slurm: Slurm, runs: Path, undisturbed: dict[int, Path]
) -> None:
    job = slurm.pretrain("killed", *SHORT, options=("--nodes=2",))
    slurm.wait(job, slurm.trains("killed"))
    running = slurm.cluster.processes("node2").items()
    (worker,) = [
        p for p, line in running if "-m moco_dist.pretrain" in line and "bin/acc" not in line
    ]
    os.kill(worker, signal.SIGKILL)
    slurm.wait(job)
    assert_no_orphans(slurm.cluster)
    facts = slurm.facts(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), slurm.text(job)
    assert tensors(runs / "killed") == tensors(undisturbed[2])


def test_a_node_whose_slurmd_is_killed_brings_the_job_back(
    slurm: Slurm, runs: Path, undisturbed: dict[int, Path]
) -> None:
    job = slurm.pretrain("slurmd", *SHORT, options=("--nodes=2",))
    slurm.wait(job, slurm.trains("slurmd"))
    cluster = slurm.cluster
    cluster.daemons["node2"].kill()
    cluster.daemons["node2"].wait()
    slurm.wait(job, lambda: slurm.facts(job)["JobState"] != "RUNNING")
    cluster.start("node2")
    slurm.wait(job)
    facts = slurm.facts(job)
    assert facts["JobState"] == "COMPLETED", slurm.text(job)
    assert tensors(runs / "slurmd") == tensors(undisturbed[2])
    assert_no_orphans(cluster)


def test_configurations_that_are_refused_do_not_requeue(slurm: Slurm, runs: Path) -> None:
    jobs = {
        "no key": slurm.pretrain("wrong_1", *TINY, "moco.queu_size=3"),
        "can't be shared by 8 processes": slurm.pretrain(
            *("wrong_2", *TINY, "bn_groups=3", "batch_size=24"),
            options=("--nodes=2", "--ntasks-per-node=4"),
        ),
        "no GPU": slurm.submit("slurm/pretrain.sbatch", *TINY, f"output={runs}", "name=wrong_3"),
        "leave out --ntasks-per-node": slurm.submit(
            *("--gpus-per-node=2", "--ntasks-per-node=3", "--cpus-per-gpu=2"),
            *("slurm/pretrain.sbatch", *TINY, f"output={runs}", "name=wrong_4"),
        ),
    }
    for sentence, job in jobs.items():
        slurm.wait(job)
        facts = slurm.facts(job)
        assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0"), slurm.text(job)
        assert facts["ExitCode"] == "78:0", slurm.text(job)
        assert sentence in slurm.text(job)


def test_a_script_without_its_surroundings_says_so(slurm: Slurm, tmp_path: Path) -> None:
    script = str(ROOT / "slurm" / "pretrain.sbatch")
    elsewhere = slurm.submit(*CPUS, f"--chdir={tmp_path}", script, *TINY)
    slurm.cluster.environment["RUN_IN"] = "env -i PATH=/usr/bin:/bin"
    bare = slurm.submit(*CPUS, "slurm/pretrain.sbatch", *TINY)
    del slurm.cluster.environment["RUN_IN"]
    for job, sentence in (
        (elsewhere, "error: submit from the root of moco_dist"),
        (bare, "error: no Python with moco_dist here"),
    ):
        slurm.wait(job)
        assert slurm.facts(job)["ExitCode"] == "66:0"
        assert sentence in slurm.text(job)


def test_three_restarts_without_progress_are_the_last(slurm: Slurm, runs: Path) -> None:
    # A command in front, as of a container, that kills all it is given after four seconds.
    prefix = f"timeout --signal=KILL 4 env PATH={BIN}:/usr/bin:/bin"
    slurm.cluster.environment["RUN_IN"] = prefix
    job = slurm.pretrain("stuck", *TINY, "epochs=1000", "checkpoint.every_steps=0")
    del slurm.cluster.environment["RUN_IN"]
    slurm.wait(job)
    facts = slurm.facts(job)
    found = (facts["JobState"], facts["ExitCode"], facts["Restarts"])
    assert found == ("FAILED", "70:0", "3"), slurm.text(job)
    assert "no checkpoint after step 0 in 3 restarts" in slurm.text(job)


def test_a_sweep_ends_with_a_table_that_says_why_tasks_failed(
    slurm: Slurm, runs: Path, tmp_path: Path
) -> None:
    grid = tmp_path / "grid.txt"
    lines = ["# learning rates", "optim.lr=0.01", "optim.lr=-1", "", "optim.lr=0.02 seed=3"]
    grid.write_text("\n".join([*lines, "optim.lrr=0.1"]) + "\n")
    text = slurm.swept(str(grid))
    for task, state in ((1, "done"), (2, "configuration"), (3, "done"), (4, "configuration")):
        assert re.search(rf"task_{task}\b.*{state}", text), text
        assert status(runs / "grid" / f"task_{task}")["state"] == state
    words = " ".join(text.split())
    assert "optim.lr=-1.0 is not above 0" in words
    assert "there is no key 'optim.lrr'; did you mean 'optim.lr'?" in words


def test_a_sweep_over_the_mechanisms_ends_with_a_table_of_all_four(
    slurm: Slurm, runs: Path
) -> None:
    text = slurm.swept("slurm/mechanisms.txt")
    found = []
    for task in range(1, 5):
        run = runs / "mechanisms" / f"task_{task}"
        last = losses(run)[10]  # the last of the 10 steps of 2 epochs
        row = rf"task_{task} +pretrain +done +10/10 +{last:.3f} "
        assert re.search(row, text), text
        (words,) = re.findall(rf"task_{task} +(\S+=.*)", text)
        found.append(words.split())
    keys = ["moco.negatives", "moco.keys", "moco.symmetric", "encoder.head", "encoder.predictor"]
    told = [dict(word.split("=") for word in words) for words in found]
    assert [tuple(each[key] for key in keys) for each in told] == [
        ("queue", "momentum", "False", "linear", "False"),
        ("batch", "gradient", "True", "linear", "False"),
        ("bank", "gradient", "False", "linear", "False"),
        ("batch", "momentum", "True", "mlp_bn", "True"),
    ]


def test_the_last_task_of_an_array_is_requeued_and_no_other(
    slurm: Slurm, runs: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    """Its number is that of the whole array; the list has no suffix, and the output a space."""
    (tmp_path / "lists.d").mkdir()
    (tmp_path / "lists.d" / "pair").write_text("seed=1\nseed=0\n")
    arguments = [str(tmp_path / "lists.d" / "pair"), *SHORT, f"output={runs}/two words"]
    array = slurm.submit("--array=1-2", *CPUS, "slurm/sweep.sbatch", *arguments)
    tasks = [f"{array}_{number}" for number in (1, 2)]
    for number, task in enumerate(tasks, 1):
        slurm.wait(task, slurm.trains(f"two words/pair/task_{number}"))
    assert slurm.facts(tasks[1])["JobId"] == array
    slurm.cluster.run("scancel", "--signal=USR1", tasks[1])
    listed = slurm.cluster.run("squeue", "-h", "-o", "%j %i").splitlines()
    (report,) = [line.split()[1] for line in listed if line.startswith("report ")]
    for task, restarts in zip(tasks, ("0", "1"), strict=True):
        slurm.wait(task)
        facts = slurm.facts(task)
        found = facts["JobState"], facts["Restarts"]
        assert found == ("COMPLETED", restarts), slurm.text(facts["JobId"])
    assert tensors(runs / "two words" / "pair" / "task_2") == tensors(undisturbed[1])
    slurm.wait(report)
    assert slurm.facts(report)["JobState"] == "COMPLETED", slurm.text(report)
    assert re.search(r"task_1 +pretrain +done", slurm.text(report))


def test_two_jobs_on_one_node_do_not_disturb_one_another(
    slurm: Slurm, runs: Path, undisturbed: dict[int, Path]
) -> None:
    options = ("--ntasks-per-node=2", "--nodelist=node1")
    jobs = [slurm.pretrain(f"side_{number}", *SHORT, options=options) for number in (1, 2)]
    for number, job in enumerate(jobs, 1):
        slurm.wait(job)
        assert slurm.facts(job)["JobState"] == "COMPLETED", slurm.text(job)
        assert tensors(runs / f"side_{number}") == tensors(undisturbed[2])


def test_an_archive_is_unpacked_once_on_the_disk_of_the_node(
    slurm: Slurm, runs: Path, tmp_path: Path
) -> None:
    for number in range(40):
        image = tmp_path / "set" / f"class_{number % 2}" / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 255 - number)).save(image)
    archive = shutil.make_archive(str(tmp_path / "set"), "tar", tmp_path, "set")
    slurm.cluster.environment["SLURM_TMPDIR"] = str(tmp_path / "node")
    folder = [*TINY, "epochs=2", "data.name=folder", f"data.root={archive}"]
    job = slurm.pretrain("archive", *folder, options=("--ntasks-per-node=2",))
    del slurm.cluster.environment["SLURM_TMPDIR"]
    slurm.wait(job)
    assert slurm.facts(job)["JobState"] == "COMPLETED", slurm.text(job)
    names = [path.name for path in (tmp_path / "node" / "moco_dist").iterdir()]
    kinds = sorted(name.split("_")[0].split(".")[-1] for name in names)
    # The list of the images is kept too, if the job began long enough after they were made.
    assert kinds in (["safetensors", "unpacked"], ["list", "safetensors", "unpacked"])


def test_a_job_that_is_too_long_for_its_time_is_requeued_until_it_is_done(
    slurm: Slurm, runs: Path, limited: tuple[str, Future[Path]]
) -> None:
    job, without_slurm = limited
    whole = without_slurm.result()
    slurm.wait(job)
    facts = slurm.facts(job)
    assert facts["JobState"] == "COMPLETED", slurm.text(job)
    assert int(facts["Restarts"]) >= 3
    noted = requeues(runs / "limited")
    assert [line["restart"] for line in noted] == list(range(int(facts["Restarts"])))
    assert tensors(runs / "limited") == tensors(whole)
    assert losses(runs / "limited") == losses(whole)
    own_id = json.loads((runs / "limited" / "run_id.json").read_text())["id"]
    shown = wandb_files.folders(runs / "limited")
    assert {folder.run.run_id for folder in shown} == {own_id}
    rows = [row for folder in shown for row in folder.history if "train/loss" in row]
    assert {row["step"]: row["train/loss"] for row in rows} == losses(whole)
    assert len(rows) == len(losses(whole))
    assert_no_orphans(slurm.cluster)


@pytest.mark.parametrize("script", shell_scripts(), ids=lambda p: str(p.relative_to(ROOT)))
def test_shellcheck_finds_nothing(script: Path) -> None:
    command = ["shellcheck", "-x", str(script.relative_to(ROOT))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
