"""Metrics over the epochs of runs, as charts with captions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moco_dist.report.figures import Chart, Series
from moco_dist.runs.record import Metric, Record, number, steps_per_epoch

Captioned = tuple[Chart, str]


class Course(NamedTuple):
    """A metric to draw: names of metric and chart, title, unit, factor to that unit, meaning."""

    metric: str
    name: str
    title: str
    unit: str
    factor: float
    caption: str


EVALUATION = Course(
    *(Metric.KNN_TOP1, "knn", "kNN top-1, validation images", "%", 100.0),
    "Share of the validation images that their nearest training images classify correctly, from "
    "backbone features (weighted kNN, Wu et al. 2018). Nothing is trained for it. Higher is "
    "better.",
)
PRETRAINING = (
    Course(
        *(Metric.ACCURACY_TOP1, "instance_top1", "Instance top-1, training batches", "%", 100.0),
        "Share of the queries that are closer to their own key than to any key in the queue. If it "
        "is near 100% while kNN does not rise, the encoder has found a shortcut, such as a leak "
        "through BatchNorm.",
    ),
    Course(
        *(Metric.LR, "learning_rate", "Learning rate", "", 1.0),
        "The learning rate of each step.",
    ),
    Course(
        *(Metric.IMAGES_PER_SECOND, "speed", "Speed", "images/s", 1.0),
        "Images of a batch divided by the seconds of its step, over all processes.",
    ),
)
HEALTH = (
    Course(
        *(Metric.FEATURE_STD, "health_feature_std", "Spread of the queries", "", 1.0),
        "1 if the unit vectors are spread evenly over the sphere, 0 if they are all the same. "
        "Below 0.02 the run has collapsed.",
    ),
    Course(
        *(Metric.RANKME, "health_rankme", "Effective rank of the keys (RankMe)", "", 1.0),
        "The number of dimensions over which the keys in the queue spread (Garrido et al. 2023). "
        "Below 1.5 the run has collapsed.",
    ),
    Course(
        *(Metric.ALIGNMENT, "health_alignment", "Alignment", "", 1.0),
        "Mean squared distance between a query and its positive key (Wang and Isola 2020): 0 if "
        "they coincide, 2 if they are unrelated.",
    ),
    Course(
        *(Metric.UNIFORMITY, "health_uniformity", "Uniformity", "", 1.0),
        "Logarithm of the mean closeness of the queries to each other (Wang and Isola 2020): 0 if "
        "all are alike, about -4 if they are spread evenly.",
    ),
    Course(
        *(Metric.EMA_DISTANCE, "health_ema_distance", "Key encoder to query encoder", "", 1),
        "Distance between the weights of the two encoders, relative to those of the query encoder.",
    ),
    Course(
        *(Metric.OWN_IMAGES, "queue_own_images", "Own older keys in the queue", "per query", 1.0),
        "Number of keys in the queue that come from the query's own image. They should be rare, or "
        "masked.",
    ),
)


def epochs(record: Record, metric: str) -> tuple[list[float], list[float]]:
    """Return the epochs and the values of a metric."""
    per_epoch = next((found for line in record.lines if (found := steps_per_epoch(line))), 0)
    x, y = [], []
    for line in record.lines:
        if (value := number(line.get(metric))) is not None:
            epoch = number(line.get("epoch"))
            x.append(line["step"] / max(1, per_epoch) if epoch is None else epoch)
            y.append(value)
    return x, y


def of_runs(courses: Sequence[Course], runs: Sequence[tuple[str, Record]]) -> Iterator[Captioned]:
    """Yield the chart of each course that a run has recorded, with its caption.

    The kNN of one run is compared with that before its first step, when its encoder was random.
    """
    for course in courses:
        series = []
        for place, (label, record) in enumerate(runs):
            x, y = epochs(record, course.metric)
            values = [course.factor * value for value in y]
            if x:
                series.append(Series(label, x, values, place))
            if course is EVALUATION and len(runs) == 1 < len(x) and x[0] == 0:
                series.append(Series("random encoder", [0, x[-1]], [values[0]] * 2, control=True))
        if series:
            yield Chart(course.name, course.title, series, y_label=course.unit), course.caption


def loss(runs: Sequence[tuple[str, Record]]) -> Iterator[Captioned]:
    """Yield the chart of the pretraining losses with its caption, nothing without a loss.

    The loss is drawn from when the queue was full: it begins at 0 and climbs while the queue fills.
    """
    series, filled, references = [], True, set()
    for place, (label, record) in enumerate(runs):
        x, y = epochs(record, Metric.LOSS)
        full = [
            number(line.get(Metric.QUEUE_FILL)) == 1
            for line in record.lines
            if number(line.get(Metric.LOSS)) is not None
        ]
        begins = full.index(True) if True in full else 0
        filled &= True in full
        if x:
            series.append(Series(label, x[begins:], y[begins:], place))
            queue = number(record.config.get("moco.queue_size")) or 0
            simple = record.config.get("moco.symmetric") is False
            references.add(math.log(1 + queue) if simple and queue > 0 else None)
    if not series:
        return
    reference = references.pop() if len(references) == 1 else None
    chart = Chart(
        *("loss", "InfoNCE loss, training batches", series),
        reference=(reference, "guessing") if reference else None,
    )
    since = "since the queue was full" if filled else "while the queue was being filled"
    yield (
        chart,
        f"Loss of the training batches {since}. It depends on the queue and the temperature: "
        "compare it only between runs that share both, and do not choose a checkpoint by it.",
    )


def of_probes(runs: Sequence[tuple[str, Record]]) -> Iterator[Captioned]:
    """Yield the charts of probes, top-1, top-5 (or another top-k) and loss, with captions."""
    counts = {str(record.config.get("top_k", 5)) for _, record in runs}
    parts = {part_of(record) for _, record in runs}
    where = parts.pop() if len(parts) == 1 else "held-out"
    for metric, title, unit, factor in (
        ("top1", "top-1", "%", 100.0),
        *((f"top{count}", f"top-{count}", "%", 100.0) for count in sorted(counts)),
        ("loss", "loss", "", 1.0),
    ):
        series = []
        for place, (label, record) in enumerate(runs):
            for encoder, word in (("probe", "trained"), ("control", "random")):
                x, y = epochs(record, f"{encoder}/{metric}")
                name = f"{word} encoder" if len(runs) == 1 else f"{label}, {word}"
                values = [factor * value for value in y]
                if x:
                    series.append(Series(name, x, values, place, control=encoder == "control"))
        if series:
            chart = Chart(
                *(f"probe_{metric}", f"Probe {title}, {where} images", series),
                y_label=unit,
                may_be_logarithmic=metric == "loss",
            )
            yield chart, _probe_caption(metric, title, where)


def _probe_caption(metric: str, title: str, where: str) -> str:
    if metric == "loss":
        return f"Cross-entropy of the probe's classifier on the {where} images."
    return (
        f"{title.capitalize()} on the {where} images after each epoch of the classifier. "
        "Dashed: the same probe of a randomly initialised encoder."
    )


def part_of(record: Record) -> str:
    """Return the part of the data on which a probe is evaluated after each epoch."""
    return "test" if number(record.config.get("data.validation")) == 0 else "validation"
