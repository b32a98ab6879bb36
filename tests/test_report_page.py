"""A report's page says what the files of the runs say, in every state, and loads nothing."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.colors import to_rgb
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import DataConfig
from moco_dist.config.yaml_files import from_dict, to_yaml
from moco_dist.data.datasets import Images
from moco_dist.errors import MissingError
from moco_dist.report import curves, table
from moco_dist.report.encoder import held_out, neighbours, principal
from moco_dist.report.figures import BINS, DARK, LIGHT, Chart, Series, Theme, draw_chart
from moco_dist.report.run import run as report
from moco_dist.runs.partners import with_partners
from moco_dist.runs.record import read
from tests.report_pages import Page, hostile, picture
from tests.test_report import entries, page, runs, write

__all__ = ["page", "runs"]


def quick(place: Path, *found: Path) -> Page:
    arguments = [*map(str, found), "--quick", "--output", str(place)]
    assert report(arguments) == 0
    return Page(place / "report.html")


def test_every_picture_is_in_the_page_with_words_and_as_a_file(page: Path) -> None:
    found = Page(page)
    images = found.all("img")
    names = {attributes["id"] for attributes in found.all("figure")}
    assert names == {path.stem for path in page.parent.glob("*.png")}
    assert len(images) == len(names)
    wanted = {"probe_top1", "probe_top5", "probe_loss", "loss", "knn", "health_alignment"}
    wanted |= {"pairs", "similarity", "neighbours", "map_pca", "map_tsne", "confusion"}
    assert wanted <= names
    for attributes in images:
        assert len(str(attributes["alt"])) > 20
        width, height = picture(attributes["src"]).size
        ratio = float(attributes["width"] or 0) / float(attributes["height"] or 1)
        assert width / height == pytest.approx(ratio, rel=0.02)
    for each in found.all("source"):
        assert each["media"] == "(prefers-color-scheme: dark)"
        picture(each["srcset"])


def test_the_page_names_no_other_place_and_forbids_to_load_one(page: Path) -> None:
    found = Page(page)
    for tag, attributes in found.elements:
        assert tag not in ("script", "iframe", "object", "embed", "form", "base")
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in ("src", "srcset", "href"):
                assert str(value).startswith(("data:", "#"))
    assert "url(" not in found.source
    assert "@import" not in found.source
    policy = {a["content"] for a in found.all("meta") if "http-equiv" in a}
    assert len(policy) == 1
    assert str(policy.pop()).startswith("default-src 'none'; img-src data:; style-src 'sha256-")


def test_headings_go_down_one_by_one_and_tables_have_heads(page: Path) -> None:
    found = Page(page)
    levels = [int(tag[1]) for tag, _ in found.elements if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert found.all("html")[0]["lang"] == "en"
    for attributes in found.all("th"):
        assert attributes["scope"] in ("col", "row")
    assert all(attributes["aria-label"] for attributes in found.all("table"))


def test_the_page_has_the_results_configuration_environment_and_command(
    runs: Path, page: Path
) -> None:
    text = Page(page).text
    done = json.loads((runs / "real-probe" / "DONE").read_text())
    for encoder in ("probe", "control"):
        for part in ("validation", "test"):
            figures = done[encoder][part]
            assert f"{100 * figures['top1']:.2f}" in text
            assert f"{figures['loss']:.4f}" in text
    environment = json.loads((runs / "real" / "environment.json").read_text())
    assert str(environment["torch"]) in text
    assert "python -m moco_dist.pretrain batch_size=16 bn_groups=8" in text
    assert "moco.queue_size40" in text  # two cells of a row


def test_a_curve_holds_the_numbers_of_the_lines(runs: Path) -> None:
    record = read(runs / "real-probe")
    charts = [chart for chart, _ in curves.of_probes([("x", record)])]
    lines = [line for line in entries(runs / "real-probe") if "probe/top1" in line]
    assert len(lines) == 3
    for chart, key, factor in zip(charts, ("top1", "top5", "loss"), (100, 100, 1), strict=True):
        figure = draw_chart(chart, LIGHT)
        drawn: list[Any] = [line.get_xydata() for line in figure.axes[0].lines]
        for encoder, found in zip(("probe", "control"), drawn, strict=True):
            expected = [(line["epoch"], factor * line[f"{encoder}/{key}"]) for line in lines]
            np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-12)


# How eyes without one kind of cone see linear RGB (Machado, Oliveira and Fernandes 2009).
EYES = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_trained_and_random_encoders_differ_in_colour_and_line(runs: Path, theme: Theme) -> None:
    pretraining, probe = ([(n, read(runs / n))] for n in ("real", "real-probe"))
    charts = [*curves.of_probes(probe), *curves.of_runs([curves.EVALUATION], pretraining)]
    assert len(charts) == 4
    looks = set()
    for chart, _ in charts:
        axes = draw_chart(chart, theme).axes[0]
        trained, random = ((line.get_linestyle(), line.get_color()) for line in axes.lines)
        looks.add((trained, random))
        assert trained[0] != random[0]
        for eye in EYES.values():
            seen = [
                np.array(eye) @ np.array(to_rgb(str(colour))) ** 2.2
                for _, colour in (trained, random)
            ]
            assert np.abs(np.diff(np.clip(seen, 0, 1) ** (1 / 2.2), axis=0)).max() > 0.4
    assert len(looks) == 1  # the same in all charts


def test_a_line_without_an_epoch_stands_at_that_of_its_step(tmp_path: Path) -> None:
    lines = [{"step": 10, "epoch": 2.0, "train/loss": 1.0}, {"step": 25, "knn/top1": 0.5}]
    write(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    record = read(tmp_path / "run")
    assert curves.epochs(record, "knn/top1") == ([5.0], [0.5])


def test_losses_that_differ_widely_are_on_a_logarithmic_axis() -> None:
    for values, scale in (([100.0, 1.0], "log"), ([100.0, 50.0], "linear"), ([9.0, 0.0], "linear")):
        series = [Series("a", [1, 2], values)]
        chart = Chart("a", "a", series, may_be_logarithmic=True)
        axes = draw_chart(chart, LIGHT).axes[0]
        assert axes.get_yscale() == scale


def test_a_long_curve_is_drawn_as_means_inside_its_range() -> None:
    x = np.arange(40_000) / 100
    y = np.sin(x / 40) + np.random.default_rng(0).normal(size=x.size)
    y[7] = math.nan
    chart = Chart("a", "a", [Series("a", x.tolist(), y.tolist())])
    axes = draw_chart(chart, LIGHT).axes[0]
    found: Any = axes.lines[0].get_xydata()
    expected = [np.nanmean(part) for part in y.reshape(BINS, -1)]
    np.testing.assert_allclose(found[:, 1], expected, rtol=1e-9)
    band: Any = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(np.nanmax(y))
    assert band[:, 1].min() == pytest.approx(np.nanmin(y))


def test_the_loss_is_drawn_from_when_the_queue_was_full(runs: Path) -> None:
    record = read(runs / "real")
    ((chart, _),) = curves.loss([("real", record)])
    lines = [line for line in entries(runs / "real") if line.get("queue/fill") == 1]
    assert list(chart.series[0].y) == [line["train/loss"] for line in lines]
    assert chart.reference == (math.log(41), "guessing")


def test_texts_of_files_are_shown_and_never_obeyed(tmp_path: Path) -> None:
    probe = hostile(tmp_path / "runs")
    found = quick(tmp_path / "out", probe)
    assert {tag for tag, _ in found.elements}.isdisjoint({"script", "iframe"})
    assert all(str(each["src"]).startswith("data:") for each in found.all("img"))
    assert all(not key.startswith("on") for _, each in found.elements for key in each)
    for text in ('onerror=alert(1)><script src="https://evil.example/x.js">', "$x_$"):
        assert text in found.text
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "out"}


STOPPED = {"state": "stopped", "exit_status": 75, "reason": "by SIGTERM"}
FAILED = {"state": "internal", "exit_status": 70, "reason": "no"}


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"state": "running", "exit_status": None, "pid": 1}, "was killed or lost its machine"),
        (STOPPED, "stopped at step 4 of 10"),
        (FAILED, "with an error (internal, exit status 70) at step 4 of 10: no"),
        ({}, "no readable status.json"),
    ],
)
def test_a_run_that_ended_otherwise_says_so(
    runs: Path, tmp_path: Path, status: dict[str, Any], words: str
) -> None:
    run = tmp_path / "cut"
    shutil.copytree(runs / "real", run, ignore=shutil.ignore_patterns("checkpoints", "media"))
    kept = [line for line in entries(run) if line.get("step", 0) <= 4]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, kept)) + '\n{"step": 5, "ti')
    for name in ("DONE", "status.json"):
        (run / name).unlink()
    if status:
        write(run, status={"step": 4, **status})
    assert words in table.standing("cut", read(run))
    if not status:
        text = quick(tmp_path / "out", run).text
        assert words in text
        assert "No positive pairs" in text


def test_a_run_that_goes_on_says_how_far_it_is(runs: Path, tmp_path: Path) -> None:
    code = "import sys, time; from moco_dist.runs.lock import RunLock; from pathlib import Path\n"
    code += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    run = tmp_path / "going"
    shutil.copytree(runs / "real", run)
    kept = [line for line in entries(run) if line.get("step", 0) <= 6]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, kept)) + "\n")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, run], **pipes) as owner:  # type: ignore[call-overload]
        assert owner.stdout.readline() == b"held\n"
        write(run, status={"state": "running", "exit_status": None, "step": 0, "pid": owner.pid})
        text = quick(tmp_path / "out", run).text
        owner.stdin.close()
    assert "The pretraining going is still running: step 6 of 10 (60%)" in text


def test_a_bare_folder_gets_no_report_and_one_without_anything_readable_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bare").mkdir()
    assert report([str(tmp_path / "bare")]) == 0
    assert list((tmp_path / "bare").iterdir()) == []
    assert "report:" not in capsys.readouterr().out
    broken = tmp_path / "broken"
    (broken / "media" / "step_x").mkdir(parents=True)
    (broken / "media" / "step_x" / "views.png").write_bytes(b"\x89PNG nothing")
    for name in ("status.json", "config.yaml", "DONE", "metrics.jsonl", "environment.json"):
        (broken / name).write_bytes(b"\0\xff{")
    assert "has no readable config.yaml" in quick(tmp_path / "out", broken).text


def test_data_that_are_gone_are_told_and_the_rest_is_there(runs: Path, tmp_path: Path) -> None:
    config = DataConfig(name="cifar10", root=str(tmp_path / "nowhere"))
    with pytest.raises(MissingError, match="a report downloads nothing"):
        held_out(config)
    run = tmp_path / "early"
    shutil.copytree(runs / "real", run, ignore=shutil.ignore_patterns("checkpoints"))
    assert report([str(run)]) == 0
    text = Page(run / "report" / "report.html").text
    assert "neighbours from this report: the run has no checkpoint yet." in text


def test_several_runs_are_one_page_beside_them_with_what_differs(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        shutil.copytree(runs / "real", tmp_path / name)
    path = tmp_path / "two" / "config.yaml"
    path.write_text(path.read_text().replace("temperature: 0.1", "temperature: 0.7"))
    each = [str(tmp_path / name) for name in ("one", "two")]
    assert report([*each, "--quick"]) == 0
    found = Page(tmp_path / "report" / "report.html")
    assert "moco.temperature0.10.7" in found.text
    names = {str(attributes["id"]) for attributes in found.all("figure")}
    assert {"one_pairs", "two_pairs", "loss"} <= names
    (loss,) = (a for a in found.all("img") if str(a["alt"]).startswith("InfoNCE"))
    assert "one: from" in str(loss["alt"])
    assert "two: from" in str(loss["alt"])
    # The report is among the runs but is not a run.
    capsys.readouterr()
    assert report([*each, str(tmp_path / "report"), "--text"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["run", "one", "two"]


def test_a_report_is_not_written_over_a_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report([str(runs / "real"), "--output", str(runs / "real-probe")]) == 78
    assert "is a run directory; give --output with another folder" in capsys.readouterr().err


def test_a_pretraining_and_its_probe_find_each_other(runs: Path, tmp_path: Path) -> None:
    pretraining, probe = (read(runs / name) for name in ("real", "real-probe"))
    for start in (pretraining, probe):
        found = with_partners([start])
        assert [record.directory.name for record in found] == ["real", "real-probe"]
    # YAML folds a path with spaces after 80 letters.
    far = tmp_path / "a folder whose name has several words" / "and one more of that kind"
    for name in ("real", "real-probe"):
        shutil.copytree(runs / name, far / name)
    path = far / "real-probe" / "config.yaml"
    settings = from_dict(ProbeConfig, yaml.safe_load(path.read_text()))
    path.write_text(to_yaml(replace(settings, encoder=str(far / "real"))))
    found = with_partners([read(far / "real")])
    assert [record.directory.name for record in found] == ["real", "real-probe"]
    # A run whose name begins as that of a checkpoint.
    (far / "real").rename(far / "step_1")
    path.write_text(to_yaml(replace(settings, encoder=str(far / "step_1"))))
    found = with_partners([read(far / "step_1")])
    assert [record.directory.name for record in found] == ["step_1", "real-probe"]
    shutil.copytree(runs / "real-probe", tmp_path / "alone")
    path = tmp_path / "alone" / "config.yaml"
    path.write_text(path.read_text().replace(f"encoder: {runs / 'real'}", "encoder: runs/absent"))
    alone = read(tmp_path / "alone")
    assert alone.config["encoder"] == "runs/absent"
    assert with_partners([alone]) == [alone]


def test_results_of_several_seeds_are_read_with_their_interval(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "seeds"
    shutil.copytree(runs / "real-probe", run)
    top1 = {"mean": 0.8125, "low": 0.79, "high": 0.83, "values": [0.81, 0.815]}
    figures = {"top1": top1, "knn_top1": 0.7, "confusion": [[3, 1], [0, 4]]}
    grid: list[dict[str, object]] = [
        {"lr": r, "weight_decay": 0, "validation_top1": r / 100} for r in (10, 30)
    ]
    grid[1]["best"] = True
    grid[0] |= {"best_epoch": [3, 4], "best_epoch_validation_top1": 0.125}
    faults = ["3 of the test images are among the training images."]
    content = {
        **{"schema": "moco_dist.probe", "version": 1, "classes": ["cat", "dog"], "grid": grid},
        **{"majority_top1": {"test": 0.5}, "encoders": {"probe": {"test": figures}}},
        **{"faults": faults, "interval": "95%, Student t over 2 seeds", "train_images": 1234},
    }
    (run / "results.json").write_text(json.dumps(content))
    text = quick(tmp_path / "out", run).text
    assert "81.25 (79.00 to 83.00)" in text
    assert "majority classtest50.00" in text
    assert "30 (chosen)030.00" in text  # learning rate 30, weight decay 0, 30%
    assert "control=false" in text
    assert "3, 412.50" in text  # best epochs, 12.5%
    assert faults[0] in text
    for better, told in ((True, "note"), (None, "note"), (False, "note warn")):
        said = content | {"verdict": "Said by the probe.", "better": better}
        (run / "results.json").write_text(json.dumps(said))
        page = quick(tmp_path / "out", run)
        assert f'<p class="{told}">Said by the probe.' in page.source
    assert "(1,234 training images); means of 2 seeds; intervals: 95%, Student t" in text
    assert "cat475.00dog (25.0%)" in text
    (run / "DONE").unlink()  # the probe is being continued
    assert "81.25" not in quick(tmp_path / "out", run).text


def test_components_and_neighbours_agree_with_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(60, 7, generator=generator, dtype=torch.float64)
    points = torch.nn.functional.normalize(points, dim=1)
    found, variance = principal(points)
    oracle = PCA(2).fit(points.numpy())
    expected = oracle.transform(points.numpy())
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-10)
    np.testing.assert_allclose(variance, oracle.explained_variance_ratio_, rtol=1e-10)
    pixels = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(60, 3, 8, 8)
    images = Images(pixels, torch.arange(60) % 3, ("a", "b", "c"))
    rows = neighbours(points, images)
    search = NearestNeighbors(n_neighbors=6, metric="cosine").fit(points.numpy())
    for row in rows:
        query = int(row[0].pixels[0, 0, 0])
        (nearest,) = search.kneighbors(points[query, None].numpy(), return_distance=False)
        assert [int(tile.pixels[0, 0, 0]) for tile in row[1:]] == nearest[1:].tolist()
        assert [tile.good for tile in row[1:]] == [n % 3 == query % 3 for n in nearest[1:]]
    assert [int(row[0].pixels[0, 0, 0]) for row in rows[:3]] == [0, 1, 2]
