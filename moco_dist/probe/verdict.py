"""What the figures of a finished probe mean, in one sentence."""

from __future__ import annotations

import math
from typing import Any

from moco_dist.probe.figures import wilson
from moco_dist.runs.record import CONTROL, PARTS, TRAINED

Results = dict[str, Any]
# A classifier is underfitted if its training loss has fallen by less than this share of what one
# more step of gradient descent reaches. On drawn shapes the share was 0.86 to 1 after training for
# long enough, and 0.06 to 0.7 at learning rates that were a hundred times too small.
UNDERFITTED = 0.75


def judge(results: Results) -> tuple[str, bool | None]:
    """Return what the figures mean, and whether the trained encoder beats the control.

    `results` is the content of results.json. The trained encoder is better if its top-1 interval
    lies above the control's; without a control the answer is None if it is above chance. Of the
    interval over seeds and the one over images the wider counts, because seeds that agree don't
    make a small test set large.
    """
    part = deciding_part(results)
    trained = _shown(results, TRAINED, part)
    controlled = CONTROL in results["encoders"]
    control = _shown(results, CONTROL, part) if controlled else ""
    scratch = results["protocol"] == "finetune"
    other = "one trained from scratch" if scratch else "a random one"
    majority = _percent(results["majority_top1"][part])
    guess = f"always predicting the most common class gives {majority}"
    if at_chance(results, TRAINED, part):
        if not controlled or at_chance(results, CONTROL, part):
            compared = f", {other} reaches {control}" if controlled else ""
            return (
                f"Nothing was learned: {part} top-1 is {trained}{compared}, and {guess}; check "
                "that the labels belong to the images (shuffled?) and that optim.lr is suitable."
            ), False
        return (
            f"The encoder tells nothing about the classes: {part} top-1 is {trained}, {other} "
            f"reaches {control}, and {guess}; check that the encoder is the one you meant and that "
            "it has not collapsed."
        ), False
    if not controlled:
        return (
            f"The encoder's {part} top-1 is {trained}, and {guess}; it was not compared "
            f"with {other} (control=false)."
        ), None
    compared = f"{part} top-1 is {trained} against {control}"
    low, high = widest(results, TRAINED, part)
    other_low, other_high = widest(results, CONTROL, part)
    if low > other_high:
        return (
            f"The trained encoder is better than {other} by more than the intervals: {compared}."
        ), True
    if high < other_low:
        return (
            f"The trained encoder is WORSE than {other}: {compared}; check the loss of its "
            "pretraining and that it is the encoder you meant."
        ), False
    return (
        f"The trained encoder is NOT better than {other} by more than the intervals: {compared}; "
        "it may itself be random, its pretraining may have been too short, or there may be too few "
        "images to tell."
    ), False


def doubts(results: Results) -> list[str]:
    """Return sentences on how the figures may change with other learning rates."""
    rates, found = sorted({row["lr"] for row in results["grid"]}), []
    names = {TRAINED: "the trained encoder", CONTROL: "the random encoder"}
    if len(rates) == 1:
        others = ",".join(f"{rates[0] * factor:g}" for factor in (0.01, 0.1, 1, 10))
        fix = "another optim.lr" if results["protocol"] == "finetune" else f"grid.lr=[{others}]"
        found.append(
            f"Only the learning rate {rates[0]:g} was tried, and others can change the comparison: "
            f"try {fix}."
        )
    for name, figures in results["encoders"].items():
        chosen, who = figures["selected"]["lr"], names[name]
        if len(rates) > 1 and chosen in (rates[0], rates[-1]):
            side = ("largest", "larger") if chosen == rates[-1] else ("smallest", "smaller")
            found.append(
                f"The best learning rate of {who}, {chosen:g}, is the {side[0]} of the grid: add "
                f"{side[1]} ones to grid.lr."
            )
        start = math.log(len(results["classes"]))
        now, after = figures.get("train_loss", (0.0, 0.0))
        if after < start and 1.05 * start > now > start - UNDERFITTED * (start - after):
            found.append(
                f"The classifier of {who} is underfitted: its training loss is {now:.3g}, and one "
                f"more step of gradient descent brings it to {after:.3g}; give a larger learning "
                "rate or more epochs."
            )
    return found


def misfits(results: Results) -> list[str]:
    """Return a sentence if the test labels contradict what was learned, else nothing."""
    shares = results["majority_top1"]
    if set(shares) != set(PARTS) or not at_chance(results, TRAINED, "test"):
        return []
    low, high = (widest(results, TRAINED, part) for part in PARTS)
    if low[0] <= high[1]:
        return []
    return [
        f"Top-1 is {_shown(results, TRAINED, 'validation')} on the validation images but "
        f"{_shown(results, TRAINED, 'test')} on the test images, where always predicting the most "
        f"common class gives {_percent(shares['test'])}: the test labels don't belong to the test "
        "images."
    ]


def deciding_part(results: Results) -> str:
    """Return the part that the verdict is about: test, or validation without test images."""
    return "test" if "test" in results["majority_top1"] else "validation"


def at_chance(results: Results, encoder: str, part: str) -> bool:
    """Return whether an encoder's top-1 is not above that of always predicting one class."""
    low: float = widest(results, encoder, part)[0]
    share: float = results["majority_top1"][part]
    return low <= max(share, 1 / len(results["classes"]))


def widest(results: Results, encoder: str, part: str) -> tuple[float, float]:
    """Return the union of the top-1 intervals over seeds and over images."""
    figures = results["encoders"][encoder][part]
    top1 = figures["top1"]
    low, high = wilson(min(1.0, max(0.0, top1["mean"])), figures["images"])
    return min(low, top1["low"]), max(high, top1["high"])


def _shown(results: Results, encoder: str, part: str) -> str:
    low, high = widest(results, encoder, part)
    mean = results["encoders"][encoder][part]["top1"]["mean"]
    return f"{_percent(mean)} ({100 * max(0, low):.1f} to {100 * min(1, high):.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
