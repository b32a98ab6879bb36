"""A checkpoint is whole or absent, holds no code, and says plainly what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.running import CheckpointConfig
from moco_dist.config.yaml_files import load
from moco_dist.distributed import comms, peers
from moco_dist.encoders import load as encoders_load
from moco_dist.errors import ConfigError, DataError, MissingError, OutputError
from moco_dist.notebook import run_pretrain
from moco_dist.pretrain import loop, run
from moco_dist.runs import checkpoint, saving
from moco_dist.runs import session as runs_session
from tests import processes

MODEL = {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(7)}


def write(run: Path, *steps: int, keep: int = 5) -> None:
    for step in steps:
        momentum = {"momentum.weight": MODEL["weight"] * step}
        saving.write(run, step, MODEL, momentum, {"enqueued": 3})
        saving.prune(run, CheckpointConfig(keep_last=keep), None)


def newest(run: Path) -> checkpoint.Checkpoint:
    found = checkpoint.newest(run)
    assert found is not None
    return found


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    write(tmp_path, 12)
    found = newest(tmp_path)
    assert (found.step, found.state["enqueued"]) == (12, 3)
    assert found.path == tmp_path / "checkpoints" / "step_00000012"
    assert all(found.model[name].equal(MODEL[name]) for name in MODEL)
    assert found.optimizer["momentum.weight"].equal(MODEL["weight"] * 12)
    names = {path.name for path in found.path.iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json"}


def test_the_newest_ones_are_kept_and_nothing_else_is_left_behind(tmp_path: Path) -> None:
    write(tmp_path, 5, 90, 100, 1000, keep=2)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step_00000100", "step_00001000"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 5)
    saving.write(tmp_path, 5, {"weight": torch.ones(1)}, {}, {})
    assert newest(tmp_path).model["weight"].tolist() == [1]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    write(tmp_path, 10, 20)
    path = tmp_path / "checkpoints" / "step_00000020" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content if damage == "bit" else content[:-4])
    assert newest(tmp_path).step == 10
    assert "step_00000020" in caplog.text
    assert "going back to the previous checkpoint" in caplog.text
    with pytest.raises((DataError, MissingError)) as error:
        encoders_load.find(path.parent) if damage != "gone" else checkpoint.read(path.parent)
    assert str(path.parent) in str(error.value)


def test_a_checkpoint_that_can_not_be_read_now_keeps_its_name(tmp_path: Path) -> None:
    """As one on a server that is away for a moment; reading the memory of a process fails so."""
    write(tmp_path, 10, 20)
    file = tmp_path / "checkpoints" / "step_00000020" / "state.json"
    content = file.read_bytes()
    file.unlink()
    file.symlink_to("/proc/self/mem")
    found = checkpoint.newest(tmp_path, set_aside=True)
    assert found is not None
    assert found.step == 10
    shutil.rmtree(found.path)
    with pytest.raises(DataError, match="has no whole checkpoint, only step_00000020;") as error:
        checkpoint.newest(tmp_path, set_aside=True)
    assert error.value.again
    with pytest.raises(DataError, match=r"step_00000020: can't be read \(Input/output error\)"):
        checkpoint.read(file.parent)
    file.unlink()
    file.write_bytes(content)
    assert newest(tmp_path).step == 20


def test_a_half_written_folder_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 10)
    (tmp_path / "checkpoints" / ".step_00000020.123.tmp").mkdir()
    assert newest(tmp_path).step == 10


def test_a_missing_checkpoint_has_its_sentence(tmp_path: Path) -> None:
    with pytest.raises(MissingError) as error:
        encoders_load.find(tmp_path / "nowhere")
    assert str(error.value) == (
        f"{tmp_path / 'nowhere'}: no such file or folder; give a run that has been pretrained, "
        "a checkpoint folder, an export, or a file with a state dict"
    )
    with pytest.raises(MissingError) as error:
        encoders_load.find(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: no checkpoint in this folder; give a run directory or a checkpoint folder"
    )
    assert error.value.exit_status == 66


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    output = tmp_path_factory.mktemp("runs")
    config = load(PretrainConfig, [*TINY, f"output={output}", "name=tiny"])
    session = runs_session.start(config)
    trainer = run.build(config, session)
    for _ in range(2):
        trainer.train_step()
    loop.save(trainer, session, wait=True)
    session.close()
    return output / "tiny"


TINY = [
    *("batch_size=16", "bn_groups=8", "encoder.width=4", "encoder.dim=8", "moco.queue_size=32"),
    *("data.shapes_train=60", "data.shapes_test=20", "data.size=16", "views.size=16"),
    "runtime.device=cpu",
]


def tampered(pretrained: Path, folder: Path, **encoder: object) -> checkpoint.Checkpoint:
    shutil.copytree(pretrained, folder)
    found = encoders_load.checkpoint_of(folder)
    found.state["config"]["encoder"] |= encoder
    return found


def test_a_checkpoint_of_another_architecture_lists_the_tensors(
    pretrained: Path, tmp_path: Path
) -> None:
    found = tampered(pretrained, tmp_path / "wide", width=8)
    with pytest.raises(DataError) as error:
        encoders_load.of_checkpoint(found)
    assert str(error.value).startswith(
        f"{found.path}: holds another architecture than its configuration says "
        "(backbone.conv1.weight is (4, 3, 3, 3) and should be (8, 3, 3, 3); "
        "backbone.bn1.weight is (4,) and should be (8,); "
    )
    assert str(error.value).endswith(" more); use the checkpoint of the matching run")
    found = tampered(pretrained, tmp_path / "mlp", head="mlp")
    with pytest.raises(DataError) as error:
        encoders_load.of_checkpoint(found)
    assert "head.2.weight is missing" in str(error.value)
    assert "head.0.weight is (8, 32) and should be (32, 32)" in str(error.value)


def test_a_folder_without_write_permission_has_its_sentence(tmp_path: Path) -> None:
    # A file in the place of the folder stops root too, which permissions don't.
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(OutputError) as error:
        write(tmp_path, 3)
    said = "can't be written (File exists); free it, or choose output=FOLDER"
    assert str(error.value) == f"{tmp_path / 'checkpoints/step_00000003'}: {said}"
    assert error.value.exit_status == 74


def choose(run: Path) -> tuple[int, int]:
    return comms.rank(), newest(run).step


def fail_to_write(run: Path) -> str:
    try:
        peers.from_main(lambda: write(run, 3))
    except OutputError as error:
        return str(error)
    return "no error"


def test_all_processes_choose_the_same_checkpoint_and_fail_together(tmp_path: Path) -> None:
    write(tmp_path / "good", 10, 20)
    assert processes.run(choose, 2, tmp_path / "good") == [(0, 20), (1, 20)]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "checkpoints").write_text("in the way")
    first, second = processes.run(fail_to_write, 2, tmp_path / "bad")
    assert first == second
    assert "can't be written" in first


def test_checkpoints_hold_no_pickle(pretrained: Path) -> None:
    path = encoders_load.checkpoint_of(pretrained).path
    state = json.loads((path / "state.json").read_text())
    assert state["config"]["encoder"]["width"] == 4
    for file in path.iterdir():
        assert b"\x80\x04" not in file.read_bytes()[:2]
        assert file.suffix in (".safetensors", ".json")
        umask = os.umask(0)
        os.umask(umask)
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_resuming_under_a_changed_configuration_names_the_keys(pretrained: Path) -> None:
    command = [sys.executable, "-m", "moco_dist.pretrain", *TINY, "optim.lr=0.5", "seed=3"]
    command += [f"output={pretrained.parent}", "name=tiny"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 78
    assert result.stderr.splitlines()[-1] == (
        f"error: {pretrained} holds a run with another configuration (optim.lr: 0.03 -> 0.5; "
        "seed: 0 -> 3); restore that configuration to resume the run, or choose name=... for a "
        "new one"
    )
    assert "Traceback" not in result.stderr


def test_a_run_of_a_version_with_fewer_keys_is_resumed_with_their_defaults(
    pretrained: Path, tmp_path: Path
) -> None:
    shutil.copytree(pretrained, tmp_path / "tiny")
    folder = encoders_load.checkpoint_of(tmp_path / "tiny").path
    state = {k: v for k, v in checkpoint.read(folder).state.items() if k != "sha256"}
    assert state["config"].pop("init_from") == ""
    assert state["config"]["data"].pop("limit") == 0
    (folder / "state.json").unlink()
    saving._write_state(folder / "state.json", state)
    config = load(PretrainConfig, [*TINY, f"output={tmp_path}", "name=tiny"])
    session = runs_session.start(config)
    trainer = run.build(config, session)
    session.close()
    assert trainer.step == 2
    given = dataclasses.replace(config.data, limit=100)
    with pytest.raises(ConfigError, match=r"\(data\.limit: 0 -> 100\)"):
        runs_session.start(dataclasses.replace(config, data=given))


def test_a_refused_launch_leaves_the_status_of_a_finished_run(tmp_path: Path) -> None:
    words = [*TINY, f"output={tmp_path}", "epochs=1", "tracking.wandb=disabled"]
    done = run_pretrain(load(PretrainConfig, [*words, "name=done"]))
    before = (done / "status.json").read_text()
    assert json.loads(before)["state"] == "done"
    with pytest.raises(ConfigError, match="another configuration"):
        run_pretrain(load(PretrainConfig, [*words, "name=done", "optim.lr=0.5"]))
    assert (done / "status.json").read_text() == before
