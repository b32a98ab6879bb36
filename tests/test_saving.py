"""Which checkpoints are kept, and what a save in the background does and refuses."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.running import CheckpointConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.distributed import comms
from moco_dist.errors import DataError, NumbersError, OutputError
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import checkpoint, saving, session, status
from tests import processes
from tests.test_trainer import TINY

MODEL = {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(7)}


def steps(run: Path) -> list[int]:
    return [step for step, _ in checkpoint.step_folders(run)]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (CheckpointConfig(keep_last=2), [3, 8, 9]),
        (CheckpointConfig(keep_last=3), [3, 7, 8, 9]),
        (CheckpointConfig(keep_last=2, keep_every=4), [3, 4, 8, 9]),
        (CheckpointConfig(keep_last=2, keep_best=False), [8, 9]),
        (CheckpointConfig(keep_last=2, keep_every=2, keep_best=False), [2, 4, 6, 8, 9]),
    ],
)
def test_the_newest_the_best_and_multiples_stay(
    tmp_path: Path, settings: CheckpointConfig, kept: list[int]
) -> None:
    saver = saving.Saver(tmp_path, settings)
    for step in range(1, 10):
        best = {"step": 3, "knn_top1": 0.5} if step >= 3 else None
        saver.start(step, MODEL, {}, {"best": best})
    saver.finish()
    assert steps(tmp_path) == kept


def test_the_snapshot_is_of_the_moment_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, write = threading.Event(), saving.write
    monkeypatch.setattr(saving, "write", lambda *values: (go.wait(10), write(*values)))
    saver = saving.Saver(tmp_path, CheckpointConfig())
    weight = torch.zeros(4)
    saver.start(1, {"weight": weight}, {}, {})
    assert steps(tmp_path) == []
    saver.copied()
    weight += 1  # training continues
    go.set()
    saver.finish()
    assert checkpoint.read(checkpoint.folder_of(tmp_path, 1)).model["weight"].tolist() == [0] * 4


def test_an_error_in_the_background_is_kept_and_no_later_save_hides_it(tmp_path: Path) -> None:
    saver = saving.Saver(tmp_path, CheckpointConfig())
    saver.start(1, MODEL, {}, {})
    saver.start(2, {"weight": torch.tensor([1.0, float("nan")])}, {}, {})
    with pytest.raises(NumbersError, match="weight is not finite after step 2"):
        saver.finish()
    assert saver.failed
    saver.start(3, MODEL, {}, {})
    with pytest.raises(NumbersError, match="step 2"):
        saver.finish()
    assert steps(tmp_path) == [1]


def test_a_sum_that_overflows_is_not_taken_for_a_number_that_is_not_finite(tmp_path: Path) -> None:
    large = torch.full((4,), 1.7e308, dtype=torch.float64)
    saving.write(tmp_path, 1, {"large": large}, {}, {})
    assert steps(tmp_path) == [1]


def test_leftovers_of_killed_saves_go_and_other_folders_stay(tmp_path: Path) -> None:
    saving.write(tmp_path, 5, MODEL, {}, {})
    for name in (".step_00000010.ab12.tmp", ".step_00000001.cd34.old", "mine", ".hidden"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "file").touch()
    saving.clean(tmp_path)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"step_00000005", "mine", ".hidden"}


def test_a_checkpoint_whose_new_copy_did_not_come_is_the_old_one_again(tmp_path: Path) -> None:
    """As after a kill, or an error of the file system, between the two renames of a replacement."""
    saving.write(tmp_path, 5, MODEL, {}, {})
    folder = tmp_path / "checkpoints"

    def vanish() -> None:
        """Remove the new copy just before it is put in its place."""
        shutil.rmtree(next(folder.glob(".step_*.tmp")))

    with pytest.raises(OutputError):
        saving.write(tmp_path, 5, {"weight": torch.ones(1)}, {}, {}, vanish)
    assert steps(tmp_path) == []
    saving.clean(tmp_path)
    assert [path.name for path in folder.iterdir()] == ["step_00000005"]
    found = checkpoint.newest(tmp_path, set_aside=True)
    assert found is not None
    assert found.model["weight"].equal(MODEL["weight"])


def test_a_run_with_damaged_checkpoints_only_does_not_start_from_nothing(tmp_path: Path) -> None:
    for step in (5, 10):
        (saving.write(tmp_path, step, MODEL, {}, {}) / "state.json").write_text("{}")
    for _ in range(2):  # the second time they have been set aside already
        with pytest.raises(DataError) as error:
            checkpoint.newest(tmp_path, set_aside=True)
        assert "has no whole checkpoint, only damaged_step_" in str(error.value)
        assert "remove these folders to start from nothing" in str(error.value)


def test_a_checkpoint_of_an_older_format_is_refused_and_not_called_damaged(tmp_path: Path) -> None:
    folder = saving.write(tmp_path, 5, MODEL, {}, {})
    (folder / "state.json").write_text(json.dumps({"format": 1, "step": 5}, indent=1))
    with pytest.raises(DataError, match="checkpoint format 1, this version reads 2"):
        checkpoint.newest(tmp_path, set_aside=True)
    assert folder.exists()


def test_every_dtype_is_written_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {str(d): torch.tensor([0, 1, 1, 0, 1]).to(d) for d in saving._DTYPES}
    tensors |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "view": torch.eye(4).T[1:]}
    folder = saving.write(tmp_path, 1, tensors, {}, {})
    found = load_file(folder / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[k].equal(v) and found[k].dtype == v.dtype for k, v in tensors.items())


def wish(output: str) -> tuple[bool, bool]:
    """Let process 1 alone wish to save in the second step."""
    config = load(PretrainConfig, [*TINY, f"output={output}"])
    opened = session.start(config)
    trainer = Trainer(config, opened.accelerator, datasets.load(config.data))
    hooks = RunHooks(trainer, opened)
    trainer.train_step(hooks)
    before = hooks.agreed.save
    hooks.wants_save = comms.rank() == 1
    trainer.train_step(hooks)
    return before, hooks.agreed.save


def test_all_processes_save_when_the_clock_of_one_says_so(tmp_path: Path) -> None:
    assert processes.run(wish, 2, str(tmp_path)) == [(False, True)] * 2


def test_a_small_file_is_written_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    status.replace(path, "first")
    with pytest.raises(UnicodeEncodeError), status.written_whole(path) as temporary:
        temporary.write_text("zw\u00f6lf", encoding="ascii")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]
