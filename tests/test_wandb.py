"""Weights & Biases for real: offline folders read back, and online at a server on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import pytest
import yaml

from moco_dist.config.running import TrackingConfig
from moco_dist.encoders import load
from moco_dist.runs import checkpoint, identity
from moco_dist.tracking import wandb_run
from tests import terminal
from tests.test_launch import ROOT, TINY, launch, lines
from tests.wandb_files import Folder, folders
from tests.wandb_server import WandbServer

SECRET = "hunter2-in-the-environment"
OFFLINE = "tracking.wandb=offline"
SMALL = [*TINY, "runtime.device=cpu", "tracking.every_steps=1", "tracking.media_every_epochs=1"]
SMALL += ["tracking.health_every_steps=5"]
SHAPES = [part for part in TINY if part.startswith(("data.", "views."))]
# The limits of a run that waits for W&B, out of reach of a busy machine.
PATIENT = {"wandb_run.INIT_SECONDS": 120.0, "wandb_run.FINISH_SECONDS": 120.0}
PATIENT |= {"feed.END_SECONDS": 240.0, "feed.HURRY_SECONDS": 240.0}
# The variables of a user who has never heard of W&B.
NOBODY = {"WANDB_MODE": "", "WANDB_API_KEY": "", "NETRC": "/nonexistent"}


def command(job: str, **limits: float) -> list[str]:
    """Return a Python that runs `job` with other limits."""
    code = [f"import sys; from moco_dist.tracking import feed, wandb_run; sys.argv[0] = '{job}'"]
    code += [f"{name} = {value}" for name, value in {**PATIENT, **limits}.items()]
    code += [f"from moco_dist.{job}.__main__ import main; main()"]
    return [sys.executable, "-c", "; ".join(code)]


def python(job: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return launch(*command(job), *arguments, **environment)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home-of-alice")


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """An offline pretraining, in a home folder."""
    place = [f"output={home}/runs", "name=run", f"data.root={home}/pictures", OFFLINE]
    environment = {"MY_SECRET": SECRET, "HOME": str(home)}
    more = ["tracking.upload_encoder=true", "monitor.linear=true"]
    result = python("pretrain", *SMALL, *place, *more, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    (home / "console.txt").write_text(result.stdout)
    return home / "runs" / "run"


@pytest.fixture(scope="module")
def probed(home: Path, trained: Path) -> Path:
    place = [f"output={home}/runs", f"encoder={trained}", OFFLINE, "runtime.device=cpu"]
    small = ["epochs=2", "batch_size=16", "optim.lr=0.3"]
    environment = {"MY_SECRET": SECRET, "HOME": str(home)}
    result = python("probe", *SHAPES, *small, *place, **environment)
    assert result.returncode == 0, result.stderr
    return home / "runs" / "run-probe"


def rows(run: Path) -> dict[int, dict[str, float]]:
    """Return the metrics of each step, from metrics.jsonl."""
    found: dict[int, dict[str, float]] = {}
    for line in lines(run):
        metrics = {k: v for k, v in line.items() if k not in ("step", "time")}
        found.setdefault(int(line["step"]), {}).update(metrics)
    return found


def scalars(history: list[dict[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """Return place and metrics of each row of a history, without pictures."""
    return [
        (row["_step"], {k: v for k, v in row.items() if not k.startswith(("_", "media/"))})
        for row in history
    ]


def expected(run: Path) -> list[tuple[int, dict[str, float]]]:
    return [(step, {**metrics, "step": step}) for step, metrics in rows(run).items()]


@pytest.mark.parametrize("job", ["pretrain", "probe"])
def test_every_line_of_metrics_is_in_the_history_at_its_step(job: str, request: Any) -> None:
    run = request.getfixturevalue({"pretrain": "trained", "probe": "probed"}[job])
    (folder,) = folders(run)
    assert scalars(folder.history) == expected(run)
    logged = {name for row in folder.history for name in row}
    if job == "pretrain":
        wanted = {"train/loss", "train/accuracy_top1", "train/accuracy_top5", "train/lr"}
        wanted |= {"train/images_per_second", "queue/fill", "knn/top1", "online/top1"}
        wanted |= {"similarity/positive", "similarity/negative", "system/memory_gb"}
        wanted |= {"health/alignment", "health/uniformity", "health/rankme", "queue/age_steps"}
        wanted |= {"health/feature_std", "health/ema_distance"}
    else:
        wanted = {"probe/loss", "probe/top1", "probe/top5", "control/top1"}
    assert wanted <= logged
    for name in logged - {"_step", "_runtime", "_timestamp", "step", "epoch"}:
        evaluation = name.startswith(("knn/", "online/", "probe/", "control/"))
        assert folder.axes[name] == ("epoch" if evaluation else "step")


def test_the_summary_has_the_last_and_of_evaluations_the_best(trained: Path, probed: Path) -> None:
    (folder,) = folders(trained)
    for name in ("knn/top1", "online/top1"):
        accuracies = [row[name] for row in rows(trained).values() if name in row]
        assert folder.summary[name] == {"max": max(accuracies), "last": accuracies[-1]}
    assert folder.summary["train/loss"] == {"last": rows(trained)[10]["train/loss"]}
    (probe,) = folders(probed)
    losses = [row["probe/loss"] for row in rows(probed).values()]
    assert probe.summary["probe/loss"] == {"min": min(losses), "last": losses[-1]}
    done = json.loads((probed / "DONE").read_text())
    for part in ("validation", "test"):
        for key, value in done["probe"][part].items():
            assert probe.summary[f"probe/{part}_{key}"] == value


def test_pictures_and_histograms_stand_at_their_steps(trained: Path, probed: Path) -> None:
    (folder,) = folders(trained)
    shown = {"views", "neighbours", "similarity_positive", "similarity_negative"}
    for row in folder.history:
        names = {name.removeprefix("media/") for name in row if name.startswith("media/")}
        assert names == (shown if row["_step"] in (5, 10) else set())
    row = folder.history[-1]
    for name in ("views", "neighbours"):
        shown_there = folder.path / "files" / row[f"media/{name}"]["path"]
        drawn = trained / "media" / "step_00000010" / f"{name}.png"
        assert shown_there.read_bytes() == drawn.read_bytes()
    positive, negative = (row[f"media/similarity_{sign}"] for sign in ("positive", "negative"))
    assert sum(positive["values"]) == 16
    assert 0 < sum(negative["values"]) <= 16 * 40  # one's own older keys don't count
    middles = [low + 1 / 64 for low in positive["bins"][:-1]]
    mean = sum(m * n for m, n in zip(middles, positive["values"], strict=True)) / 16
    assert abs(mean - row["similarity/positive"]) < 2 / 64
    (probe,) = folders(probed)
    confusion = probe.path / "files" / probe.history[-1]["media/confusion"]["path"]
    assert confusion.stat().st_size > 0


def test_the_confusion_matrix_counts_each_test_image_once(probed: Path) -> None:
    (path,) = probed.glob("media/*/confusion.csv")
    table = [json.loads(f"[{line}]") for line in path.read_text().splitlines()]
    counts = [row[1:] for row in table[1:]]
    assert [row[0] for row in table[1:]] == table[0][1:]
    assert sum(map(sum, counts)) == 30
    right = sum(counts[i][i] for i in range(len(counts)))
    top1 = json.loads((probed / "DONE").read_text())["probe"]["test"]["top1"]
    assert right / 30 == pytest.approx(top1, abs=1e-12)


@pytest.mark.parametrize("job", ["trained", "probed"])
def test_the_configuration_is_complete_but_for_folders_above(
    job: str, home: Path, request: Any
) -> None:
    run = request.getfixturevalue(job)
    (folder,) = folders(run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config |= {"output": "runs"} | ({"encoder": "run"} if job == "probed" else {})
    if job == "trained":
        config["data"]["root"] = "pictures"
    shared = {key: value for key, value in folder.config.items() if key in config}
    assert shared == config
    environment = json.loads((run / "environment.json").read_text())
    assert folder.config["environment"]["torch"] == environment["torch"]
    assert environment.keys() - folder.config["environment"].keys() == {"arguments"}


def test_nothing_secret_is_in_what_would_be_uploaded(
    home: Path, trained: Path, probed: Path
) -> None:
    for run in (trained, probed):
        (folder,) = folders(run)
        uploaded = [folder.log, *(p for p in (folder.path / "files").rglob("*") if p.is_file())]
        content = b"".join(path.read_bytes() for path in uploaded)
        # `wandb sync` needs the local paths of the artifact's files, but doesn't send them.
        for artifact in folder.artifacts:
            for entry in artifact.manifest.contents:
                content = content.replace(entry.local_path.encode(), b"")
        for word in (SECRET, str(home), "MY_SECRET", sys.executable, "batch_size=16", str(ROOT)):
            assert word.encode() not in content, word
        assert not folder.run.host
        assert not folder.run.HasField("git")


def test_a_probe_is_in_the_group_of_its_pretraining(trained: Path, probed: Path) -> None:
    (pretrain,), (probe,) = folders(trained), folders(probed)
    assert (pretrain.run.job_type, probe.run.job_type) == ("pretrain", "probe")
    assert pretrain.run.run_group == probe.run.run_group == f"run-{pretrain.run.run_id}"
    assert pretrain.run.run_id != probe.run.run_id
    assert (pretrain.run.display_name, probe.run.display_name) == ("run", "run-probe")
    for run, folder in ((trained, pretrain), (probed, probe)):
        found = checkpoint.newest(run)
        assert found is not None
        assert found.state["run_id"] == folder.run.run_id


def test_one_line_says_how_to_upload_and_nothing_lies_around(home: Path, trained: Path) -> None:
    (folder,) = folders(trained)
    told = [line for line in (home / "console.txt").read_text().splitlines() if "W&B" in line]
    assert told == [f"W&B: offline; upload it later by: wandb sync {folder.path}"]
    assert not (ROOT / "wandb").exists()


def test_wandb_sync_shows_the_run_as_metrics_jsonl_has_it(probed: Path, tmp_path: Path) -> None:
    (folder,) = folders(probed)
    with WandbServer() as server:
        sync = [str(Path(sys.executable).parent / "wandb"), "sync", str(folder.path)]
        result = launch(*sync, **server.environment, WANDB_DIR=str(tmp_path))
        assert result.returncode == 0, result.stderr
        assert scalars(server.history(folder.run.run_id)) == expected(probed)
        assert server.runs[folder.run.run_id]["exit"] == 0


def test_the_encoder_that_is_uploaded_is_a_checkpoint_without_paths(trained: Path) -> None:
    (folder,) = folders(trained)
    (artifact,) = folder.artifacts
    names = {entry.path for entry in artifact.manifest.contents}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json"}
    (place,) = (trained / "encoder" / "checkpoints").iterdir()
    assert b"home-of-alice" not in (place / "state.json").read_bytes()
    alone, whole = (load.find(path).backbone for path in (place, trained))
    for name, tensor in whole.state_dict().items():
        assert tensor.equal(alone.state_dict()[name])


# Launches that are killed, and what is left of them.


class Start:
    """A launch of a run in its own process group."""

    def __init__(
        self,
        output: Path,
        *arguments: str,
        limits: Mapping[str, float] = PATIENT,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.run, self.log = output / "run", output / "log.txt"
        launched = [*command("pretrain", **limits), *SMALL, *arguments]
        launched += [f"output={output}", "name=run"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                launched, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def until(self, step: int, seconds: float = 300) -> None:
        """Wait until metrics.jsonl has a line of `step`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(self.log.read_text())
            path = self.run / "metrics.jsonl"
            if path.exists() and f'{{"step": {step},' in path.read_text():
                return
            time.sleep(0.005)
        raise AssertionError(f"no step {step} in {seconds} s")

    def service(self) -> int:
        """Return the process of wandb's own service, once it has a folder of the run."""
        end = time.monotonic() + 300
        while time.monotonic() < end:
            with_wandb = list((self.run / "wandb").glob("*run-*/*.wandb"))
            found = [each.pid for each in psutil.Process(self.process.pid).children()]
            if with_wandb and found:
                return found[0]
            time.sleep(0.01)
        raise AssertionError("no service of wandb")

    def wait(self, seconds: float = 300) -> int:
        return self.process.wait(seconds)

    def __enter__(self) -> Start:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


LONG = ["epochs=6", "checkpoint.every_steps=4", "checkpoint.every_epochs=0", "knn.every_epochs=2"]


@pytest.mark.parametrize("how", ["offline", "online"])
def test_killed_twice_a_run_keeps_its_id_and_no_step_is_there_twice_or_missing(
    how: str, tmp_path: Path, server: WandbServer
) -> None:
    arguments = [*LONG, f"tracking.wandb={how}"]
    ids = []
    for step in (3, 14, None):  # before the first checkpoint, between two, to the end
        with Start(tmp_path, *arguments, environment=server.environment) as start:
            if step:
                start.service()
                start.until(step)
                start.process.kill()
            assert start.wait() == (-signal.SIGKILL if step else 0), start.log.read_text()
        ids.append(json.loads((start.run / "run_id.json").read_text())["id"])
    assert len(set(ids)) == 1
    steps = [step for step, _ in expected(start.run)]
    assert steps == list(range(31))
    if how == "offline":
        found = folders(start.run)
        assert {folder.run.run_id for folder in found} == set(ids)
        history = [row for folder in found for row in folder.history]
        summary = found[-1].summary
    else:
        assert list(server.runs) == ids[:1]
        history, summary = server.history(ids[0]), server.summary(ids[0])
    # The last launch repeats nothing, but speed and memory differ between launches.
    machine = {"train/images_per_second", "system/memory_gb"}
    sent, wanted = (
        [(step, {k: v for k, v in row.items() if k not in machine}) for step, row in each]
        for each in (scalars(history), expected(start.run))
    )
    assert sent == wanted
    assert [row["_step"] for row in history if "media/views" in row] == [5, 10, 15, 20, 25, 30]
    accuracies = [row["knn/top1"] for row in rows(start.run).values() if "knn/top1" in row]
    assert summary["knn/top1"] == {"max": max(accuracies), "last": accuracies[-1]}


def test_an_online_launch_sends_what_an_offline_one_kept(
    tmp_path: Path, server: WandbServer
) -> None:
    place = [*SMALL, f"output={tmp_path}", "name=run"]
    for extra in (["stop_at_step=7", OFFLINE], ["tracking.wandb=online"]):
        result = python("pretrain", *place, *extra, **server.environment)
        assert result.returncode == 0, result.stderr
    (run,) = server.runs
    assert scalars(server.history(run)) == expected(tmp_path / "run")
    assert folders(tmp_path / "run") == []


@pytest.mark.parametrize("how", ["offline", "online"])
def test_a_signal_to_the_whole_group_ends_the_run_as_preempted(
    how: str, tmp_path: Path, server: WandbServer
) -> None:
    # In a kNN evaluation the newest row would be incomplete, and sent by the next launch.
    arguments = ["epochs=100", "knn.every_epochs=0", f"tracking.wandb={how}"]
    with Start(tmp_path, *arguments, environment=server.environment) as start:
        start.service()
        start.until(6)
        os.killpg(start.process.pid, signal.SIGTERM)
        assert start.wait() == 75, start.log.read_text()
    steps = list(rows(start.run))
    if how == "offline":
        (folder,) = folders(start.run)
        assert (folder.exit_code, folder.preempting) == (75, True)
        history = folder.history
    else:
        (run,) = server.runs.values()
        assert (run["exit"], run["preempting"]) == (75, True)
        history = server.history(run["name"])
    assert [row["step"] for row in history] == steps
    assert "W&B:" in start.log.read_text()
    assert "WARNING" not in start.log.read_text()


# What fails, and how the run continues.


def warned(text: str) -> list[str]:
    return [line for line in text.splitlines() if "W&B" in line]


def test_with_no_login_the_run_is_offline_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**NOBODY, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    place = [f"output={tmp_path}", "name=run"]
    state, screen = terminal.run([*command("pretrain"), *TINY, *place])
    shown = "".join(screen.lines)
    assert state == 0, shown
    (folder,) = folders(tmp_path / "run")
    assert shown.count("W&B: offline, as nobody is logged in (wandb login); upload it") == 1
    assert "enter your choice" not in shown
    assert "WARNING" not in shown
    assert scalars(folder.history) == expected(tmp_path / "run")


def test_a_server_that_falls_silent_does_not_hold_the_end(
    tmp_path: Path, server: WandbServer
) -> None:
    limits = {"wandb_run.FINISH_SECONDS": 3.0}
    arguments = ["epochs=40", "tracking.wandb=online"]
    with Start(tmp_path, *arguments, limits=limits, environment=server.environment) as start:
        while "W&B: http" not in start.log.read_text():
            assert start.process.poll() is None, start.log.read_text()
            time.sleep(0.01)
        server.mute = True
        assert start.wait() == 0, start.log.read_text()
    told = warned(start.log.read_text())[-1]
    assert told.startswith("W&B: not all was uploaded in time; upload it by: wandb sync ")


@pytest.fixture
def silent() -> Iterator[dict[str, str]]:
    """The environment of a server that accepts every connection and answers none."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        yield {"WANDB_BASE_URL": url, "WANDB_API_KEY": "a" * 40}


def test_training_does_not_wait_for_a_server_and_nor_does_its_end(
    tmp_path: Path, silent: dict[str, str]
) -> None:
    # W&B still waits for the server when the run stops.
    limits = {"wandb_run.INIT_SECONDS": 3000.0, "feed.HURRY_SECONDS": 1.0}
    arguments = ["epochs=100", "tracking.wandb=online"]
    with Start(tmp_path, *arguments, limits=limits, environment=silent) as start:
        start.until(8)
        os.kill(start.process.pid, signal.SIGTERM)
        assert start.wait() == 75, start.log.read_text()
    (line,) = warned(start.log.read_text())
    assert line.startswith("WARNING: W&B: does not finish; the run and its metrics.jsonl continue")


def test_a_server_that_does_not_answer_makes_the_run_offline(
    tmp_path: Path, silent: dict[str, str]
) -> None:
    limits = {"wandb_run.INIT_SECONDS": 10.0}
    with Start(tmp_path, "tracking.wandb=online", limits=limits, environment=silent) as start:
        assert start.wait() == 0, start.log.read_text()
    (folder,) = folders(tmp_path / "run")
    (line,) = warned(start.log.read_text())
    assert line.startswith("W&B: offline, as the server does not answer")
    assert line.endswith(f"upload it later by: wandb sync {folder.path}")
    assert scalars(folder.history) == expected(tmp_path / "run")
    assert not list((tmp_path / "run" / "wandb").glob("run-*"))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("a file in the way")
    result = python("pretrain", *SMALL, f"output={tmp_path}", "name=run", OFFLINE)
    assert result.returncode == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("WARNING: W&B: [Errno 17] File exists")
    assert lines(tmp_path / "run")[-1]["step"] == 10


def test_a_service_that_dies_leaves_one_warning_and_the_run_continues(tmp_path: Path) -> None:
    with Start(tmp_path, "epochs=8", OFFLINE) as start:
        service = start.service()
        start.until(4)
        os.kill(service, signal.SIGKILL)
        assert start.wait() == 0, start.log.read_text()
    text = start.log.read_text()
    assert text.count("WARNING: W&B: ") == 1, text
    assert "Traceback" not in text
    assert list(rows(start.run)) == list(range(41))


def test_a_service_that_hangs_does_not_hold_the_run(tmp_path: Path) -> None:
    with Start(tmp_path, "epochs=20", OFFLINE, limits={"feed.END_SECONDS": 1.0}) as start:
        service = start.service()
        start.until(4)
        os.kill(service, signal.SIGSTOP)
        try:
            assert start.wait() == 0, start.log.read_text()
        finally:
            os.kill(service, signal.SIGKILL)
    text = start.log.read_text()
    assert text.count("WARNING: W&B: does not finish; the run and its") == 1
    assert list(rows(start.run)) == list(range(101))


# Small decisions.


def test_an_id_belongs_to_a_name_and_outlives_the_loss_of_its_file(tmp_path: Path) -> None:
    first = identity.run_id(tmp_path, "a", None)
    assert identity.run_id(tmp_path, "a", None) == first
    saved = {"run_id": first, "config": {"name": "a"}}
    (tmp_path / "run_id.json").unlink()
    assert identity.run_id(tmp_path, "a", saved) == first
    copy = identity.run_id(tmp_path, "b", saved)  # the same files under another name
    assert copy != first
    assert identity.run_id(tmp_path, "b", saved) == copy


@pytest.mark.parametrize("bad", ["../../elsewhere", "a*", "", 3, None])
def test_a_strangers_id_is_not_taken_into_the_names_of_folders(tmp_path: Path, bad: Any) -> None:
    saved = {"run_id": bad, "config": {"name": "a"}}
    drawn = identity.run_id(tmp_path, "a", saved)
    assert drawn.isalnum()
    (tmp_path / "run_id.json").write_text(json.dumps({"name": "a", "id": bad}))
    assert identity.run_id(tmp_path, "a", None).isalnum()


def test_the_environment_decides_unless_the_configuration_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for asked, got in {"": "auto", "dryrun": "offline", "online": "online"}.items():
        monkeypatch.setenv("WANDB_MODE", asked)
        assert wandb_run.mode(TrackingConfig()) == got
        assert wandb_run.mode(TrackingConfig(wandb="disabled")) == "disabled"
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert wandb_run.mode(TrackingConfig()) == "disabled"


def test_paths_are_shared_by_their_last_part_only() -> None:
    others = {"c": "data", "d": [0.5], "e": ""}
    config = {"a": {"root": "/home/alice/cats", "b": "~/dogs"}, **others}
    assert wandb_run.shareable(config) == {"a": {"root": "cats", "b": "dogs"}, **others}


def test_the_variables_of_wandb_are_obeyed(tmp_path: Path) -> None:
    chosen = {"WANDB_PROJECT": "birds", "WANDB_NAME": "wren", "WANDB_RUN_GROUP": "g"}
    chosen |= {"WANDB_TAGS": "x,y", "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path / "w")}
    place = [f"output={tmp_path}", "name=run", "stop_at_step=1"]
    result = python("pretrain", *SMALL, *place, **chosen)
    assert result.returncode == 0, result.stderr
    (path,) = (tmp_path / "w" / "wandb").glob("offline-run-*")
    run = Folder(path).run
    assert (run.project, run.display_name, run.run_group) == ("birds", "wren", "g")
    assert list(run.tags) == ["x", "y"]
    assert not (tmp_path / "run" / "wandb").exists()
