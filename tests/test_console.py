"""What a person sees during a run, in a terminal and in a batch job's log file."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moco_dist.runs.record import Metric
from moco_dist.tracking import terminal as tracking_terminal
from moco_dist.tracking.progress import Curve, RunProgress, duration
from tests import terminal
from tests.test_launch import TINY, python

BATCH_LINE = re.compile(
    r"\d\d-\d\d \d\d:\d\d +\d+/10 epoch +\d+\.\d "
    r"(loss \d+\.\d{3} top1 +\d+\.\d% +\d+ img/s( \d+s left)?|"
    r"kNN +\d+\.\d%( linear +\d+\.\d%)?( best +\d+\.\d% at \d+)?)"
)
# A run with all kinds of warnings and other output, until Ctrl-C ends it.
NOISY = """
import logging, sys, threading, warnings
from moco_dist.pretrain import run as pretrain
from moco_dist.runs import command
from moco_dist.config.recipe import PretrainConfig

def say(tracker, step):
    if step == 4:
        logging.getLogger("a").warning("w" * 58 + " by logging " + "x" * 60)
    if step == 6:
        warnings.warn("by Python, of\\ntwo lines")
        print("printed"), print("and complained", file=sys.stderr)
    if step == 8:
        thread = threading.Thread(target=logging.getLogger("b").warning, args=["by a thread"])
        thread.start(), thread.join()
        tracker.log(step, {"alarm": "collapse", "text": "all features are alike; " + "y" * 80})

start = pretrain.start.tracker

def tracker(session, total, *others):
    made = start(session, total, *others)
    made.sinks.append(lambda step, metrics: "alarm" in metrics or say(made, step))
    return made

pretrain.start.tracker = tracker
command.main(PretrainConfig, pretrain.run, None)
"""


def line(step: int, time: float, **metrics: float | str) -> dict[str, Any]:
    names = {"loss": "train/loss", "knn": "knn/top1", "fill": "queue/fill"}
    return {"step": step, "time": time, **{names.get(k, k): v for k, v in metrics.items()}}


def test_a_log_file_has_one_plain_line_for_each_interval(tmp_path: Path) -> None:
    settings = [f"output={tmp_path}", "runtime.device=cpu", "tracking.health_every_steps=5"]
    settings.append("monitor.linear=true")
    result = python("pretrain", *TINY, *settings, TERM="xterm")
    assert result.returncode == 0, result.stderr
    text = result.stdout
    assert text.isascii()
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert all(each == each.rstrip() for each in lines)
    dated = [each for each in lines if re.match(r"\d\d-\d\d ", each)]
    assert all(BATCH_LINE.fullmatch(each) for each in dated), dated
    assert max(map(len, dated)) < 80
    # 90 images are 5 steps of 16 an epoch; every second step, evaluations after each epoch.
    steps = [int(each.split("/")[0].split()[-1]) for each in dated]
    assert steps == [0, 1, 2, 4, 5, 5, 6, 8, 10, 10]
    written = (tmp_path / "pretrain/metrics.jsonl").read_text().splitlines()
    logged = [json.loads(each) for each in written]
    last = [each["train/loss"] for each in logged if "train/loss" in each][-1]
    assert f"loss {last:.3f}" in dated[-2]
    names = {name for each in logged[1:] for name in each} - {"step", "time"}
    assert names == set(Metric) - {Metric.PROBE_TOP1, Metric.CONTROL_TOP1}


def test_a_usual_line_has_less_than_80_characters() -> None:
    progress = RunProgress(total=17400, step=0)
    for step in (12340, 12350):
        newest = line(step, step * 1.45, epoch=step / 87, loss=4.5321, fill=1.0)
        newest |= {"train/accuracy_top1": 0.451, "train/images_per_second": 1234.5}
        progress.add(newest)
    text = tracking_terminal.plain(newest, progress)
    assert text is not None
    assert text.endswith(" 12350/17400 epoch 142.0 loss 4.532 top1 45.1% 1234 img/s 2h02m left")
    assert len(text) < 80


def test_a_file_never_gets_a_picture(tmp_path: Path) -> None:
    """FORCE_COLOR, which some machines set for all, makes rich take any file for a terminal."""
    with (tmp_path / "log").open("w") as log:
        console = Console(file=log, force_terminal=True)
        assert console.is_terminal
        write, display = tracking_terminal.show(console, 10, 0)
        assert display is None
        write(4, {"epoch": 0.8, "train/loss": 3.5})
    assert (tmp_path / "log").read_text()[11:] == "  4/10 epoch   0.8 loss 3.500\n"


def test_a_terminal_shows_a_picture_with_whole_lines_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "noisy.py"
    script.write_text(NOISY)
    monkeypatch.setenv("PYTHONPATH", str(terminal.ROOT))
    command = [sys.executable, str(script), *TINY, f"output={tmp_path}", "runtime.device=cpu"]
    command += ["epochs=1000", "knn.every_epochs=1000"]
    at_step_10 = re.compile(r"^[1-9]\d+/5000 ")

    def late(screen: terminal.Screen) -> bool:
        return any(at_step_10.match(each) for each in screen.lines[-8:])

    status, screen = terminal.run(command, until=late, keys=b"\x03")
    lines = [each.rstrip() for each in screen.lines]
    text = "\n".join(lines)
    assert status == 130, text
    assert screen.cursor
    # Nothing of an earlier picture is left over: one line each.
    for start in (r"\d+/5000 ", "epoch ", "loss ", "ALARM at step 8: all features"):
        assert sum(bool(re.match(start, each)) for each in lines) == 1, text
    warning = lines.index("WARNING: " + "w" * 58 + " by logging")
    assert lines[warning + 1] == "x" * 60
    above = [each for each in lines if not each.startswith("WARNING: UserWarning")]
    assert {"printed", "and complained", "WARNING: by a thread"} <= set(above)
    assert "WARNING: UserWarning: by Python, of two lines (" in " ".join(text.split())
    picture = next(place for place, each in enumerate(lines) if re.match(r"\d+/5000 ", each))
    assert warning < picture
    assert "left" in lines[picture]
    assert set(lines[picture + 2].removeprefix("loss ")) <= set(tracking_terminal.BLOCKS)
    assert text.count("^C") == 0
    assert "stopped by SIGINT at step" in text


def pictured(progress: RunProgress, width: int, ascii_only: bool = False) -> list[str]:
    file = io.StringIO()
    console = Console(width=width, file=file, force_terminal=True, color_system=None)
    console.print(tracking_terminal.picture(progress, width, ascii_only, 200.5))
    return file.getvalue().splitlines()


def test_a_narrow_terminal_gets_whole_figures() -> None:
    progress = RunProgress(total=400)
    for step in range(10, 210, 10):
        progress.add(line(step, float(step), epoch=step / 4, loss=5 - step / 100, fill=1.0))
        progress.add(line(step, step + 0.5, epoch=step / 4, knn=step / 400))
    progress.add(line(200, 200.5, alarm="leak", text="BatchNorm leaks; " + "z" * 100))
    for width in (30, 37, 77):
        shown = pictured(progress, width)
        assert max(map(len, shown)) <= width
        assert any("200/400" in each for each in shown)
        whole = " ".join(shown)
        for figure in ("epoch 50.0", "loss 3.000", "kNN 50.0%", "ALARM at step 200"):
            assert figure in whole
        # Falling and rising, from the highest mark to the lowest and back.
        blocks = tracking_terminal.BLOCKS
        curves = [each.split(" ")[-1] for each in shown if set(each.split(" ")[-1]) <= set(blocks)]
        assert (curves[0][0], curves[0][-1]) == (blocks[-1], blocks[0])
        assert (curves[1][0], curves[1][-1]) == (blocks[0], blocks[-1])
    shown = pictured(progress, 80, ascii_only=True)
    curves = [each for each in shown if each[:4] in ("loss", "kNN ")]
    assert len(curves) == 2
    assert all(each.isascii() for each in curves)


def test_the_time_left_counts_evaluations_that_are_to_come() -> None:
    """A simulated clock gives the true time left after each step."""
    steps_per_epoch, epochs, every, evaluation, step_seconds = 7, 46, 5, 40.0, 1.5
    total, clock = steps_per_epoch * epochs, 1000.0
    progress = RunProgress(total, 0, knn_every=every)
    seen: list[tuple[float, float | None]] = []
    for step in range(1, total + 1):
        lines = [(step_seconds, {"loss": 1.0})]
        if step % (every * steps_per_epoch) == 0 or step == total:
            lines.append((evaluation, {"knn": 0.5}))
        for seconds, metrics in lines:
            clock += seconds
            progress.add(line(step, clock, epoch=step / steps_per_epoch, **metrics))
            seen.append((clock, progress.seconds_left()))
    assert seen[1][1] == pytest.approx((total - 2) * step_seconds)  # before any evaluation
    assert seen[-1][1] is None
    for at, left in seen[every * steps_per_epoch : -1]:  # from the end of the first one
        assert left == pytest.approx(clock - at, abs=1e-6)


def test_a_probe_without_evaluations_ends_without_time_left() -> None:
    progress = RunProgress(total=4, knn_every=1)
    for step in (2, 4):
        progress.add(line(step, float(step), epoch=step / 2, loss=1.0))
    assert progress.seconds_left() is None


def test_a_resumed_launch_measures_its_own_pace() -> None:
    progress = RunProgress(total=100)
    for step in range(1, 11):
        progress.add(line(step, 50.0 * step, epoch=step / 10, loss=1.0))
    progress.begin_again()
    assert progress.seconds_left() is None
    for step in range(11, 14):
        progress.add(line(step, 90_000 + 2.0 * step, epoch=step / 10, loss=1.0))
    assert progress.seconds_left() == pytest.approx(2.0 * 87)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (3599, "59m59s"), (7500, "2h05m"), (273_600, "3d04h")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_curve_of_any_length_keeps_its_shape() -> None:
    curve = Curve()
    for value in range(100_000):
        curve.add(float(value))
        curve.add(float("nan"))
    assert len(curve.points) < 512
    assert curve.points == sorted(curve.points)
    # Means of equally many values in a row: an arithmetic sequence, too.
    steps = {b - a for a, b in zip(curve.points, curve.points[1:], strict=False)}
    assert len(steps) == 1
    drawn = curve.drawn(10, "0123456789")
    assert drawn == "0123456789"
    assert Curve().drawn(10, "01") == ""


def test_the_climb_of_the_loss_while_the_queue_fills_is_no_part_of_the_curve() -> None:
    progress = RunProgress(total=10)
    for step, (fill, loss) in enumerate([(0.5, 0.0), (0.9, 3.0), (1.0, 4.0), (1.0, 3.9)]):
        progress.add(line(step, float(step), fill=fill, loss=loss))
    assert progress.loss.points == [4.0, 3.9]


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "moco_dist.pretrain", *TINY]
        command += [f"output={tmp_path}", "runtime.device=cpu", "name=full"]
        result = subprocess.run(command, cwd=terminal.ROOT, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode in (0, 120), result.stderr  # 120: Python's own, of its last words
    assert json.loads((tmp_path / "full/status.json").read_text())["state"] == "done"
    logged = (tmp_path / "full/metrics.jsonl").read_text().splitlines()
    assert [json.loads(each)["step"] for each in logged[1:]] == [0, 1, 2, 4, 5, 5, 6, 8, 10, 10]
