"""The tables of a probe on a page: results, grid of learning rates, and classes."""

from __future__ import annotations

from collections.abc import Iterator

from moco_dist.report.results import Results, Value
from moco_dist.report.table import NONE, percent
from moco_dist.runs.record import PARTS, TRAINED, number, text_of


def figure(value: Value | None, is_share: bool = True) -> str:
    """Return a figure, followed by its interval if it has one."""
    if value is None:
        return NONE
    mean, *ends = (
        percent(each) if is_share else f"{each:.4f}"
        for each in (value.mean, value.low, value.high)
        if each is not None
    )
    return f"{mean} ({' to '.join(ends)})" if ends else mean


def title_of(name: str) -> str:
    """Return the heading of a column of figures."""
    words = name.replace("knn_top", "kNN top-").replace("top", "top-").replace("top--", "top-")
    return "loss" if name == "loss" else f"{words}, %"


def facts(found: Results) -> str:
    """Return how the results were obtained, in words."""
    content, told, after = found.content, [], ""
    if protocol := content.get("protocol"):
        features = text_of(content.get("features") or "?")
        told.append(f"protocol {text_of(protocol)}, {features} features")
    if (images := number(content.get("train_images"))) is not None:
        told.append(f"{images:,.0f} training images")
    if (fraction := number(content.get("label_fraction"))) is not None and fraction < 1:
        told.append(f"{100 * fraction:g}% of the labels")
    values = [found.value(TRAINED, part, "top1") for part in PARTS]
    seeds = max((value.seeds for value in values if value), default=1)
    if seeds > 1:
        after += f"; means of {seeds} seeds"
    if isinstance(interval := content.get("interval"), str):
        after += f"; intervals: {text_of(interval)}"
    return (f" ({'; '.join(told)})" if told else "") + after


def table_of_results(found: Results) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows: one for each encoder and part, and the majority class."""
    rows = []
    for encoder, part in found.rows:
        values = ((name, found.value(encoder, part, name)) for name in found.names)
        figures = [figure(value, name != "loss") for name, value in values]
        rows.append([found.titles[encoder], part, *figures])
    for part in PARTS:
        if (share := found.majority(part)) is not None:
            cells = [percent(share) if name == "top1" else NONE for name in found.names]
            rows.append(["majority class", part, *cells])
    return ["encoder", "images", *map(title_of, found.names)], rows


def grid(found: Results) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of learning rates and weight decays."""
    head = ["learning rate", "weight decay", "validation top-1, %", "test top-1, %"]
    best_epochs = any("best_epoch" in entry for entry in found.grid)
    if best_epochs:
        head += ["best epoch", "validation then, %", "test then, %"]
    lines = []
    for entry in found.grid:
        numbers = (number(entry.get(key)) for key in ("lr", "weight_decay"))
        cells = [NONE if cell is None else f"{cell:g}" for cell in numbers]
        cells[0] += " (chosen)" if entry.get("best") is True else ""
        cells += [percent(number(entry.get(f"{part}_top1"))) for part in PARTS]
        if best_epochs:
            epochs = entry.get("best_epoch")
            cells.append(", ".join(map(text_of, epochs)) if isinstance(epochs, list) else NONE)
            cells += [percent(number(entry.get(f"best_epoch_{part}_top1"))) for part in PARTS]
        lines.append(cells)
    return head, lines


def classes(found: Results) -> Iterator[tuple[str, str, str, str]]:
    """Yield each class's name, number of images, accuracy and most frequent confusion."""
    for place, (name, counts) in enumerate(zip(found.classes, found.confusion, strict=True)):
        total = sum(counts)
        wrong = [(n, found.classes[i]) for i, n in enumerate(counts) if i != place and n]
        most = max(wrong, default=(0, NONE), key=lambda pair: pair[0])
        taken = f"{most[1]} ({100 * most[0] / total:.1f}%)" if wrong else NONE
        yield name, f"{total:,.0f}", percent(counts[place] / total if total else None), taken
