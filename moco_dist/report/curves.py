"""Metrics over the epochs of runs, as charts with captions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moco_dist.config.moco import MocoConfig
from moco_dist.report.figures import Chart, Series
from moco_dist.runs.record import Metric, Record, number, steps_per_epoch

Captioned = tuple[Chart, str]


class Course(NamedTuple):
    """A metric to draw, with the chart's name, title, unit and caption; "%" scales by 100."""

    metric: str
    name: str
    title: str
    unit: str
    caption: str


EVALUATION = Course(
    *(Metric.KNN_TOP1, "knn", "kNN top-1, validation images", "%"),
    "Share of the validation images that their nearest training images classify correctly, from "
    "backbone features (weighted kNN, Wu et al. 2018). Nothing is trained for it. Higher is "
    "better.",
)
PRETRAINING = (
    Course(
        *(Metric.ONLINE_TOP1, "online", "Online linear probe top-1, validation images", "%"),
        "Share of the validation images that a linear classifier gets right, which is fitted to "
        "the backbone's features of the training images at each evaluation (monitor.linear). "
        "Nothing is chosen for it.",
    ),
    Course(
        *(Metric.ACCURACY_TOP1, "instance_top1", "Instance top-1, training batches", "%"),
        "Share of the queries that are closer to their positive than to any of their negatives. If "
        "it is near 100% while kNN does not rise, the encoder has found a shortcut, such as a leak "
        "through BatchNorm. The more negatives, the lower it is.",
    ),
    Course(Metric.LR, "learning_rate", "Learning rate", "", "The learning rate of each step."),
    Course(
        *(Metric.IMAGES_PER_SECOND, "speed", "Speed", "images/s"),
        "Images of a batch divided by the seconds of its step, over all processes.",
    ),
)
HEALTH = (
    Course(
        *(Metric.FEATURE_STD, "health_feature_std", "Spread of the queries", ""),
        "1 if the unit vectors are spread evenly over the sphere, 0 if they are all the same. "
        "Below 0.02 the run has collapsed.",
    ),
    Course(
        *(Metric.RANKME, "health_rankme", "Effective rank (RankMe)", ""),
        "The number of dimensions over which the keys in the queue spread, or without a queue the "
        "queries of a step (Garrido et al. 2023). Below 1.5 the run has collapsed.",
    ),
    Course(
        *(Metric.ALIGNMENT, "health_alignment", "Alignment", ""),
        "Mean squared distance between a query and its positive (Wang and Isola 2020): 0 if they "
        "coincide, 2 if they are unrelated.",
    ),
    Course(
        *(Metric.UNIFORMITY, "health_uniformity", "Uniformity", ""),
        "Logarithm of the mean closeness of the queries to each other (Wang and Isola 2020): 0 if "
        "all are alike, about -4 if they are spread evenly.",
    ),
    Course(
        *(Metric.EMA_DISTANCE, "health_ema_distance", "Key encoder to query encoder", ""),
        "Distance between the weights of the two encoders, relative to those of the query encoder.",
    ),
    Course(
        *(Metric.OWN_IMAGES, "queue_own_images", "Own older keys in the queue", "per query"),
        "Number of keys in the queue that come from the query's own image. They should be rare, or "
        "masked.",
    ),
)


def epochs(record: Record, metric: str, unit: str = "") -> tuple[list[float], list[float]]:
    """Return the epochs and the values of a metric; the unit "%" multiplies these by 100."""
    per_epoch = next((found for line in record.lines if (found := steps_per_epoch(line))), 0)
    x, y = [], []
    for line in record.lines:
        if (value := number(line.get(metric))) is not None:
            epoch = number(line.get("epoch"))
            x.append(line["step"] / max(1, per_epoch) if epoch is None else epoch)
            y.append(100 * value if unit == "%" else value)
    return x, y


def of_runs(courses: Sequence[Course], runs: Sequence[tuple[str, Record]]) -> Iterator[Captioned]:
    """Yield the chart and the caption of each metric that a run has recorded.

    With a single run, a line marks its kNN accuracy before the first step, of a random encoder.
    """
    for course in courses:
        series = []
        for place, (label, record) in enumerate(runs):
            x, y = epochs(record, course.metric, course.unit)
            if x:
                series.append(Series(label, x, y, place))
            if course is EVALUATION and len(runs) == 1 < len(x) and x[0] == 0:
                series.append(Series("random encoder", [0, x[-1]], [y[0]] * 2, control=True))
        if series:
            yield Chart(course.name, course.title, series, y_label=course.unit), course.caption


def loss(runs: Sequence[tuple[str, Record]]) -> Iterator[Captioned]:
    """Yield the chart of the pretraining losses and its caption, or nothing without a loss.

    The curves begin when the queue was full, because the loss climbs from 0 while it fills.
    """
    series, filled, references = [], True, set()
    for place, (label, record) in enumerate(runs):
        x, y = epochs(record, Metric.LOSS)
        full = [
            number(line.get(Metric.FILL)) in (1, None)
            for line in record.lines
            if number(line.get(Metric.LOSS)) is not None
        ]
        begins = full.index(True) if True in full else 0
        filled &= True in full
        if x:
            series.append(Series(label, x[begins:], y[begins:], place))
            moco, batch = MocoConfig.stored(record.config), record.config.get("batch_size")
            known = moco.candidates(int(number(batch) or 0), 0) if moco else 0
            references.add(math.log(known) if known > 1 else None)
    if not series:
        return
    reference = references.pop() if len(references) == 1 else None
    chart = Chart(
        *("loss", "InfoNCE loss, training batches", series),
        reference=(reference, "guessing") if reference else None,
    )
    since = "since their memory was full" if filled else "while a queue was being filled"
    yield (
        chart,
        f"Loss of the training batches {since}. It depends on the negatives and the temperature: "
        "compare it only between runs that share both, and do not choose a checkpoint by it.",
    )


def of_probes(runs: Sequence[tuple[str, Record]]) -> Iterator[Captioned]:
    """Yield the charts of probes and their captions: top-1, top-k and loss."""
    counts = sorted({str(record.config.get("top_k", 5)) for _, record in runs})
    # A probe is evaluated on the test images if it holds out no validation images.
    parts = {
        "test" if number(record.config.get("data.validation")) == 0 else "validation"
        for _, record in runs
    }
    where = parts.pop() if len(parts) == 1 else "held-out"
    for metric in ("top1", *(f"top{count}" for count in counts), "loss"):
        title, unit, caption = "loss", "", f"Cross-entropy of the classifier on the {where} images."
        if metric != "loss":
            title, unit = metric.replace("top", "top-"), "%"
            caption = (
                f"{title.capitalize()} on the {where} images after each epoch of the classifier. "
                "Dashed: the same probe of a randomly initialised encoder."
            )
        series = []
        for place, (label, record) in enumerate(runs):
            for encoder, word in (("probe", "trained"), ("control", "random")):
                x, y = epochs(record, f"{encoder}/{metric}", unit)
                name = f"{word} encoder" if len(runs) == 1 else f"{label}, {word}"
                if x:
                    series.append(Series(name, x, y, place, control=encoder == "control"))
        if series:
            title = f"Probe {title}, {where} images"
            logarithmic = metric == "loss"
            yield Chart(f"probe_{metric}", title, series, "epoch", unit, None, logarithmic), caption
