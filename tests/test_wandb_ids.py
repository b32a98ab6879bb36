"""One id for one run, and no offline data of another run is removed."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest

from moco_dist.runs import identity
from tests.faults.jobs import TINY, Job
from tests.wandb_files import Folder

SETTINGS = [*TINY, "tracking.wandb=auto", "tracking.media_every_epochs=0", "checkpoint.keep_last=2"]
SHAPES = [part for part in TINY if part.startswith(("data.", "views.", "runtime."))]
PROBE = [*SHAPES, "epochs=2", "batch_size=8", "optim.lr=0.3", "tracking.wandb=auto"]


def exported(variables: dict[str, str], rank: int) -> None:
    """Plant: the environment of a script."""
    os.environ |= variables


def shared(folder: Path) -> dict[str, list[int]]:
    """Return the ids of the offline starts in a folder that runs share, with the last step each."""
    found: dict[str, list[int]] = {}
    for path in sorted((folder / "wandb").glob("offline-run-*")):
        start = Folder(path)
        found.setdefault(start.run.run_id, []).append(int(start.history[-1]["step"]))
    return found


def test_runs_that_share_a_folder_and_an_exported_id_keep_their_unsent_data(tmp_path: Path) -> None:
    place = tmp_path / "w"

    def start(name: str, exported_id: str, *arguments: str, module: str = "pretrain") -> str:
        variables = {"WANDB_DIR": str(place), "WANDB_MODE": "offline"}
        plant = partial(exported, variables | {"WANDB_RUN_ID": exported_id})
        with Job(tmp_path, *arguments, name=name, module=module, plant=plant) as job:
            assert job.wait(120) == [0], job.text()
            return job.text()

    start("other", "small-job7", *SETTINGS, "stop_at_step=2")
    start("run", "job7", *SETTINGS, "stop_at_step=3")
    assert shared(place) == {"small-job7": [2], "job7": [3]}
    start("run", "job7", *SETTINGS, "stop_at_step=5")  # its own older folder is replaced
    assert shared(place) == {"small-job7": [2], "job7": [5]}
    encoder = f"encoder={tmp_path / 'run'}"
    said = start("p", "job7", *PROBE, encoder, module="probe")
    own = json.loads((tmp_path / "p" / "run_id.json").read_text())["id"]
    assert own.startswith("job7-")
    assert f"WANDB_RUN_ID=job7 is the id of the encoder; this run has the id {own} at W&B" in said
    assert shared(place) == {"small-job7": [2], "job7": [5], own: [10]}


def test_an_exported_id_is_that_of_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "job7")

    def started(name: str, encoder: str | None = None) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        return identity.run_id(tmp_path / name, name, None, encoder)

    assert started("b") == "job7"
    assert caplog.text == ""
    second = started("a")  # older is who wrote first, whatever the names
    assert second.startswith("job7-")
    assert f"WANDB_RUN_ID=job7 is the id of {tmp_path / 'b'}; this run has the id {second}" in (
        caplog.text
    )
    third = started("c", encoder="job7")
    assert len({"job7", second, third}) == 3
    assert [started(name) for name in "bac"] == ["job7", second, third]  # for their whole lives
    (tmp_path / "a" / "run_id.json").unlink()
    assert started("a") == second
    # A copy of a run directory under another name is another run.
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "run_id.json").write_text((tmp_path / "b" / "run_id.json").read_text())
    assert started("d") not in ("job7", second, third)


@pytest.mark.parametrize("asked", ["x" * 64, "a"])
def test_a_second_id_can_be_used_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", asked)
    second = identity.run_id(tmp_path, "näme.of+run", None, encoder=asked)
    assert second != asked
    assert identity._USABLE.fullmatch(second)
