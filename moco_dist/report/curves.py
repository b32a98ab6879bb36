"""The courses of runs over their epochs, as charts with captions, from their lines of metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from moco_dist.report.figures import Chart, Series
from moco_dist.runs.record import Metric, Record, number, steps_per_epoch


class Course(NamedTuple):
    """A metric to draw: its name, the chart's and its title, a factor, what it means."""

    metric: str
    name: str
    title: str
    unit: str
    factor: float
    caption: str


EVALUATION = Course(
    *(Metric.KNN_TOP1, "knn", "kNN top-1, validation images", "%", 100.0),
    "Share of held-out images that their nearest training images classify rightly, by backbone "
    "features (weighted, Wu et al. 2018). Nothing is trained for it. Higher is better.",
)
PRETRAINING = (
    Course(
        *(Metric.ACCURACY_TOP1, "instance_top1", "Instance top-1, training batches", "%", 100.0),
        "Share of queries that find their own key among the queue's. Near 100 % without a rise of "
        "kNN is a shortcut, such as a leak through BatchNorm.",
    ),
    Course(
        *(Metric.LR, "learning_rate", "Learning rate", "", 1.0),
        "The schedule as it was carried out.",
    ),
    Course(
        *(Metric.IMAGES_PER_SECOND, "speed", "Speed", "images/s", 1.0),
        "Images of a batch over the seconds of a step, all processes together.",
    ),
)
HEALTH = (
    Course(
        *(Metric.FEATURE_STD, "health_feature_std", "Spread of the queries", "", 1.0),
        "1 where unit vectors are spread evenly over the sphere, 0 where all are the same one. "
        "Below 0.02 the run has collapsed.",
    ),
    Course(
        *(Metric.RANKME, "health_rankme", "Effective rank of the keys (RankMe)", "", 1.0),
        "Over how many dimensions the keys in the queue spread (Garrido et al. 2023). Below 1.5 "
        "the run has collapsed.",
    ),
    Course(
        *(Metric.ALIGNMENT, "health_alignment", "Alignment", "", 1.0),
        "Mean squared distance of a query and its positive key (Wang and Isola 2020). 0 where "
        "they coincide, 2 where they are unrelated.",
    ),
    Course(
        *(Metric.UNIFORMITY, "health_uniformity", "Uniformity", "", 1.0),
        "Log of the mean closeness of queries to one another (Wang and Isola 2020). 0 where all "
        "are alike, about -4 where they are spread evenly.",
    ),
    Course(
        *(Metric.EMA_DISTANCE, "health_ema_distance", "Key encoder behind query encoder", "", 1),
        "Distance of their weights, relative to the query encoder's.",
    ),
    Course(
        *(Metric.OWN_IMAGES, "queue_own_images", "Own older keys in the queue", "per query", 1.0),
        "Keys of its own image that a query finds in the queue; they should be rare or masked.",
    ),
)


def epochs(record: Record, metric: str) -> tuple[list[float], list[float]]:
    """Return epochs and values of a metric, in their order."""
    per_epoch = next((found for line in record.lines if (found := steps_per_epoch(line))), 0)
    x, y = [], []
    for line in record.lines:
        if (value := number(line.get(metric))) is not None:
            epoch = number(line.get("epoch"))
            x.append(line["step"] / max(1, per_epoch) if epoch is None else epoch)
            y.append(value)
    return x, y


def of_runs(course: Course, runs: Sequence[tuple[str, Record]]) -> Chart | None:
    """Return the chart of a course for the runs that have it, None if none has."""
    series = []
    for place, (label, record) in enumerate(runs):
        x, y = epochs(record, course.metric)
        if x:
            series.append(Series(label, x, [course.factor * value for value in y], place))
    if not series:
        return None
    return Chart(course.name, course.title, series, y_label=course.unit)


def loss(runs: Sequence[tuple[str, Record]]) -> tuple[Chart, str] | None:
    """Return the chart of the pretraining losses, and its caption.

    A loss begins at 0 and climbs while the queue fills; it is drawn from when that was full.
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
        return None
    reference = references.pop() if len(references) == 1 else None
    chart = Chart(
        *("loss", "InfoNCE loss, training batches", series),
        reference=(reference, "guessing") if reference else None,
    )
    since = "from when the queue was full" if filled else "whose queue has not been full yet"
    return chart, (
        f"Loss of the training batches, {since}. It depends on the queue and the temperature: "
        "compare it between runs that share them, and choose no checkpoint by it."
    )


def of_probes(runs: Sequence[tuple[str, Record]]) -> Iterator[tuple[Chart, str]]:
    """Yield the charts of probes: top-1, top-5 (or another number) and loss, and their captions."""
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
            for encoder in ("probe", "control"):
                x, y = epochs(record, f"{encoder}/{metric}")
                words = "trained encoder" if encoder == "probe" else "random encoder"
                name = words if len(runs) == 1 else f"{label}, {words.split()[0]}"
                values = [factor * value for value in y]
                if x:
                    series.append(Series(name, x, values, place, dashed=encoder == "control"))
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
    """Return the part of the data on which a probe is evaluated while it goes on."""
    return "test" if number(record.config.get("data.validation")) == 0 else "validation"
