"""What results.json holds: figures that can be checked, and a sentence that follows from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from scipy.optimize import minimize_scalar
from torch.nn.functional import cross_entropy, linear
from torchvision import models

from moco_dist.config.encoder import BACKBONES
from moco_dist.config.probe import ProbeConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.encoders.load import checkpoint_of, find
from moco_dist.encoders.recognise import infer
from moco_dist.errors import DataError
from moco_dist.probe import underfit, verdict
from moco_dist.probe.label_fraction import draw
from moco_dist.probe.results import measure, select
from moco_dist.runs.record import Metric
from tests.probes import DATA, prepared, pretrained, results, run, tinted

__all__ = ["pretrained"]

MANY = ["data.shapes_train=600", "data.shapes_test=200", "augment=false", "batch_size=60"]


@pytest.fixture(scope="module")
def probed(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a probe of a grid with a constant learning rate, so that epochs can be compared."""
    output = tmp_path_factory.mktemp("probes")
    grid = ["grid.lr=[0.1,3]", "grid.weight_decay=[0,0.001]", "seeds=2", "epochs=6"]
    run(pretrained, output, *MANY, *grid, "optim.schedule=constant")
    return output / "tiny-probe"


def test_results_are_complete_and_consistent(probed: Path) -> None:
    content, done = results(probed), json.loads((probed / "DONE").read_text())
    assert (content["schema"], content["version"]) == ("moco_dist.probe", 1)
    assert (content["protocol"], content["features"]) == ("linear", "cached")
    assert (content["label_fraction"], content["seeds"], content["epochs"]) == (1.0, [0, 1], 6)
    assert content["train_images"] == 540
    assert content["interval"] == "95%, Student t over 2 seeds"
    lines = map(json.loads, (probed / "metrics.jsonl").read_text().splitlines()[1:])
    names = {name for line in lines for name in line} - {"step", "time"}
    own = {f"{name}/{key}" for name in ("probe", "control") for key in ("loss", "top1", "top5")}
    assert own < names <= own | set(Metric)
    images = {"validation": 60, "test": 200}
    splits = datasets.load(load(ProbeConfig, [*DATA, *MANY]).data)
    largest = splits.train.labels.bincount().argmax()
    for part, share in content["majority_top1"].items():
        labels = getattr(splits, part).labels
        assert share == pytest.approx(float((labels == largest).double().mean()))
    for name in ("probe", "control"):
        for part, count in images.items():
            figures = content["encoders"][name][part]
            assert figures["images"] == count
            for key in ("top1", "top5", "loss"):
                values = figures[key]["values"]
                assert figures[key]["mean"] == pytest.approx(sum(values) / 2)
                assert figures[key]["low"] <= figures[key]["mean"] <= figures[key]["high"]
                assert done[name][part][key] == figures[key]["mean"]
            assert done[name][part]["knn_top1"] == figures["knn_top1"]
            confusion = torch.tensor(figures["confusion"])
            labels = getattr(splits, part).labels
            assert confusion.sum(1).tolist() == labels.bincount(minlength=10).tolist()
            first = float(confusion.diagonal().sum()) / count
            assert first == pytest.approx(figures["top1"]["values"][0])
            shares = [s for s in figures["per_class"] if s is not None]
            weights = [n for n in confusion.sum(1).tolist() if n]
            whole = sum(s * n for s, n in zip(shares, weights, strict=True)) / count
            assert whole == pytest.approx(figures["top1"]["mean"])


def test_the_grid_is_chosen_by_the_last_validation_and_tells_of_the_best_epoch(
    pretrained: Path, probed: Path, tmp_path: Path
) -> None:
    content = results(probed)
    rows = content["grid"]
    points = [(row["lr"], row["weight_decay"]) for row in rows]
    assert points == [(0.1, 0.0), (3.0, 0.0), (0.1, 0.001), (3.0, 0.001)]
    (best,) = [row for row in rows if row["best"]]
    last = "validation_top1"
    assert best[last] == max(row[last] for row in rows)
    assert content["selected"] == {key: best[key] for key in ("lr", "weight_decay")}
    parts = content["encoders"]["probe"]
    assert best[last] == pytest.approx(parts["validation"]["top1"]["mean"])
    assert best["test_top1"] == pytest.approx(parts["test"]["top1"]["mean"])
    assert all(row["best_epoch_validation_top1"] >= row[last] for row in rows)
    # At a constant rate, a probe of fewer epochs shows what this one was after them.
    early = next(row for row in rows if row["best_epoch"][1] < 6)
    point = [f"optim.lr={early['lr']}", f"optim.weight_decay={early['weight_decay']}"]
    alone = [*MANY, *point, "optim.schedule=constant", "control=false"]
    ends = []
    for seed, epochs in enumerate(early["best_epoch"]):
        output = tmp_path / str(seed)
        run(pretrained, output, *alone, f"seed={seed}", f"epochs={epochs}")
        ends.append(results(output / "tiny-probe")["encoders"]["probe"])
    for part in ("validation", "test"):
        mean = sum(end[part]["top1"]["mean"] for end in ends) / 2
        assert early[f"best_epoch_{part}_top1"] == pytest.approx(mean, abs=1e-12)


def test_the_validation_images_choose_and_of_equal_points_that_with_less_loss() -> None:
    names: Any = SimpleNamespace(names=["probe", "control"])
    figures = torch.zeros(2, 2, 3, 4)  # encoders, seeds, points, and loss, its square, top-1, top-5
    figures[0, :, :, 2] = torch.tensor([[0.9, 0.5, 0.6], [0.1, 0.5, 0.5]])  # the mean decides
    figures[1, :, :, 2] = 0.4
    figures[1, 0, :, 0] = torch.tensor([2.0, 1.0, 3.0])
    assert select(names, {"test": figures.flip(2), "validation": figures}) == [2, 1]
    assert select(names, {"test": figures}) == [0, 0]


def told(trained: float, control: float | None, images: int, **changes: Any) -> str:
    """Return the verdict on these shares of the test images of ten classes of equal size."""

    def figures(share: float) -> dict[str, Any]:
        return {"images": images, "top1": {"mean": share, "low": share, "high": share}}

    encoders = {"probe": {"test": figures(trained)}}
    if control is not None:
        encoders["control"] = {"test": figures(control)}
    content = {
        "protocol": "linear",
        "classes": list("abcdefghij"),
        "majority_top1": {"test": 0.1},
        "encoders": encoders,
    }
    sentence, better = verdict.judge(content | changes)
    assert better is (None if control is None else sentence.startswith("The trained encoder is b"))
    assert sentence.endswith(".")
    return sentence


def test_the_verdict_follows_from_the_figures() -> None:
    # Half of 10000 within 1 point, of 100 within 10, by the law of large numbers.
    assert told(0.53, 0.50, 10000).startswith("The trained encoder is better than a random one by")
    assert told(0.53, 0.50, 100).startswith("The trained encoder is NOT better than a random one")
    assert told(0.505, 0.50, 10000).startswith("The trained encoder is NOT better")
    assert told(0.40, 0.50, 10000).startswith("The trained encoder is WORSE than a random one")
    assert told(0.10, 0.50, 10000).startswith("The encoder tells nothing about the classes")
    assert told(0.10, 0.10, 10000).startswith("Nothing was learned")
    assert told(0.53, None, 10000).endswith("not compared with a random one (control=false).")
    assert "than one trained from scratch" in told(0.53, 0.50, 10000, protocol="finetune")
    assert "53.0% (52.0 to 54.0) against 50.0% (49.0 to 51.0)" in told(0.53, 0.5, 10000)


def test_the_verdict_says_what_other_learning_rates_may_change(
    pretrained: Path, tmp_path: Path
) -> None:
    cached = "augment=false", "epochs=4"
    run(pretrained, tmp_path / "one", *MANY, *cached, "optim.lr=0.0001")
    said = results(tmp_path / "one/tiny-probe")["verdict"]
    assert said.count("Only the learning rate 0.0001 was tried, ") == 1
    assert "others can change the comparison: try grid.lr=[1e-06,1e-05,0.0001,0.001]." in said
    grid = "grid.around=[0.001,1000]"
    run(pretrained, tmp_path / "two", *MANY, *cached, "optim.lr=0.1", grid)
    content = results(tmp_path / "two/tiny-probe")
    assert [row["lr"] for row in content["grid"]] == pytest.approx([0.0001, 100])
    chosen = content["selected"]["lr"]
    side = "largest of the grid: add larger" if chosen == 100 else "smallest of the grid: add small"
    assert (
        f"The best learning rate of the trained encoder, {chosen:g}, is the {side}"
        in (content["verdict"])
    )
    assert "was tried" not in content["verdict"]


@pytest.mark.parametrize(("lr", "underfitted"), [(0.0001, True), (1.0, False)])
def test_the_verdict_says_that_a_classifier_is_underfitted(
    pretrained: Path, tmp_path: Path, lr: float, underfitted: bool
) -> None:
    arguments = ["augment=false", "epochs=30", f"optim.lr={lr}", "control=false"]
    probe = prepared(pretrained, tmp_path, *arguments, splits=tinted(540, 60, 200))
    while probe.step < probe.total_steps:
        probe.train_step()
    said = measure(probe, [])["verdict"]
    sentence = "The classifier of the trained encoder is underfitted: its training loss is "
    assert (sentence in said) == underfitted, said


def test_rates_around_one_need_images_to_choose_by() -> None:
    def rates(*arguments: str) -> list[float]:
        return load(ProbeConfig, ["optim.lr=2", "grid.around=[0.5,1,3]", *arguments]).rates()

    assert rates() == [1, 2, 6]
    assert rates("grid.lr=[7,8]") == [7, 8]
    assert rates("data.validation=0") == rates("protocol=finetune") == [2]
    assert len(load(ProbeConfig, ["probe/cifar10"]).rates()) == 6


def test_the_name_of_a_probe_is_that_of_the_run(tmp_path: Path) -> None:
    for place in ("runs/step_1", "runs/cifar10", "checkpoints/cifar10"):
        for path in (tmp_path / place, tmp_path / place / "checkpoints" / "step_00000005"):
            name = load(ProbeConfig, [f"encoder={path}"]).run_name()
            assert name == f"{Path(place).name}-probe"


def test_one_step_of_descent_is_the_best_along_its_line() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 5, generator=generator).double()
    features += 2 * labels[:, None] / torch.arange(1, 6)
    weight = torch.zeros(3, 5, dtype=torch.double, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.double, requires_grad=True)
    scaled = (features - features.mean(0)) / features.std(0)

    def loss(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return cross_entropy(linear(scaled, weight, bias), labels)

    before = loss(weight, bias)
    slopes = torch.autograd.grad(before, (weight, bias))
    line = minimize_scalar(
        lambda step: loss(weight - step * slopes[0], bias - step * slopes[1]).item(), (0, 1)
    )
    now, after = underfit.descent(features, labels, weight, bias)  # all logits are 0 either way
    assert now == pytest.approx(before.item()) == pytest.approx(math.log(3))
    assert line.fun <= after < line.fun + 0.1 * (now - line.fun)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def again() -> float:
        optimizer.zero_grad()
        found = cross_entropy(linear(features, weight, bias), labels)
        found.backward()
        return found.item()

    for _ in range(10):
        optimizer.step(again)
    now, after = underfit.descent(features, labels, weight, bias)
    assert after > 0.99 * now


def test_a_label_fraction_is_balanced_and_drawn_by_the_seed() -> None:
    train = datasets.load(load(ProbeConfig, [*DATA, *MANY]).data).train
    drawn = [draw(train, 0.1, seed) for seed in (0, 0, 1)]
    assert len(drawn[0]) == 50  # 5.4 of each class
    for rows in drawn:
        assert train.labels[rows].bincount().tolist() == [5] * 10
        assert rows.tolist() == sorted(set(rows.tolist()))
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])
    assert draw(train, 1.0, 0).tolist() == list(range(540))


def test_a_state_dict_is_probed_as_its_run_is(pretrained: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.pth"
    torch.save(find(pretrained).backbone.state_dict(), file)
    assert run(pretrained, tmp_path / "run", *MANY) == run(file, tmp_path / "file", *MANY)


@pytest.mark.parametrize("name", BACKBONES)
def test_published_architectures_are_known_by_their_tensors(name: str) -> None:
    with torch.device("meta"):
        state = models.get_model(name).state_dict()
    found = infer(state, Path("x"))
    assert (found.backbone, found.width, found.stem) == (name, 64, "imagenet")


def test_what_is_no_state_dict_has_its_sentence(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(DataError) as error:
            find(path)
        return str(error.value)

    path = tmp_path / "x.pth"
    torch.save({"net": {"conv1.weight": torch.ones(1)}, "epoch": 3}, path)
    assert refusal(path).startswith(f"{path}: is no state dict, it holds net, epoch; save")
    torch.save([torch.ones(1)], path)
    assert refusal(path).startswith(f"{path}: is no state dict, it holds a list; save")
    torch.save(Path("code"), path)  # would run code if it were unpickled at will
    assert f"{path}: can't be read as tensors alone (" in refusal(path)
    path.write_bytes(b"junk")
    assert f"{path}: can't be read as tensors alone (" in refusal(path)
    other = path.with_suffix(".safetensors")
    other.write_bytes(b"junk" * 9)
    assert f"{other}: can't be read as tensors alone (" in refusal(other)


def test_an_encoder_is_probed_on_other_data_than_that_of_its_pretraining(
    pretrained: Path, tmp_path: Path
) -> None:
    for part, count in (("train", 12), ("test", 6)):
        for name, colour in (("light", 200), ("dark", 30)):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (colour, colour + i, colour)).save(folder / f"{i}.png")
    where = [f"data.root={tmp_path / 'pictures'}", f"data.cache={tmp_path / 'cache'}", "top_k=2"]
    settings = ["data.name=folder", "data.validation=0", "batch_size=8", "epochs=20"]
    run(pretrained, tmp_path, *where, *settings, "augment=false")
    content = results(tmp_path / "tiny-probe")
    assert content["classes"] == ["dark", "light"]
    assert content["majority_top1"] == {"test": 0.5}
    assert content["encoders"]["probe"]["test"]["top1"]["mean"] == 1
    assert content["encoders"]["probe"]["test"]["confusion"] == [[6, 0], [0, 6]]
    # The test images have the colours of training images.
    assert content["overlap"]["test"]["images"] == 12
    assert "12 of 12 test images are also training images" in content["faults"][0]
    assert checkpoint_of(tmp_path / "tiny-probe").state["classes"] == ["dark", "light"]
