"""What the figures of a finished probe mean, in one sentence for people who read nothing else."""

from __future__ import annotations

from typing import Any

from moco_dist.probe.figures import wilson
from moco_dist.runs.record import CONTROL, PARTS, TRAINED

Results = dict[str, Any]


def judge(results: Results) -> tuple[str, bool | None]:
    """Return what the figures mean, and whether the trained encoder beats the control.

    `results` is the content of results.json. The trained encoder is better if its interval of top-1
    lies above the control's; without a control, an encoder that is above chance may be (None). An
    interval is the wider one of that over seeds and that of the number of images: seeds that agree
    don't make a small test set large.
    """
    part = deciding_part(results)
    majority = results["majority_top1"][part]
    trained = _shown(results, TRAINED, part)
    scratch = results["protocol"] == "finetune"
    other = "one trained from scratch" if scratch else "a random one"
    guess = f"naming the largest class always gives {_percent(majority)}"
    controlled = CONTROL in results["encoders"]
    if at_chance(results, TRAINED, part):
        if not controlled or at_chance(results, CONTROL, part):
            compared = f", {other} {_shown(results, CONTROL, part)}" if controlled else ""
            sentence = (
                f"Nothing was learned: {part} top-1 is {trained}{compared}, and {guess}; check "
                "whether the labels belong to the images (shuffled?) and whether optim.lr suits"
            )
        else:
            sentence = (
                f"The encoder tells nothing of the classes: {part} top-1 is {trained}, {guess}, "
                f"and {other} reaches {_shown(results, CONTROL, part)}; check whether it has "
                "collapsed, or is a different one from the one you meant"
            )
        return sentence, False
    if not controlled:
        return (
            f"The encoder's {part} top-1 is {trained}, and {guess}; whether {other} would do as "
            "well was not tried (control=false)"
        ), None
    control = _shown(results, CONTROL, part)
    low, high = widest(results, TRAINED, part)
    other_low, other_high = widest(results, CONTROL, part)
    if low > other_high:
        return (
            f"The trained encoder is better than {other} by more than the intervals: {part} "
            f"top-1 is {trained} against {control}"
        ), True
    if high < other_low:
        return (
            f"The trained encoder is WORSE than {other}: {part} top-1 is {trained} against "
            f"{control}; check the loss of its pretraining, and whether it is the right one"
        ), False
    return (
        f"The trained encoder is NOT better than {other} by more than the intervals: {part} top-1 "
        f"is {trained} against {control}; it may itself be random, its pretraining may have been "
        "too short, or there are too few images to tell"
    ), False


def misfits(results: Results) -> list[str]:
    """Return a sentence for test labels that don't fit what was learned."""
    shares = results["majority_top1"]
    if set(shares) != set(PARTS) or not at_chance(results, TRAINED, "test"):
        return []
    low, high = (widest(results, TRAINED, part) for part in PARTS)
    if low[0] <= high[1]:
        return []
    return [
        f"top-1 is {_shown(results, TRAINED, 'validation')} on the validation images and "
        f"{_shown(results, TRAINED, 'test')} on the test images, where naming the largest class "
        f"always gives {_percent(shares['test'])}: the test labels don't belong to the test images"
    ]


def deciding_part(results: Results) -> str:
    """Return the part that decides: the test images, or, without any, those of validation."""
    return "test" if "test" in results["majority_top1"] else "validation"


def at_chance(results: Results, encoder: str, part: str) -> bool:
    """Return whether an encoder's top-1 is not above that of naming one class always."""
    low: float = widest(results, encoder, part)[0]
    share: float = results["majority_top1"][part]
    return low <= max(share, 1 / len(results["classes"]))


def widest(results: Results, encoder: str, part: str) -> tuple[float, float]:
    """Return the interval of top-1, by seeds or by images, whichever reaches further."""
    figures = results["encoders"][encoder][part]
    top1 = figures["top1"]
    low, high = wilson(min(1.0, max(0.0, top1["mean"])), figures["images"])
    return min(low, top1["low"]), max(high, top1["high"])


def _shown(results: Results, encoder: str, part: str) -> str:
    low, high = widest(results, encoder, part)
    mean = results["encoders"][encoder][part]["top1"]["mean"]
    return f"{_percent(mean)} ({100 * max(0, low):.1f} to {100 * min(1, high):.1f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
