"""The results of a finished probe: the content of results.json, and its tables."""

from __future__ import annotations

import dataclasses
from statistics import fmean
from typing import Any

from torch import Tensor

from moco_dist.probe import underfit
from moco_dist.probe.figures import confusion, knn_top1, normal, student_t, train_top1, wilson
from moco_dist.probe.linear_probe import LinearProbe
from moco_dist.probe.overlap import Overlap
from moco_dist.probe.verdict import Results, doubts, judge, misfits
from moco_dist.runs.record import CONTROL, PARTS, PROBE_SCHEMA, TRAINED, is_result

# Indices of the figures of a head.
LOSS, _, TOP1, TOP_K = range(4)


def measure(probe: LinearProbe, overlaps: list[Overlap]) -> Results:
    """Return the content of results.json; every process calls this after the last step.

    Figures are from the last epoch, at each encoder's point of the grid that was then best on the
    validation images. The grid also holds the figures of the best epoch.
    """
    config = probe.config
    probe.refresh(*probe.parts)
    parts = [part for part in probe.parts if part != "train"]
    last = {part: probe.evaluate(part) for part in parts}
    kept = "validation" in parts and not probe.tunes
    best = {part: probe.evaluate(part, best=True) for part in parts} if kept else last
    chosen = select(probe, last)
    train = train_top1(probe).mean(1)
    encoders: dict[str, Any] = {}
    for place, name in enumerate(probe.names):
        rows = grid(probe, place, last, best, chosen[place])
        encoders[name] = {
            **{part: _figures(probe, name, part, last[part], chosen[place]) for part in parts},
            "train_top1": float(train[place, chosen[place]]),
            "selected": dataclasses.asdict(probe.points[chosen[place]]),
            "grid": rows,
        }
        if not probe.tunes:
            encoders[name]["train_loss"] = underfit.losses(probe, place, chosen[place])
    trained = encoders[TRAINED]
    interval = "95% over the images, Wilson for shares, normal for the loss"
    if config.seeds > 1:
        interval = f"95%, Student t over {config.seeds} seeds"
    without = "unaugmented" if probe.tunes else "cached"
    largest = probe.parts["train"].labels[probe.subsets[0]].bincount().argmax()
    results: Results = {
        **PROBE_SCHEMA,
        "protocol": config.protocol,
        "features": "augmented" if config.augment else without,
        "label_fraction": config.label_fraction,
        "seeds": list(probe.seeds),
        "epochs": config.epochs,
        "top_k": config.top_k,
        "classes": list(probe.splits.train.classes),
        "train_images": probe.subsets.shape[1],
        "interval": interval,
        "majority_top1": {
            part: float((probe.parts[part].labels == largest).double().mean()) for part in parts
        },
        "encoders": encoders,
        "selected": trained["selected"],
        "grid": trained["grid"],
        "overlap": {
            each.part: {
                "images": len(each.pairs),
                "pairs": each.pairs[:100],
                "files": each.files[:100],
            }
            for each in overlaps
        },
    }
    verdict, results["better"] = judge(results)
    results["verdict"] = " ".join([verdict, *doubts(results)])
    sentences = [each.sentence() for each in overlaps]
    results["faults"] = [*filter(None, sentences), *misfits(results)]
    return results


def select(probe: LinearProbe, last: dict[str, Tensor]) -> list[int]:
    """Return each encoder's point with the best validation top-1; ties go to the lower loss."""
    if "validation" not in last:
        return [0] * len(probe.names)
    mean = last["validation"].mean(1).tolist()
    order = [[(point[TOP1], -point[LOSS]) for point in points] for points in mean]
    return [points.index(max(points)) for points in order]


def grid(
    probe: LinearProbe, place: int, last: dict[str, Tensor], best: dict[str, Tensor], chosen: int
) -> list[dict[str, Any]]:
    """Return a row for each point of the grid with an encoder's figures, averaged over seeds.

    They are from the last epoch, which decides, and from each seed's best epoch.
    """
    rows = []
    for number, point in enumerate(probe.points):
        row: dict[str, Any] = dataclasses.asdict(point)
        for part in PARTS:
            for prefix, figures in (("", last), ("best_epoch_", best)):
                values = figures[part][place, :, number, TOP1].tolist() if part in figures else []
                row[f"{prefix}{part}_top1"] = fmean(values) if values else None
        epochs = probe.best.tensors["epoch"][place, :, number].tolist()
        row["best_epoch"] = [probe.config.epochs] * len(epochs) if best is last else epochs
        rows.append(row | {"best": number == chosen})
    return rows


def _figures(
    probe: LinearProbe, name: str, part: str, figures: Tensor, point: int
) -> dict[str, Any]:
    """Return the figures of an encoder's heads at the selected point."""
    loss, squares, top1, top_k = figures[probe.names.index(name), :, point].T.tolist()
    count = len(probe.parts[part])
    counts = confusion(probe, name, part, point)
    images = counts.sum(2).clamp(min=1).double()
    shares = (counts.diagonal(dim1=1, dim2=2) / images).mean(0).tolist()
    empty = (counts[0].sum(1) == 0).tolist()
    return {
        "images": count,
        "top1": _interval(top1, wilson(top1[0], count)),
        f"top{probe.config.top_k}": _interval(top_k, wilson(top_k[0], count)),
        "loss": _interval(loss, normal(loss[0], squares[0], count)),
        "knn_top1": knn_top1(probe, name, part),
        "per_class": [None if e else s for s, e in zip(shares, empty, strict=True)],
        "confusion": counts[0].tolist(),  # of the first seed, so that each image counts once
    }


def _interval(values: list[float], of_images: tuple[float, float]) -> dict[str, Any]:
    """Return the mean over seeds and its interval; a single seed has the one over the images."""
    low, high = student_t(values) if len(values) > 1 else of_images
    return {"mean": fmean(values), "low": low, "high": high, "values": values}


def brief(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    """Return the content of DONE: figures by encoder, part and metric."""
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
    """Return the table of the encoders and the majority class, with its head."""
    scratch = results["protocol"] == "finetune"
    titles = {TRAINED: "trained", CONTROL: "from scratch" if scratch else "random"}
    few = results["top_k"]
    rows: list[tuple[str, ...]] = [
        ("encoder", "images", "top-1 %", "95% interval", f"top-{few} %", "loss", "kNN %")
    ]
    for name, parts in results["encoders"].items():
        for part in results["majority_top1"]:
            figures = parts[part]
            top1 = (figures["top1"][key] for key in ("mean", "low", "high"))
            shares = *top1, figures[f"top{few}"]["mean"], figures["knn_top1"]
            mean, low, high, top_k, knn = (f"{100 * min(1, max(0, x)):.2f}" for x in shares)
            loss = f"{figures['loss']['mean']:.4f}"
            rows.append((titles[name], part, mean, f"{low}-{high}", top_k, loss, knn))
    for part, share in results["majority_top1"].items():
        rows.append(("majority class", part, f"{100 * share:.2f}", "", "", "", ""))
    return rows


def grid_rows(results: Results) -> list[tuple[str, ...]]:
    """Return the table of the trained encoder's grid, with its head."""
    rows: list[tuple[str, ...]] = [
        ("lr", "weight decay", "validation %", "test %", "best epoch", "validation %", "test %", "")
    ]
    keys = [f"{prefix}{part}_top1" for prefix in ("", "best_epoch_") for part in PARTS]
    for row in results["grid"]:
        shares = ["-" if row[key] is None else f"{100 * row[key]:.2f}" for key in keys]
        epochs = ",".join(map(str, row["best_epoch"]))
        mark = "best" if row["best"] else ""
        rates = f"{row['lr']:g}", f"{row['weight_decay']:g}"
        rows.append((*rates, *shares[:2], epochs, *shares[2:], mark))
    return rows
