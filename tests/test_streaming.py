"""Streamed images: the crops are those of the views, wherever and whenever they are cut."""

from __future__ import annotations

import hashlib
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from moco_dist.config.encoder import EncoderConfig
from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import DataConfig, PretrainConfig, ViewsConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets, image_file
from moco_dist.data.image_file import Recipe
from moco_dist.data.streamed_images import StreamedImages
from moco_dist.data.view_source import StreamedSource
from moco_dist.distributed import comms, peers
from moco_dist.encoders import features
from moco_dist.encoders.load import Found
from moco_dist.errors import DataError
from moco_dist.method import views
from moco_dist.method.encoder import build_encoder
from moco_dist.method.plan import Plan, Step
from moco_dist.pretrain import loop, pictures, run
from moco_dist.pretrain.trainer import Trainer
from moco_dist.probe.linear_probe import LinearProbe
from moco_dist.runs import session
from moco_dist.runs.checkpoint import Checkpoint
from moco_dist.runs.session import Session
from moco_dist.tracking import media
from tests import image_sets, processes

RUN = [
    *("precision=fp64", "batch_size=16", "bn_groups=8", "epochs=4", "runtime.device=cpu"),
    *("data.size=32", "data.memory_gb=0", "data.workers=1", "views.size=24", "views.blur=0.5"),
    *("encoder.width=2", "encoder.dim=8", "moco.queue_size=40", "checkpoint.every_epochs=0"),
    *("knn.k=5", "tracking.every_steps=1"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_sets.write_folder(tmp_path_factory.mktemp("files") / "set", 60)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_sets.write_folder(tmp_path_factory.mktemp("squares") / "set", 60, side=32)


def streamed(root: Path, cache: Path, **values: Any) -> DataConfig:
    values = {"size": 32, "memory_gb": 0.0, "workers": 2} | values
    return DataConfig(name="folder", root=str(root), cache=str(cache), **values)


def close(splits: datasets.Splits) -> None:
    assert isinstance(splits.train, StreamedImages)
    splits.train.pool.close()


@pytest.mark.parametrize(("scale_min", "ratio_max"), [(0.2, 1.3333333333333333), (0.9, 3.0)])
def test_a_crop_box_is_that_of_the_views_for_any_size(scale_min: float, ratio_max: float) -> None:
    config = ViewsConfig(size=24, scale_min=scale_min, ratio_max=ratio_max)
    recipe = Recipe(24, (0,), config.ratio_min, config.ratio_max)
    index = torch.arange(500)
    numbers = views.crop_numbers(config, 3, 7, index, 1).tolist()
    without = 0
    for height, width in ((375, 500), (33, 32), (700, 90), (64, 1000), (3024, 4032)):
        draws = views.draw(config, 3, 7, index, 1, height, width)
        expected = torch.stack([draws.top, draws.left, draws.height, draws.width], dim=1)
        found = [image_file.box(row, height, width, recipe) for row in numbers]
        assert expected.equal(torch.tensor(found))
        centred = (height - draws.height) // 2 == draws.top
        without += int((centred & ((draws.width == width) | (draws.height == height))).sum())
    assert without > 500  # so that crops of attempts that all failed are among them


def test_streamed_squares_give_the_views_of_memory_up_to_eight_bits(
    squares: Path, tmp_path: Path
) -> None:
    """Only the crop is rounded to 256 levels, in each of its two passes."""
    config = ViewsConfig(size=24, jitter=0.0, grayscale=0.0, mean=[0, 0, 0], std=[1, 1, 1])
    held = datasets.load(streamed(squares, tmp_path, memory_gb=1.0))
    from_disk = datasets.load(streamed(squares, tmp_path))
    assert isinstance(held.train, datasets.Images)
    assert isinstance(from_disk.train, StreamedImages)
    samples = torch.arange(len(held.train))
    images, streaming = held.train.pixels, from_disk.train
    for view in (0, 1):
        exact = views.make(images, config, 0, 2, samples, view, torch.float64)
        crops = streaming.order_crops([config], 0, 2, samples, (view,)).collect(torch.device("cpu"))
        draws = views.draw(config, 0, 2, samples, view, 32, 32)
        flipped = torch.where(draws.flip[:, None, None, None], crops[:, 0].flip(3), crops[:, 0])
        difference = (flipped.double() / 255 - exact).abs() * 255
        assert difference.max() < 1.01  # half a level in each of the two passes
        assert difference.mean() < 0.35
    assert streaming.squares(samples).equal(images)
    assert streaming.labels.equal(held.train.labels)
    close(from_disk)


def test_workers_are_told_numbers_and_no_tensor_of_a_device(squares: Path, tmp_path: Path) -> None:
    """One of several processes has the rows and the epoch of a captured step on its GPU."""
    splits = datasets.load(streamed(squares, tmp_path))
    assert isinstance(splits.train, StreamedImages)
    asked = [ViewsConfig(size=24)], 0
    orders = [
        splits.train.order_crops(*asked, epoch, torch.arange(5), (0,))
        for epoch in (torch.tensor(3), 3)
    ]
    assert [type(order.draw.epoch) for order in orders] == [int, int]
    first, second = (order.collect(torch.device("cpu")) for order in orders)
    assert first.equal(second)
    close(splits)


def test_a_whole_crop_is_changed_by_its_flip_alone(squares: Path, tmp_path: Path) -> None:
    """The trainer applies all stages but the crop, as for images in memory."""
    whole = ["views.size=32", "views.scale_min=1", "views.ratio_min=1", "views.ratio_max=1"]
    whole += ["views_2.blur=1", "views_2.solarize=0.5"]
    trainer, memory = (
        build(tmp_path, squares, *whole, "data.validation=0", f"data.memory_gb={limit}")
        for limit in (0, 1)
    )
    samples = torch.arange(60)
    for view in (0, 1):
        # Crops that are the whole image take no resize: there is nothing to round.
        assert trainer.views(samples, 1, view).equal(memory.views(samples, 1, view))
    close(trainer.splits)


def start(output: Path | str, root: Path | str, *overrides: str) -> tuple[Trainer, Session]:
    place = [f"output={output}", f"data.root={root}", f"data.cache={output}/cache"]
    config = load(PretrainConfig, [*RUN, "data.name=folder", *place, *overrides])
    opened = session.start(config)
    return run.build(config, opened), opened


def build(output: Path | str, root: Path | str, *overrides: str) -> Trainer:
    return start(output, root, *overrides)[0]


def followed(output: str, root: str, until: int, overrides: list[str]) -> dict[str, Any]:
    """Train to a step; return a hash of the global batch's crops for each step, and the state."""
    trainer, opened = start(output, root, *overrides)
    first, found = trainer.step, {}
    while trainer.step < until:
        step, rows = trainer.step, trainer.plan.step(trainer.step, len(trainer.config.moco.passes))
        trainer.train_step()
        assert isinstance(trainer.source, StreamedSource)
        found[step] = step_hash(trainer.source, rows)
    loop.save(trainer, opened, wait=True)
    opened.close()
    close(trainer.splits)
    state = {name: value.clone() for name, value in trainer.moco.state_dict().items()}
    return {"first": first, "hashes": found, "state": state}


def on(world: int, output: Path, root: Path, until: int, *overrides: str) -> dict[str, Any]:
    each = processes.run(followed, world, str(output), str(root), until, list(overrides))
    for account in each[1:]:
        assert account["hashes"] == each[0]["hashes"]
    first: dict[str, Any] = each[0]
    return first


BY: tuple[Literal["exchange"], Literal["plan"]] = ("exchange", "plan")
WAYS = [(symmetric, way) for symmetric in (False, True) for way in BY]


def hashes(root: str, cache: str) -> list[list[str]]:
    """Return for each of the ways the hashes of the global batch's crops in four steps."""
    splits = datasets.load(streamed(Path(root), Path(cache), workers=1))
    assert isinstance(splits.train, StreamedImages)
    plan = Plan(len(splits.train), 16, 5, comms.rank(), comms.world_size())
    config = ViewsConfig(size=24, jitter=0.0, grayscale=0.0)
    recipes = [config, replace(config, scale_min=0.5, solarize=0.5)]
    found = []
    for symmetric, way in WAYS:
        passes = [(0, 1), (1, 0)] if symmetric else [(0, 1)]
        source = StreamedSource(splits.train, recipes, torch.float64, plan, passes, way)
        made = []
        for step in (0, 1, 2, 3, 1):
            source.begin(step)
            made.append(step_hash(source, plan.step(step, len(passes))))
        assert made.pop() == made[1]  # also out of order
        found.append(made)
        source.forget()
    splits.train.pool.close()
    return found


def step_hash(source: StreamedSource, rows: Step) -> str:
    """Return a hash of the views of queries and keys of all processes in the current step."""
    digest = hashlib.sha256(rows.samples.numpy().tobytes())
    for number, (view, key_view) in enumerate(source.passes):
        assert key_view is not None
        wanted = [
            (rows.samples[rows.query_rows], view),
            (rows.samples[rows.key_rows[number]], key_view),
        ]
        queries, keys = source.views(wanted, rows.epoch)
        digest.update(comms.all_gather(queries).numpy().tobytes())
        digest.update(comms.all_gather(keys)[rows.unshuffle[number]].numpy().tobytes())
    return digest.hexdigest()


def test_any_number_of_processes_and_either_way_of_keys_gives_the_same_crops(
    folder: Path, tmp_path: Path
) -> None:
    arguments = str(folder), str(tmp_path / "cache")
    runs = {world: processes.run(hashes, world, *arguments) for world in (1, 2, 4)}
    expected = runs[1][0]
    assert len({text for way in expected for text in way}) == 2 * 4  # an epoch has three steps
    assert expected[0] == expected[1]  # by exchange and by plan
    assert expected[2] == expected[3]
    for world, accounts in runs.items():
        for account in accounts:
            assert account == expected, world


def test_a_run_resumed_in_mid_epoch_on_other_processes_has_the_same_crops(
    folder: Path, tmp_path: Path
) -> None:
    straight = on(1, tmp_path / "straight", folder, 7)
    begun = on(2, tmp_path / "cut", folder, 5)  # an epoch has 3 steps
    resumed = on(4, tmp_path / "cut", folder, 7)
    assert resumed["first"] == 5
    assert begun["hashes"] | resumed["hashes"] == straight["hashes"]
    for name, value in straight["state"].items():
        assert (resumed["state"][name] - value).abs().max() <= 1e-10, name


def test_evaluation_sees_the_squares_that_memory_would_hold(folder: Path, tmp_path: Path) -> None:
    """Of images of many sizes, and with more batches than are decoded ahead."""
    held = datasets.load(streamed(folder, tmp_path, memory_gb=1.0))
    from_disk = datasets.load(streamed(folder, tmp_path))
    encoder = build_encoder(EncoderConfig(width=2, dim=8), 0).eval()
    config, pauses = ViewsConfig(size=24), list[int]()
    for part in ("train", "validation", "test"):
        found, expected = (
            features.extract(
                encoder.backbone, getattr(each, part), config, 7, lambda: pauses.append(1)
            )
            for each in (from_disk, held)
        )
        assert found.equal(expected)
    assert len(pauses) == 2 * (8 + 1 + 3)  # 54 training, 6 validation and 15 test images
    close(from_disk)


def test_an_evaluation_that_is_stopped_leaves_the_workers_well(
    folder: Path, tmp_path: Path
) -> None:
    images = datasets.load(streamed(folder, tmp_path, workers=1)).train
    assert isinstance(images, StreamedImages)
    rows = torch.arange(len(images))
    expected = images.squares(rows)
    for _ in range(5):
        batches = images.batches(rows.split(4))
        next(batches)
        batches.close()  # type: ignore[attr-defined]
        assert images.squares(rows).equal(expected)
    assert len(images.pool._slots) <= 6
    images.pool.close()


def test_pictures_and_neighbours_are_drawn_of_streamed_images(folder: Path, tmp_path: Path) -> None:
    trainer = build(tmp_path, folder, "views.size=32", "data.validation=0.2")
    trainer.train_step()
    trainer.accuracies()
    album = media.Album(tmp_path / "media")
    pictures.draw_step(trainer, album, torch.zeros(16, 4))
    pictures.draw_neighbours(trainer, album)
    drawn = {path.name for path in (tmp_path / "media").rglob("*")}
    assert drawn >= {"views.png", "neighbours.png"}
    assert not album.failed
    close(trainer.splits)


def stopped_by_bad_data(output: str, root: str, hurt: str) -> str:
    """Train on two processes; hurt the data of the second in the middle; return what is said."""
    trainer = build(output, root, "runtime.timeout_seconds=20")
    for _ in range(2):
        trainer.train_step()
    assert isinstance(trainer.splits.train, StreamedImages)
    if comms.rank() == 1:
        if hurt == "worker":
            os.kill(trainer.splits.train.pool.pids()[0], signal.SIGKILL)
        else:
            for path in Path(root).rglob("*.jpg"):
                path.write_bytes(b"no image any more")
    try:
        for _ in range(20):
            trainer.train_step()
    except DataError as error:
        peers.me.leave(str(error), True)
        return str(error)
    except RuntimeError:
        return peers.me.blame()
    return "nothing"


@pytest.mark.parametrize("hurt", ["worker", "files"])
def test_bad_data_of_one_process_is_said_by_all_in_one_sentence(tmp_path: Path, hurt: str) -> None:
    root = image_sets.write_folder(tmp_path / "set", 60)
    first, second = processes.run(stopped_by_bad_data, 2, str(tmp_path), str(root), hurt)
    if hurt == "worker":
        assert re.match(r"the data worker with pid \d+ was ended by SIGKILL", second)
        assert re.match(r"process 1 .* failed: the data worker with pid .* SIGKILL", first)
    else:
        for sentence in (first, second):  # whoever comes upon one first
            assert "jpg: not a readable image (its content is none of JPEG" in sentence


def test_a_probe_trains_on_new_views_of_streamed_images(folder: Path, tmp_path: Path) -> None:
    settings = [f"data.root={folder}", f"data.cache={tmp_path}", f"output={tmp_path}"]
    settings += ["data.name=folder", "data.size=32", "data.memory_gb=0", "data.workers=1"]
    settings += ["views.size=24", "batch_size=16", "top_k=2", "name=p", "runtime.device=cpu"]
    config = load(ProbeConfig, [*settings, "control=false"])
    architecture = EncoderConfig(width=2, dim=8)
    backbone = build_encoder(architecture, 0).backbone
    nothing = Checkpoint(tmp_path, 0, {}, {}, {})
    source = Found(backbone, architecture, config.views, 32, "built here", nothing)
    trial = LinearProbe(config, session.start(config), datasets.load(config.data), source)
    rows = trial.plans[0].step(0)
    trial.sources[0].begin(0)
    samples, epochs = trial.rows()
    inputs, labels = trial.inputs(samples, *epochs)
    (views,) = trial.sources[0].any_views([(rows.samples, 0)], rows.epoch)
    assert inputs[0, 0].equal(backbone(views))
    assert samples[0].equal(rows.samples)
    assert labels[0].equal(trial.splits.train.labels[rows.samples])
    assert bool(trial.train_step().isfinite().all())
    close(trial.splits)
