"""How far a run is and how well it does, from its lines of metrics alone."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from moco_dist.runs.record import Metric, number, steps_per_epoch, text_of

WINDOW = 1000  # lines of metrics over which the pace is measured
POINTS = 512  # that a curve keeps at most


class Curve:
    """The course of a figure in some hundred points, each the mean of equally many values."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self._each, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        """Add a value, unless it is not finite."""
        if not math.isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._each:
            return
        points = [*self.points, self._sum / self._count]
        self._sum, self._count = 0.0, 0
        if len(points) == POINTS:
            pairs = zip(points[::2], points[1::2], strict=True)
            points, self._each = [(a + b) / 2 for a, b in pairs], 2 * self._each
        self.points = points  # at once: another thread may be drawing

    def drawn(self, width: int, marks: str) -> str:
        """Return the curve as at most `width` of the marks, which are ordered from low to high."""
        points, count = self.points, len(self.points)
        if not points:
            return ""
        size = min(width, count)
        cuts = [place * count // size for place in range(size + 1)]
        means = [sum(points[a:b]) / (b - a) for a, b in pairwise(cuts)]
        low, high = min(means), max(means)
        scale = (len(marks) - 1) / (high - low) if high > low else 0.0
        return "".join(marks[round((mean - low) * scale)] for mean in means)


class RunProgress:
    """The step and the newest figures of a run; call `add` with its lines in order.

    `knn_every` is the number of epochs between evaluations, for the time that is left.
    """

    def __init__(self, total: int = 0, step: int = 0, knn_every: int = 0) -> None:
        self.total, self.step, self.knn_every = total, step, knn_every
        self.per_epoch = 0
        # The newest value of each metric.
        self.newest: dict[str, float] = {}
        # The accuracy is kNN's, or the probe's top-1.
        self.loss, self.accuracy = Curve(), Curve()
        self.best_knn: tuple[int, float] | None = None  # step and accuracy
        self.alarms: list[str] = []
        self.running = True
        self.moment = 0.0  # of the newest line
        # When the newest launch began: lines of earlier ones don't tell its pace.
        self.began = 0.0
        self._filled = False
        # Time, step and seconds of evaluation up to then, at lines about training.
        self._pace: deque[tuple[float, int, float]] = deque(maxlen=WINDOW)
        # Seconds and number of evaluations, and the step of the last one.
        self._evaluating, self._evaluations, self._evaluated = 0.0, 0, -1

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line of metrics, with "step" and "time", or an alarm."""
        step, before = line["step"], self.moment
        self.moment = now = number(line.get("time")) or before
        if before < self.began <= now:
            self.begin_again()
        if isinstance(line.get("alarm"), str):
            alarm = f"ALARM at step {step}: {text_of(line.get('text') or line['alarm'])}"
            self.alarms, self.step = [*self.alarms, alarm], max(self.step, step)
            return
        self.per_epoch = steps_per_epoch(dict(line)) or self.per_epoch
        loss, knn = number(line.get(Metric.LOSS)), number(line.get(Metric.KNN_TOP1))
        accuracy = number(line.get(Metric.PROBE_TOP1)) if knn is None else knn
        if accuracy is not None:
            self.accuracy.add(accuracy)
        if knn is not None:
            self._evaluated = step
            if step and math.isfinite(knn) and knn > (self.best_knn or (0, -1.0))[1]:
                self.best_knn = step, knn
            if loss is None and self._pace and self._pace[-1][1] == step == self.step:
                self._evaluating += max(0.0, now - before)
                self._evaluations += 1
        if loss is not None:
            # The loss climbs while the queue fills, and means nothing until then.
            if number(line.get(Metric.FILL)) == 1 and not self._filled:
                self._filled, self.loss = True, Curve()
            self.loss.add(loss)
            self._pace.append((now, step, self._evaluating))
        figures = {name: found for name, v in line.items() if (found := number(v)) is not None}
        self.newest = self.newest | figures
        self.step = step

    def begin_again(self) -> None:
        """Forget the pace: the lines so far are those of an earlier launch."""
        self._pace.clear()

    def seconds_left(self) -> float | None:
        """Return the seconds from the newest line to the end; None while they are unknown.

        Training, including saves, and evaluations are counted separately.
        """
        if not self.running or not self.total or len(self._pace) < 2:
            return None
        (began, first, idle), (ended, last, idle_by_now) = self._pace[0], self._pace[-1]
        if last <= first:
            return None
        each = max(0.0, ended - began - (idle_by_now - idle)) / (last - first)
        evaluation = self._evaluating / max(1, self._evaluations)
        steps = max(0, self.total - self.step)
        evaluations = self._evaluations_left() if self._evaluations else 0
        return each * steps + evaluation * evaluations if steps or evaluations else None

    def _evaluations_left(self) -> int:
        """Return the number of evaluations to come; the last step always has one."""
        every = self.knn_every * self.per_epoch
        if not every or (self.step >= self.total and self._evaluated == self.step):
            return 0
        pending = self.step % every == 0 and self._evaluated != self.step
        return self.total // every - self.step // every + (self.total % every > 0) + pending


def duration(seconds: float) -> str:
    """Return a span of time in at most six characters: 45s, 12m05s, 2h05m, 3d04h."""
    whole = round(seconds)
    for large, small, units in ((86400, 3600, "dh"), (3600, 60, "hm"), (60, 1, "ms")):
        if whole >= large:
            return f"{whole // large}{units[0]}{whole % large // small:02}{units[1]}"
    return f"{whole}s"


def moment(seconds: float, form: str = "%m-%d %H:%M", unknown: str = "??-?? ??:??") -> str:
    """Return a point in time as a log shows it: month, day, hour and minute, or in another form."""
    try:
        return time.strftime(form, time.localtime(seconds))
    except (OverflowError, OSError, ValueError):
        return unknown
