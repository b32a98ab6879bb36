"""Alarms: what goes wrong in a run, found in its lines of metrics, with what to do about it.

Each alarm is given once in the life of a run: as a warning, and as a line of metrics.jsonl. A
resumed run reads those lines again, so nothing else is saved for alarms.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from pathlib import Path
from statistics import fmean, median

from moco_dist.config.recipe import PretrainConfig
from moco_dist.errors import NumbersError
from moco_dist.runs import record
from moco_dist.runs.record import Metric
from moco_dist.tracking.terminal import Sink
from moco_dist.tracking.tracker import Metrics

logger = logging.getLogger(__name__)

TOO_LONG, NOT_FINITE = "queue longer than the data", "not finite"
OTHER_LENGTH = "another length"

# Spread and effective rank of the unit vectors. Below either of the first pair the vectors are
# nearly one point or one line; below both of the second pair they hold little more than one number.
# Healthy runs go down to 0.15 and 9 (demo), 0.24 and 9 (CIFAR-10 at width 4). A learning rate of
# 1000 gives 0.003 and 1.2; a data set of one image, repeated, gives 0.05 and 2.4.
COLLAPSED_STD, COLLAPSED_RANK = 0.02, 1.5
NARROW_STD, NARROW_RANK = 0.1, 3.0
# Measurements in a row that must agree.
COLLAPSED_TIMES = 3
# Share of the loss of guessing above which nothing has been learnt. The demo is below 0.96 after
# two epochs, and CIFAR-10 is never above 0.92.
GUESSING = 0.98
# Spans of steps after which the loss is judged. A span is an epoch, or SPAN_STEPS if that is more.
SPANS = 3
SPAN_STEPS = 100
# Share of its lead on guessing that a rising loss may lose. The loss rises in healthy runs too
# (CIFAR-10 at width 4 loses 0.6 in two epochs while kNN goes from 26 to 35 %), but their queries
# spread.
LOST_LEAD = 0.25
# Instance accuracy that is suspicious if kNN is not as good. Healthy short runs stay below 0.2; a
# leak that has been learnt gives 0.97.
NEAR_ALL = 0.95
# A change of the kNN accuracy that is more than noise.
CLEAR = 0.05
# Lines whose median speed is compared with that of at least twice as many lines before them. One
# evaluation, save or busy minute doesn't move a median.
SLOW_LINES = 30


class Watch:
    """Reads the lines of metrics of a run in order, and finds each alarm once.

    `images` is the number of training images. `path` is metrics.jsonl, cut back to the step from
    which the run continues; `write` appends a line to it, and `shown` displays each alarm.
    """

    def __init__(
        self, config: PretrainConfig, images: int, path: Path, write: Sink, shown: Sink
    ) -> None:
        self.config, self.images, self.write, self.shown = config, images, write, shown
        self.told: set[str] = set()
        # Measurements in a row that look collapsed.
        self._collapsed = 0
        # Instance accuracies since the last evaluation, and all kNN accuracies.
        self._instances: list[float] = []
        self._knn: list[float] = []
        # The step at which the queue was full. Since then: mean loss and mean spread of each span
        # that has ended; number, losses and spreads of the current one.
        self._full: int | None = None
        self._ended: list[tuple[float, float]] = []
        self._span = -1
        self._losses: list[float] = []
        self._spreads: list[float] = []
        self._speeds: deque[float] = deque(maxlen=1000)
        self._candidates = config.moco.candidates(config.batch_size, images)
        self._began = "queue was full" if config.moco.fills else "run began"
        self._replay(path)

    def sink(self, step: int, metrics: Metrics) -> None:
        """Give the alarms that `look` finds; this is a sink of a Tracker."""
        for name, text in self.look(step, metrics).items():
            if name != TOO_LONG:  # given before the first step
                logger.warning("%s at step %d: %s", name, step, text)
            self._give(step, name, text)

    def ended(self, step: int, error: NumbersError) -> None:
        """Write the alarm of numbers that are not finite, which the error itself tells the user."""
        if NOT_FINITE not in self.told:
            self.write(step, {"alarm": NOT_FINITE, "text": str(error)})

    def note(self, step: int, name: str, text: str) -> None:
        """Write and show what was found elsewhere, once."""
        if text not in self.told:
            self.told.add(text)
            self._give(step, name, text)

    def _give(self, step: int, name: str, text: str) -> None:
        for sink in (self.write, self.shown):
            sink(step, {"alarm": name, "text": text})

    def look(self, step: int, metrics: Metrics) -> dict[str, str]:
        """Return a sentence for each new alarm in the line `metrics` of `step`, under its name."""
        found = {
            TOO_LONG: self.config.moco.too_long(self.config.batch_size, self.images),
            "collapse": self._collapse(metrics),
            "BatchNorm leak": self._leak(metrics),
            "loss rises": None,
            "throughput halved": self._slowness(metrics),
        }
        if self._ends_span(step, metrics) and len(self._ended) >= SPANS:
            found["collapse"] = found["collapse"] or self._guess(step)
            found["loss rises"] = self._rise()
        new = {name: text for name, text in found.items() if text and name not in self.told}
        self.told |= new.keys()
        return new

    def _replay(self, path: Path) -> None:
        """Read the lines up to here, and which alarms have been given.

        Speeds are forgotten, because another machine may have logged them.
        """
        told = set()
        for line in record.lines(path):
            if "alarm" in line:
                told |= {line["alarm"], line.get("text", "")}
            else:
                self.look(line["step"], line)
        self.told = told
        self._speeds.clear()

    def _collapse(self, metrics: Metrics) -> str | None:
        spread, rank = metrics.get(Metric.FEATURE_STD), metrics.get(Metric.RANKME)
        if spread is None or rank is None or not self._is_full(metrics):
            return None
        bad = spread < COLLAPSED_STD or rank < COLLAPSED_RANK
        bad = bad or (spread < NARROW_STD and rank < NARROW_RANK)
        self._collapsed = self._collapsed + 1 if bad else 0
        if self._collapsed < COLLAPSED_TIMES:
            return None
        return (
            f"the encoder maps all images to almost the same place (health/feature_std "
            f"{spread:.2g}, 1 is an even spread; health/rankme {rank:.3g} of "
            f"{self.config.encoder.dim}); {self._retrain()}"
        )

    def _leak(self, metrics: Metrics) -> str | None:
        if Metric.ACCURACY_TOP1 in metrics and self._is_full(metrics):
            self._instances.append(metrics[Metric.ACCURACY_TOP1])
        accuracy = metrics.get(Metric.KNN_TOP1)
        if accuracy is None:
            return None
        instances, self._instances = self._instances, []
        self._knn.append(accuracy)
        first, best = self._knn[0], max(self._knn)
        learns = best >= first + CLEAR and accuracy > best - CLEAR
        if len(self._knn) < 2 or learns or not instances or fmean(instances) < NEAR_ALL:
            return None
        return (
            f"{fmean(instances):.1%} of the queries find their own image among "
            f"{self._candidates - 1} others, and kNN went from {first:.1%} over {best:.1%} "
            f"to {accuracy:.1%}: the encoder recognises them by something else, such as shared "
            f"BatchNorm statistics; use bn_groups=8 (now {self.config.bn_groups}), and run "
            "python -m moco_dist.doctor RUN --bn-leak; or else the two views are too similar"
        )

    def _is_full(self, metrics: Metrics) -> bool:
        """Return whether the step of a line had as many negatives as all later ones."""
        return metrics.get(Metric.FILL, 0 if self.config.moco.fills else 1) == 1

    def _ends_span(self, step: int, metrics: Metrics) -> bool:
        """Return whether a span of steps has ended: an epoch, or longer, with the queue full."""
        loss, config = metrics.get(Metric.LOSS), self.config
        if loss is None or not self._is_full(metrics):
            return False
        if self._full is None:
            self._full = step
            return False  # this step's own queue was not full yet
        lines = 10 * config.tracking.every_steps
        length = max(self.images // config.batch_size, self._full, lines, SPAN_STEPS)
        number = (step - self._full) // length
        ends = number != self._span and bool(self._losses)
        if ends:
            self._ended.append((fmean(self._losses), fmean(self._spreads or [math.inf])))
        if number != self._span:
            self._span, self._losses, self._spreads = number, [], []
        self._losses.append(loss)
        if Metric.FEATURE_STD in metrics:
            self._spreads.append(metrics[Metric.FEATURE_STD])
        return ends

    def _guess(self, step: int) -> str | None:
        loss, chance = self._ended[-1][0], math.log(self._candidates)
        if loss < GUESSING * chance:
            return None
        steps = step - (self._full or 0)
        return (
            f"train/loss {loss:.3f} is that of guessing ({chance:.3f}), {steps} steps after the "
            f"{self._began}: the encoder tells no image from another; {self._retrain()}"
        )

    def _rise(self) -> str | None:
        (first, narrow), (last, spread) = self._ended[0], self._ended[-1]
        chance = math.log(self._candidates)
        if last < max(loss for loss, _ in self._ended) or not spread < narrow:
            return None
        if last - first < max(LOST_LEAD * (chance - first), 0.02 * chance):
            return None
        by_momentum = self.config.moco.keys == "momentum"
        slower = f"moco.momentum above {self.config.moco.momentum:g} or " if by_momentum else ""
        return (
            f"train/loss rose from {first:.3f} to {last:.3f} since the {self._began} at step "
            f"{self._full} (guessing gives {chance:.3f}), and the queries don't spread: the "
            f"negatives are useless; train again with {slower}optim.lr below "
            f"{self.config.optim.lr:g}, and name=..."
        )

    def _retrain(self) -> str:
        return (
            "check that the images differ, and train again with optim.lr below "
            f"{self.config.optim.lr:g} or with optim.warmup_epochs, and name=..."
        )

    def _slowness(self, metrics: Metrics) -> str | None:
        speed = metrics.get(Metric.IMAGES_PER_SECOND)
        if speed is None:
            return None
        self._speeds.append(speed)
        speeds = list(self._speeds)
        if len(speeds) < 3 * SLOW_LINES:
            return None
        now, before = median(speeds[-SLOW_LINES:]), median(speeds[:-SLOW_LINES])
        if now >= before / 2:
            return None
        return (
            f"{now:,.0f} images/s in the last {SLOW_LINES} lines, {before:,.0f} before: something "
            "else uses the machine, or it throttles; look at nvidia-smi or top on every machine"
        )
