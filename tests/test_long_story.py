"""A streamed run through what happens to long runs: it goes on each time, and is the same run.

The 2,000 images are real JPEG files drawn here, or the first of those below the folder that the
environment variable TEST_IMAGES names, such as CIFAR-10 as files.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.data.streamed_images import StreamedImages
from moco_dist.method.plan import Plan
from moco_dist.runs import checkpoint
from moco_dist.runs.slurm_job import REQUEUE, end
from tests import image_sets
from tests.faults.jobs import USR1, Job, last_step, status
from tests.faults.stops import slow_steps
from tests.test_hangup import Terminal, in_terminal

COUNT = 2000
# 28 steps an epoch.
RUN = [
    *("precision=fp64", "batch_size=64", "bn_groups=8", "epochs=2", "runtime.device=cpu"),
    *("data.name=folder", "data.size=32", "data.memory_gb=0", "data.workers=1", "views.size=32"),
    *("encoder.width=2", "encoder.dim=16", "moco.queue_size=512", "checkpoint.every_epochs=0"),
    *("tracking.every_steps=1", "knn.every_epochs=1", "knn.k=20", "tracking.media_every_epochs=0"),
]


def images(root: Path) -> Path:
    """Write or copy 2,000 images, 200 of each class."""
    source = os.environ.get("TEST_IMAGES")
    for kind in range(10):
        folder = root / "train" / f"class_{kind}"
        folder.mkdir(parents=True)
        if source:
            found = sorted(path for path in Path(source).iterdir() if path.is_dir())[kind]
            for file in sorted(found.iterdir())[: COUNT // 10]:
                shutil.copy(file, folder)
            continue
        for number in range(COUNT // 10):
            picture = image_sets.picture(1000 * kind + number, 32 + kind, 32)
            (folder / f"{number:04d}.jpg").write_bytes(image_sets.jpeg(picture))
    return root


def drawn_at(arguments: list[str], step: int) -> Path:
    """Return a file that is in the batch of a step, and in no earlier one."""
    splits = datasets.load(load(PretrainConfig, arguments).data)
    assert isinstance(splits.train, StreamedImages)
    rows = Plan(len(splits.train), 64, 0).step(step).samples
    (place,) = splits.train.catalogue.places([int(splits.train.rows[rows[0]])])
    return Path(place.path)


def in_slurm(outcome: Path, restarts: int, rank: int) -> None:
    """Plant: the environment of a job script."""
    slow_steps(0.1, rank)
    os.environ |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    os.environ |= {"SLURM_JOB_END_TIME": str(int(time.time()) + 3600)}
    os.environ["MOCO_DIST_OUTCOME"] = str(outcome)


def words(job: Job) -> str:
    text = " ".join(job.text().split())
    job.log.unlink()
    return text


@pytest.mark.slow
def test_a_streamed_run_goes_on_through_all_of_it_and_is_the_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = images(tmp_path / "set")
    assert len(list(root.rglob("*.*"))) == COUNT
    arguments = [*RUN, f"data.root={root}", f"data.cache={tmp_path / 'cache'}"]
    bad = drawn_at(arguments, 9)
    bad.write_bytes(bad.read_bytes()[:400])

    # Undisturbed: one process that is told to go on without the file.
    with Job(tmp_path, *arguments, "data.skip_unreadable=true", name="whole") as job:
        assert job.wait(300) == [0], job.text()
        assert f"1 unreadable file set aside: {bad} (" in words(job)
    whole = job.run

    # The truncated file ends the run, which has saved what came before.
    with Job(tmp_path, *arguments) as job:
        assert job.wait(300) == [65], job.text()
        text = words(job)
    run = job.run
    assert f"error: {bad}: not a readable image (" in text
    assert "saved after step 9 of 56; the same command resumes from there" in text
    assert (status(run)["state"], last_step(run)) == ("data", 9)

    # Removed, as it was told; on two processes, in a job that Slurm warns of its end.
    bad.unlink()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    outcome = tmp_path / "outcome.json"
    with Job(tmp_path, *arguments, processes=2, plant=partial(in_slurm, outcome, 0)) as job:
        job.until_step(14)
        job.send(USR1, 0)
        assert set(job.wait(300)) == {75}, job.text()
        text = words(job)
    assert (
        f"since this run began there are 1 gone (first {bad.relative_to(root / 'train')})" in text
    )
    assert f"1 unreadable file set aside: {bad} (it is gone); other images of its class" in text
    told: dict[str, Any] = json.loads(outcome.read_text())
    step = last_step(run)
    assert end(run, told, "RUNNING") == (
        REQUEUE,
        f"to be requeued at step {step}: {told['reason']}",
    )

    # The requeued job, on four processes; then a terminal that closes.
    stop = f"stop_at_step={step + 6}"
    with Job(tmp_path, *arguments, stop, processes=4, plant=partial(in_slurm, outcome, 1)) as job:
        assert set(job.wait(300)) == {0}, job.text()
        assert f"resumed at step {step}, from step_000000{step}" in words(job)
    terminal = Terminal()
    with Job(tmp_path, *arguments, plant=partial(in_terminal, terminal.name, False)) as job:
        job.until_step(step + 12)
        terminal.close()
        assert job.wait(300) == [75], terminal.output
    assert "stopped by SIGHUP" in status(run)["reason"]
    shown = " ".join(terminal.output.decode().split())
    assert "1 unreadable file set aside" in shown.replace("\r", "")

    # To the end, which is that of the undisturbed run.
    with Job(tmp_path, *arguments, processes=2) as job:
        assert set(job.wait(300)) == {0}, job.text()
    first, last = checkpoint.newest(whole), checkpoint.newest(run)
    assert first is not None
    assert last is not None
    assert (first.step, last.step) == (56, 56)
    for tensors, others in ((first.model, last.model), (first.optimizer, last.optimizer)):
        assert tensors.keys() == others.keys()
        for name, value in tensors.items():
            scale = value.abs().max().clamp(min=1)
            assert (others[name] - value).abs().max() <= 1e-10 * scale, name
    noted = json.loads((run / "set_aside.json").read_text())["train"]
    assert {(each["file"], each["set_aside"]) for each in noted} == {
        (str(bad.relative_to(root / "train")), True),
        (str(bad.relative_to(root / "train")), False),
    }
