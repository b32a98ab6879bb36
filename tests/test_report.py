"""What `moco_dist.report` says of runs is what their files hold, whatever state those are in."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml

from moco_dist.distributed.machine import BOOT
from moco_dist.report.run import run as report
from moco_dist.report.table import standing
from moco_dist.report.table import table as table_of
from moco_dist.runs.lock import RunLock
from moco_dist.runs.record import read
from tests.test_launch import TINY, python
from tests.test_run_lock import claim

Text = Callable[..., str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a real pretraining and a real probe of it."""
    output = tmp_path_factory.mktemp("runs")
    each = [f"output={output}", "runtime.device=cpu"]
    result = python("pretrain", *TINY, *each, "name=real")
    assert result.returncode == 0, result.stderr
    size = [part for part in TINY if part.startswith(("data.", "views.", "batch_size"))]
    probe = [*size, "epochs=3", "augment=false", "optim.lr=0.3", f"encoder={output / 'real'}"]
    result = python("probe", *probe, *each)
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def page(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a real pretraining and its probe."""
    place = tmp_path_factory.mktemp("page")
    assert report([str(runs / "real"), "--output", str(place)]) == 0
    return place / "report.html"


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Text:
    """Return a function that returns what the command prints, without errors."""

    def tell(*runs: Path) -> str:
        assert report(["--text", *map(str, runs)]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        assert captured.out.isascii()
        assert captured.out.isprintable() or "\x1b" not in captured.out
        return captured.out

    return tell


def cells(text: str) -> dict[str, dict[str, str]]:
    """Return the table as {run: {column: text}}; columns are two spaces or more apart."""
    lines = text.partition("\n\n")[0].splitlines()
    names, *rows = [[part.strip() for part in line.split("  ") if part] for line in lines]
    return {row[0]: dict(zip(names, row, strict=True)) for row in rows}


def entries(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def write(run: Path, **files: object) -> Path:
    run.mkdir(exist_ok=True)
    for name, content in files.items():
        (run / f"{name}.json").write_text(json.dumps(content))
    return run


def test_the_table_holds_the_numbers_of_the_files(runs: Path, told: Text) -> None:
    table = cells(told(runs / "real", runs / "real-probe"))
    lines = entries(runs / "real")
    knn = {line["step"]: line["knn/top1"] for line in lines if "knn/top1" in line}
    assert set(knn) == {0, 5, 10}
    assert table["real"] == {
        "run": "real",
        "kind": "pretrain",
        "state": "done",
        "step": "10/10",  # 90 images make 5 batches of 16, and there are 2 epochs
        "loss": f"{lines[-2]['train/loss']:.3f}",
        "kNN %": f"{knn[10] * 100:.2f}",
        "best %": f"{max(knn[5], knn[10]) * 100:.2f}",
        "test %": "-",
        "control %": "-",
    }
    done = json.loads((runs / "real-probe" / "DONE").read_text())
    probe = table["real-probe"]
    assert (probe["kind"], probe["step"], probe["kNN %"]) == ("probe", "15/15", "-")
    assert probe["test %"] == f"{done['probe']['test']['top1'] * 100:.2f}"
    assert probe["control %"] == f"{done['control']['test']['top1'] * 100:.2f}"


@pytest.mark.parametrize("more", [0, 3])
def test_below_the_table_are_the_keys_that_differ(
    runs: Path, tmp_path: Path, told: Text, more: int
) -> None:
    changes = {"seed": "7", "moco.temperature": "0.25", "moco.symmetric": "true"}
    changes |= {f"optim.{key}": "0.5" for key in ("lr", "momentum", "gamma", "lr_min", "trust")}
    changes |= {f"knn.{key}": "5" for key in ("k", "temperature", "every_epochs")[:more]}
    other = tmp_path / "other"
    shutil.copytree(runs / "real", other)
    config = yaml.safe_load((other / "config.yaml").read_text())
    before = {}
    for key, text in changes.items():
        group, _, name = key.rpartition(".")
        leaves = config[group] if group else config
        before[key], leaves[name] = leaves[name], yaml.safe_load(text)
    (other / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    _, _, below = told(runs / "real", other, runs / "real-probe").partition("\n\n")
    title, *rows = below.splitlines()
    assert title == "Keys that differ between the pretraining runs:"
    shown = [dict(word.split("=") for word in row.split()[1:]) for row in rows[:2]]
    assert [row.split()[0] for row in rows[:2]] == ["real", "other"]
    assert rows[2:] == ([f"and {more} more, which the page lists"] if more else [])
    for found, truth in zip(shown, (before, changes), strict=True):
        assert len(found) == 8
        assert {k: yaml.safe_load(v) for k, v in found.items()} == {
            key: yaml.safe_load(str(truth[key])) for key in found
        }
    # Nothing is printed of runs that are alike.
    assert "\n\n" not in told(runs / "real", runs / "real-probe")


def test_one_run_alone_shows_its_details(runs: Path, told: Text) -> None:
    text = told(runs / "real")
    for words in ("resnet18, width 4", "temperature 0.1, queue size 40", "before the first step"):
        assert words in text
    assert "2 epochs, batch 16, lr 0.03 (cosine), fp32, seed 0" in text
    assert "step 5, step 10" in text
    done = json.loads((runs / "real-probe" / "DONE").read_text())
    control = f"random encoder {100 * done['control']['test']['top1']:.2f}%"
    assert control in told(runs / "real-probe")


def test_numbers_stand_under_each_other(runs: Path, told: Text) -> None:
    lines = told(runs / "real", runs / "real-probe").partition("\n\n")[0].splitlines()
    ends = {line.rindex(" ") + len(line[line.rindex(" ") :]) for line in lines[1:]}
    assert ends == {len(lines[0])}


def test_a_refused_job_is_shown_with_its_reason(tmp_path: Path, told: Text) -> None:
    reason = "batch_size=250 can't be cut into bn_groups=8 equal groups" + " x" * 200
    status = {"state": "configuration", "exit_status": 78, "step": 0, "reason": reason}
    text = told(write(tmp_path / "refused", status=status))
    assert f"error (configuration, exit status 78) at step 0: {reason}\n" in text
    assert cells(text)["refused"]["state"] == "configuration"


@pytest.mark.parametrize("content", [b"", b"\0\xff\xfe{", b"[" * 100_000, b"[1]", b"null", b'"x"'])
def test_an_empty_or_broken_directory_is_no_traceback(
    tmp_path: Path, told: Text, content: bytes
) -> None:
    (tmp_path / "bare").mkdir()
    assert "the folder is empty" in told(tmp_path / "bare")
    broken = tmp_path / "broken"
    (broken / "checkpoints" / "step_x").mkdir(parents=True)
    for name in ("status.json", "config.yaml", "DONE", "metrics.jsonl", ".lease", ".owner"):
        (broken / name).write_bytes(content)
    assert cells(told(broken, tmp_path / "bare"))["broken"]["state"] == "unknown"


def test_a_line_cut_short_a_header_and_an_alarm_are_understood(
    runs: Path, tmp_path: Path, told: Text
) -> None:
    run = tmp_path / "cut"
    shutil.copytree(runs / "real", run)
    whole = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in whole if json.loads(line).get("step", 0) <= 4]
    alarm = {"step": 4, "alarm": "collapse", "text": "all features are alike; lower optim.lr"}
    odd = ["[1]", "nonsense", '{"step": "4"}', '{"step": NaN}', '{"step": -1, "train/loss": 9}']
    lines = ['{"schema": 1}', *kept, json.dumps(alarm), *odd, '{"step": 5, "time": 17']
    (run / "metrics.jsonl").write_text("\n".join(lines))
    write(run, status={"state": "stopped", "exit_status": 75, "step": 4, "reason": "by SIGTERM"})
    text = told(run)
    row = cells(text)["cut"]
    assert (row["state"], row["step"]) == ("stopped", "4/10")
    assert row["loss"] == f"{json.loads(kept[-1])['train/loss']:.3f}"
    assert "alarm at step 4, collapse: all features are alike; lower optim.lr" in text
    assert "The pretraining cut was stopped at step 4 of 10 (40%): by SIGTERM" in text


def test_a_number_that_is_not_finite_is_shown(tmp_path: Path, told: Text) -> None:
    run = write(tmp_path / "nan", status={"state": "internal", "exit_status": 70, "step": 3})
    (run / "metrics.jsonl").write_text('{"step": 3, "epoch": 1.0, "train/loss": NaN}\n')
    assert cells(told(run))["nan"]["loss"] == "nan"


def test_a_run_without_an_owner_is_gone_and_one_with_an_owner_runs(
    runs: Path, tmp_path: Path, told: Text
) -> None:
    run = tmp_path / "killed"
    shutil.copytree(runs / "real", run)
    write(run, status={"state": "running", "exit_status": None, "step": 0, "pid": os.getpid()})
    lock = RunLock(run)
    try:
        assert read(run).state == "running"
        for pid, state in ((1, "starting"), (os.getpid(), "stopped")):  # of the launch before, ours
            write(run, status={"state": "stopped", "exit_status": 75, "step": 5, "pid": pid})
            assert read(run).state == state
    finally:
        lock.release()
    write(run, status={"state": "running", "exit_status": None, "step": 0, "pid": os.getpid()})
    assert read(run).state == "gone"
    # A kill leaves the claim behind, of a dead process or of a reused process number.
    for pid in (2**22 + 1, os.getpid()):
        claim(run, socket.gethostname(), BOOT, pid)
        text = told(run)
        assert "was killed or lost its machine after step 10 of 10: process" in text
        assert "the same command resumes from step 10" in text


def test_the_time_left_is_told_by_the_newest_launch_alone(tmp_path: Path, told: Text) -> None:
    """Ten steps in ten seconds, three days without the machine, and ten steps in twenty seconds."""
    days, began = 3 * 86400, 1_700_000_000
    times = [(step, began + step) for step in range(1, 11)]
    times += [(step, began + days + 2 * step) for step in range(11, 21)]
    lines = [{"step": n, "epoch": n / 5, "time": at, "train/loss": 1.0} for n, at in times]
    started = datetime.fromtimestamp(began + days, timezone(timedelta(hours=-3)))
    environment = {"started": started.strftime("%Y-%m-%dT%H:%M:%S%z")}
    run = write(tmp_path / "run", status={"state": "running"}, environment=environment)
    (run / "config.yaml").write_text("epochs: 10\nmoco:\n  queue_size: 8\n")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    claim(run)
    found = read(run)
    assert found.state == "running"
    assert ", about 1m00s left" in standing("run", found)  # 30 steps


def test_an_owner_on_another_machine_is_known_by_its_heartbeat(tmp_path: Path) -> None:
    run = write(tmp_path / "far", status={"state": "running", "exit_status": None, "step": 0})
    claim(run)
    assert read(run).state == "running"
    before = time.time() - 120
    os.utime(run / ".lease", (before, before))
    found = read(run)
    assert found.state == "gone"
    assert "process 2231 on elsewhere" in found.reason


def test_runs_that_are_not_there_have_a_sentence_and_the_others_a_table(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "nowhere", runs / "real", runs / "real/DONE"
    assert report(["--text", *map(str, found)]) == 66
    captured = capsys.readouterr()
    fix = "give runs/NAME, where a run has begun\n"
    assert captured.err == (
        f"error: {found[0]}: no such run directory; {fix}error: {found[2]}: not a directory; {fix}"
    )
    assert list(cells(captured.out)) == ["real"]


def test_a_command_line_without_a_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert report([]) == 78
    assert report(["--colour"]) == 78
    assert capsys.readouterr().err == (
        "error: no run directory was given; give one or several, such as runs/NAME\n"
        "error: unrecognized arguments: --colour; see --help\n"
    )


def test_a_narrow_terminal_gets_names_on_lines_of_their_own(runs: Path, tmp_path: Path) -> None:
    long = tmp_path / ("n" * 60)
    shutil.copytree(runs / "real", long)
    records = [read(run) for run in (long, runs / "real-probe")]
    narrow = list(table_of(records, 80))
    assert max(map(len, narrow)) <= 80
    assert "n" * 60 in narrow
    assert len(list(table_of(records, None))) == 3
