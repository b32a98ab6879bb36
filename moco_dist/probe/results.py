"""The results of a finished probe: the content of results.json, and the table of the grid."""

from __future__ import annotations

import dataclasses
from statistics import fmean
from typing import Any

from torch import Tensor

from moco_dist.probe import figures as probe_figures
from moco_dist.probe import overlap, verdict
from moco_dist.probe.linear_probe import LinearProbe
from moco_dist.runs.record import CONTROL, PARTS, PROBE_SCHEMA, TRAINED, is_result

Results = dict[str, Any]

# Places in the figures of a head.
LOSS, _, TOP1, TOP_K = range(4)


def measure(probe: LinearProbe, overlaps: list[overlap.Overlap]) -> Results:
    """Return what results.json holds; on all processes, after the last step.

    Figures are those of the last epoch, at the point of the grid that was best on the validation
    images in that epoch; each encoder has its own. The grid also has those of the best epoch.
    """
    config = probe.config
    probe.refresh(*probe.parts)
    parts = [part for part in probe.parts if part != "train"]
    last = {part: probe.evaluate(part) for part in parts}
    best = {part: probe.evaluate(part, best=True) for part in parts} if keeps_best(probe) else last
    chosen = select(probe, last)
    train = probe_figures.train_top1(probe).mean(1)
    encoders: dict[str, Any] = {}
    for place, name in enumerate(probe.names):
        rows = grid(probe, place, last, best, chosen[place])
        encoders[name] = {
            **{part: _figures(probe, name, part, last[part], chosen[place]) for part in parts},
            "train_top1": float(train[place, chosen[place]]),
            "selected": dataclasses.asdict(probe.points[chosen[place]]),
            "grid": rows,
        }
    trained = encoders[TRAINED]
    results: Results = {
        **PROBE_SCHEMA,
        "protocol": config.protocol,
        "features": _kind_of_features(probe),
        "label_fraction": config.label_fraction,
        "seeds": list(probe.seeds),
        "epochs": config.epochs,
        "top_k": config.top_k,
        "classes": list(probe.splits.train.classes),
        "train_images": probe.subsets.shape[1],
        "interval": _interval_kind(config.seeds),
        "majority_top1": {part: majority_top1(probe, part) for part in parts},
        "encoders": encoders,
        "selected": trained["selected"],
        "grid": trained["grid"],
        "overlap": {
            each.part: {"images": len(each.pairs), "pairs": each.pairs[:100]} for each in overlaps
        },
    }
    results["verdict"], results["better"] = verdict.judge(results)
    sentences = [each.sentence() for each in overlaps]
    results["faults"] = [*filter(None, sentences), *verdict.misfits(results)]
    return results


def _interval_kind(seeds: int) -> str:
    if seeds > 1:
        return f"95 %, Student t over {seeds} seeds"
    return "95 % over the images, Wilson for shares, normal for the loss"


def _kind_of_features(probe: LinearProbe) -> str:
    if probe.config.augment:
        return "augmented"
    return "unaugmented" if probe.tunes else "cached"


def keeps_best(probe: LinearProbe) -> bool:
    """Return whether the heads of the best epoch are kept, as they are for frozen encoders."""
    return "validation" in probe.parts and not probe.tunes


def select(probe: LinearProbe, last: dict[str, Tensor]) -> list[int]:
    """Return for each encoder the point with the best mean top-1 on the validation images.

    Of equal ones, that with the lower loss.
    """
    if "validation" not in last:
        return [0] * len(probe.names)
    mean = last["validation"].mean(1).tolist()
    order = [[(point[TOP1], -point[LOSS]) for point in points] for points in mean]
    return [points.index(max(points)) for points in order]


def grid(
    probe: LinearProbe, place: int, last: dict[str, Tensor], best: dict[str, Tensor], chosen: int
) -> list[dict[str, Any]]:
    """Return a row for each point of the grid, means over seeds, for the encoder at `place`.

    After the last epoch, by which the best point is chosen, and after each seed's best epoch.
    """
    kept, rows = keeps_best(probe), []
    for number, point in enumerate(probe.points):
        row: dict[str, Any] = dataclasses.asdict(point)
        for part in PARTS:
            for prefix, figures in (("", last), ("best_epoch_", best)):
                values = figures[part][place, :, number, TOP1].tolist() if part in figures else []
                row[f"{prefix}{part}_top1"] = fmean(values) if values else None
        epochs = probe.best.tensors["epoch"][place, :, number].tolist()
        row["best_epoch"] = epochs if kept else [probe.config.epochs] * len(epochs)
        rows.append(row | {"best": number == chosen})
    return rows


def majority_top1(probe: LinearProbe, part: str) -> float:
    """Return the share of a part's images that are of the most common training class."""
    train = probe.parts["train"].labels[probe.subsets[0]]
    largest = train.bincount().argmax()
    return float((probe.parts[part].labels == largest).double().mean())


def _figures(
    probe: LinearProbe, name: str, part: str, figures: Tensor, point: int
) -> dict[str, Any]:
    """Return the figures of an encoder's selected heads on a part."""
    loss, squares, top1, top_k = figures[probe.names.index(name), :, point].T.tolist()
    count = len(probe.parts[part])
    counts = probe_figures.confusion(probe, name, part, point)
    images = counts.sum(2).clamp(min=1).double()
    shares = (counts.diagonal(dim1=1, dim2=2) / images).mean(0).tolist()
    empty = (counts[0].sum(1) == 0).tolist()
    return {
        "images": count,
        "top1": _interval(top1, probe_figures.wilson(top1[0], count)),
        f"top{probe.config.top_k}": _interval(top_k, probe_figures.wilson(top_k[0], count)),
        "loss": _interval(loss, probe_figures.normal(loss[0], squares[0], count)),
        "knn_top1": probe_figures.knn_top1(probe, name, part),
        "per_class": [None if e else s for s, e in zip(shares, empty, strict=True)],
        # Of the first seed: each image counts once.
        "confusion": counts[0].tolist(),
    }


def _interval(values: list[float], of_images: tuple[float, float]) -> dict[str, Any]:
    """Return the mean over seeds and its interval: that over the images if there is one seed."""
    low, high = probe_figures.student_t(values) if len(values) > 1 else of_images
    return {"mean": fmean(values), "low": low, "high": high, "values": values}


def brief(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """Return the figures alone, encoder, part, metric: the content of DONE."""
    return {
        name: {
            part: {
                key: value["mean"] if isinstance(value, dict) else value
                for key, value in figures[part].items()
                if is_result(key)
            }
            for part in results["majority_top1"]
        }
        for name, figures in results["encoders"].items()
    }


def summary_rows(results: Results) -> list[tuple[str, ...]]:
    """Return the table of both encoders and of always naming the largest class, with its head."""
    scratch = results["protocol"] == "finetune"
    titles = {TRAINED: "trained", CONTROL: "from scratch" if scratch else "random"}
    few = f"top{results['top_k']}"
    rows: list[tuple[str, ...]] = [
        (
            "encoder",
            "images",
            "top-1 %",
            "95 % interval",
            few.replace("top", "top-") + " %",
            "loss",
            "kNN %",
        )
    ]
    for name, parts in results["encoders"].items():
        for part in results["majority_top1"]:
            figures = parts[part]
            top1 = figures["top1"]
            rows.append(
                (
                    titles[name],
                    part,
                    f"{100 * top1['mean']:.2f}",
                    f"{100 * max(0, top1['low']):.2f}-{100 * min(1, top1['high']):.2f}",
                    f"{100 * figures[few]['mean']:.2f}",
                    f"{figures['loss']['mean']:.4f}",
                    f"{100 * figures['knn_top1']:.2f}",
                )
            )
    for part, share in results["majority_top1"].items():
        rows.append(("largest class", part, f"{100 * share:.2f}", "", "", "", ""))
    return rows


def grid_rows(results: Results) -> list[tuple[str, ...]]:
    """Return the table of the grid of the trained encoder, with its head."""
    rows: list[tuple[str, ...]] = [
        ("lr", "weight decay", "validation %", "test %", "best epoch", "validation %", "test %", "")
    ]
    for row in results["grid"]:
        shares = [
            "-" if row[key] is None else f"{100 * row[key]:.2f}"
            for key in (
                "validation_top1",
                "test_top1",
                "best_epoch_validation_top1",
                "best_epoch_test_top1",
            )
        ]
        epochs = ",".join(map(str, row["best_epoch"]))
        mark = "best" if row["best"] else ""
        rates = f"{row['lr']:g}", f"{row['weight_decay']:g}"
        rows.append((*rates, *shares[:2], epochs, *shares[2:], mark))
    return rows
