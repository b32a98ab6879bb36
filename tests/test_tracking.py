"""metrics.jsonl and its feeds: headers, cuts, rows, and what a feed never does to a run."""

from __future__ import annotations

import atexit
import json
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image

from moco_dist.config.recipe import ViewsConfig
from moco_dist.encoders import features
from moco_dist.errors import StoppedError
from moco_dist.runs import command
from moco_dist.tracking import feed
from moco_dist.tracking.media import Album
from moco_dist.tracking.tracker import Tracker, cut_media, json_lines
from tests.test_launch import TINY, lines, python

HEADER = '{"schema": "moco_dist.metrics", "version": 1}\n'


def steps(path: Path) -> list[int]:
    return [json.loads(line).get("step", -1) for line in path.read_text().splitlines()]


def test_the_first_line_names_the_schema_and_stands_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for kept, step in ((-1, 0), (0, 1), (1, 2)):
        json_lines(path, kept)(step, {"loss": 1.0})
        assert path.read_text().startswith(HEADER)
        assert steps(path) == [-1, *range(step + 1)]


@pytest.mark.parametrize("header", [HEADER, ""], ids=["with a header", "of an older version"])
def test_lines_after_the_checkpoint_and_torn_ones_are_cut_off(tmp_path: Path, header: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(header + "".join(f'{{"step": {step}}}\n' for step in range(5)) + '{"step": 5, ')
    json_lines(path, 3)(4, {})
    assert steps(path) == [-1] * bool(header) + [0, 1, 2, 3, 4]


def test_a_torn_header_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(HEADER[:20])
    json_lines(path, 7)(8, {})
    assert path.read_text().startswith(HEADER)
    assert steps(path) == [-1, 8]


def test_pictures_of_later_steps_are_removed(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        (tmp_path / f"step_{step:08d}").mkdir()
    cut_media(tmp_path, 10)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step_00000005", "step_00000010"]


class Book:
    """A service that records its calls."""

    name = "book"

    def __init__(self, first: int = 0, resends: bool = True, fails_at: int = -1) -> None:
        self.first, self.resends, self.fails_at = first, resends, fails_at
        self.rows: list[tuple[int, dict[str, float], bool]] = []
        self.status: int | None = None
        self.go_on = threading.Event()
        self.go_on.set()
        self.left = False

    def begin(self) -> int:
        return self.first

    def row(self, step: int, metrics: Mapping[str, float], known: bool) -> None:
        self.go_on.wait()
        if step == self.fails_at:
            raise OSError("out of ink")
        self.rows.append((step, dict(metrics), known))

    def conclude(self, results: Mapping[str, float], encoder: Path | None) -> None:
        pass

    def finish(self, status: int) -> None:
        self.status = status

    def leave(self) -> None:
        self.left = True


def write(book: Book, path: Path) -> None:
    """Resume at step 2 and log steps 2 and 3 through a tracker."""
    path.write_text(HEADER + '{"step": 1, "time": 0, "a": 1}\n{"step": 2, "time": 0, "a": 2}\n')
    with Tracker([], feeds=[feed.Feed(book, path)]) as tracker:
        tracker.log(2, {"knn": 0.5})
        tracker.log(3, {"a": 3.0})


def stop_in_an_evaluation(tracker: Tracker) -> None:
    with tracker:
        tracker.log(2, {"a": 2.0})
        tracker.log(3, {"a": 3.0})
        tracker.unfinished = True
        raise StoppedError("stopped")


def test_a_service_gets_one_row_for_each_step_and_hears_what_it_knows(tmp_path: Path) -> None:
    book = Book(first=2)
    write(book, tmp_path / "metrics.jsonl")
    whole = [(1, {"a": 1}, True), (2, {"a": 2, "knn": 0.5}, False), (3, {"a": 3.0}, False)]
    assert book.rows == whole
    assert book.status == 0


def test_a_row_that_is_not_complete_waits_for_the_next_start(tmp_path: Path) -> None:
    for resends, last in ((True, 3), (False, 2)):
        book = Book(resends=resends)
        path = tmp_path / "metrics.jsonl"
        path.write_text(HEADER)
        tracker = Tracker([], feeds=[feed.Feed(book, path)])
        with pytest.raises(StoppedError):
            stop_in_an_evaluation(tracker)
        assert book.rows[-1][0] == last
        assert book.status == 75


def test_a_service_that_fails_is_left_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    book = Book(fails_at=2)
    write(book, tmp_path / "metrics.jsonl")
    assert [row[0] for row in book.rows] == [1]
    assert book.left
    assert caplog.messages == [
        "book: out of ink; the run and its metrics.jsonl continue without it"
    ]


def test_a_service_that_hangs_does_not_hold_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "END_SECONDS", 0.3)
    book = Book()
    book.go_on.clear()
    write(book, tmp_path / "metrics.jsonl")
    assert caplog.messages == [
        "book: does not finish; the run and its metrics.jsonl continue without it"
    ]
    assert book.rows == []  # it has hung all the time
    book.go_on.set()
    atexit.unregister(command.leave)


def test_a_picture_that_cannot_be_written_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "media").write_text("a file in the way")
    album = Album(tmp_path / "media")
    for step in (1, 2):
        album.histogram(step, "x", torch.zeros(3))
    assert len(caplog.messages) == 1


def test_views_are_drawn_in_their_own_colours(tmp_path: Path) -> None:
    config = ViewsConfig(size=8, mean=[0.5, 0.4, 0.3], std=[0.2, 0.25, 0.5])
    colours = torch.tensor([[255, 0, 51], [102, 204, 0]])
    pixels = (colours / 255)[:, :, None, None].expand(2, 3, 8, 8)
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (config.mean, config.std))
    view = (pixels - mean) / std
    Album(tmp_path).views(3, view, view.flip(0), config)
    picture = Image.open(tmp_path / "step_00000003" / "views.png").convert("RGB")
    tile = picture.height // 2
    found = [picture.getpixel((x * tile + 20, y * tile + 20)) for y in (0, 1) for x in (0, 1)]
    first, second = (tuple(each) for each in colours.tolist())
    assert found == [first, second, second, first]


def test_a_histogram_counts_each_similarity_once(tmp_path: Path) -> None:
    values = torch.tensor([[-1.0, -0.99, 0.001], [0.99, 1.0, -torch.inf]])
    Album(tmp_path).histogram(3, "x", values)
    found = json.loads((tmp_path / "step_00000003" / "x.json").read_text())
    assert len(found["edges"]) == len(found["counts"]) + 1 == 65
    assert (found["edges"][0], found["edges"][-1]) == (-1, 1)
    assert {i: n for i, n in enumerate(found["counts"]) if n} == {0: 2, 32: 1, 63: 2}


def test_nearest_is_by_angle(tmp_path: Path) -> None:
    bank = torch.tensor([[10.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert features.nearest(torch.tensor([[0.1, 0.02]]), bank, 2).tolist() == [[0, 2]]
    assert features.nearest(bank[:1], bank, 9).tolist() == [[0, 2, 1]]


# TensorBoard, for real.


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    common = [*TINY, f"output={tmp_path}", "name=run", "runtime.device=cpu"]
    common += ["tracking.tensorboard=true", "tracking.every_steps=1"]
    for extra in (["stop_at_step=7"], []):
        result = python("pretrain", *common, *extra)
        assert result.returncode == 0, result.stderr
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("train/loss", "knn/top1", "queue/fill"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        wanted = [(line["step"], line[name]) for line in lines(tmp_path / "run") if name in line]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [v for _, v in found] == pytest.approx([v for _, v in wanted], rel=1e-6)
    assert [image.step for image in events.Images("media/views")] == [7, 10]


def test_without_tensorboard_the_run_goes_on_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "tensorboard.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'tb'\")\n"
    )
    common = [*TINY, f"output={tmp_path}", "name=run", "runtime.device=cpu", "stop_at_step=1"]
    result = python("pretrain", *common, "tracking.tensorboard=true", PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stderr == (
        "WARNING: TensorBoard: No module named 'tb'; pip install 'moco_dist[tensorboard]'; "
        "the run and its metrics.jsonl continue without it\n"
    )
