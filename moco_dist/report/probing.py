"""What a report says of a probe: verdict, results, the grid of rates, confusions."""

from __future__ import annotations

from collections.abc import Iterator

from moco_dist.report import pictures
from moco_dist.report.markup import NONE, Gallery, Html, details, element, table
from moco_dist.report.results import Results, Value, results
from moco_dist.runs.record import CONTROL, PARTS, TRAINED, Record, number, text_of


def percent(share: float | None) -> str:
    """Return a share as a percentage without its sign, a dash for none."""
    return NONE if share is None else f"{100 * share:.2f}"


def shown(value: Value | None, is_share: bool = True) -> str:
    """Return a figure, with the ends of its interval where it has one."""
    if value is None:
        return NONE
    low, high = value.low, value.high
    if low is None or high is None:
        return percent(value.mean) if is_share else f"{value.mean:.4f}"
    if is_share:
        return f"{percent(value.mean)} ({percent(low)} to {percent(high)})"
    return f"{value.mean:.4f} ({low:.4f} to {high:.4f})"


def title_of(name: str) -> str:
    """Return the title of a column of figures."""
    if name == "loss":
        return "loss"
    words = name.replace("knn_top", "kNN top-").replace("top", "top-").replace("top--", "top-")
    return f"{words}, %"


def parts(record: Record, gallery: Gallery, prefix: str) -> Iterator[Html]:
    """Yield what is shown of a probe; the names of its pictures begin with `prefix`."""
    found = results(record)
    if found is None:
        yield element("p", "No results yet: they come with the probe's last step.", class_="note")
        return
    yield from _results(found)
    yield from _grid(found)
    yield from _confusion(found, gallery, prefix)


def _results(found: Results) -> Iterator[Html]:
    names = found.names
    rows: list[list[str]] = [
        [found.titles[encoder], part]
        + [shown(found.value(encoder, part, name), name != "loss") for name in names]
        for encoder, part in found.rows
    ]
    for part in PARTS:
        if (share := found.majority(part)) is not None:
            rows.append(
                ["majority class", part] + [percent(share) if n == "top1" else NONE for n in names]
            )
    content = found.content
    counts = [found.value(TRAINED, part, "top1") for part in PARTS]
    seeds = max((value.seeds for value in counts if value), default=1)
    facts = []
    if protocol := content.get("protocol"):
        with_features = content.get("features")
        facts.append(f"protocol {text_of(protocol)}, {text_of(with_features or '?')} features")
    if (images := number(content.get("train_images"))) is not None:
        facts.append(f"{images:,.0f} training images")
    if (fraction := number(content.get("label_fraction"))) is not None and fraction < 1:
        facts.append(f"{100 * fraction:g} % of the labels")
    means = f"means of {seeds} seeds; " if seeds > 1 else ""
    kind = content.get("interval")
    interval = f"; {means}intervals: {text_of(kind)}" if isinstance(kind, str) else ""
    interval = interval or (f"; {means}with intervals" if seeds > 1 else "")
    told = f" ({'; '.join(facts)})" if facts else ""
    yield table(
        f"After the last epoch{told}{interval}.",
        ("encoder", "images", *map(title_of, names)),
        rows,
        (0, 1),
    )
    if found.value(CONTROL, found.part, "top1") is None:
        yield element(
            "p",
            "This probe has no random encoder beside it (control=false), so nothing here says how "
            "much of its accuracy the architecture alone gives.",
            class_="note",
        )


def _grid(found: Results) -> Iterator[Html]:
    if len(found.grid) < 2:
        return
    rows = []
    best_epochs = any("best_epoch" in entry for entry in found.grid)
    for entry in found.grid:
        rate, decay = (number(entry.get(key)) for key in ("lr", "weight_decay"))
        cells = [NONE if cell is None else f"{cell:g}" for cell in (rate, decay)]
        cells[0] += " (chosen)" if entry.get("best") is True else ""
        cells += [percent(number(entry.get(f"{part}_top1"))) for part in PARTS]
        if best_epochs:
            epochs = entry.get("best_epoch")
            cells.append(", ".join(map(text_of, epochs)) if isinstance(epochs, list) else NONE)
            cells += [percent(number(entry.get(f"best_epoch_{part}_top1"))) for part in PARTS]
        rows.append(cells)
    head = ["learning rate", "weight decay", "validation top-1, %", "test top-1, %"]
    caption = "Learning rates and weight decays tried; the one chosen is the best on validation."
    if best_epochs:
        head += ["best epoch", "validation then, %", "test then, %"]
        caption += " Beside the last epoch's, the figures after the best epoch on validation."
    content = table(caption, head, rows, (0,))
    yield content if len(rows) <= 12 else details(f"All {len(rows)} combinations", content)


def _confusion(found: Results, gallery: Gallery, prefix: str) -> Iterator[Html]:
    if not found.confusion:
        return
    part, classes, counts = found.confusion_part, found.classes, found.confusion
    title = f"Confusion, {part} images"
    picture = pictures.matrix(f"{prefix}confusion", title, counts, classes)
    caption = (
        "Of the images of each true class (row), the percentage taken for each class (column). "
        "A good classifier has a dark diagonal and nothing beside it."
    )
    yield gallery.show(picture, caption)
    rows = []
    for number_of, (name, row) in enumerate(zip(classes, counts, strict=True)):
        total, right = sum(row), row[number_of]
        others = [(n, classes[i]) for i, n in enumerate(row) if i != number_of and n]
        most = max(others, default=(0, NONE), key=lambda pair: pair[0])
        taken = f"{most[1]} ({100 * most[0] / total:.1f} %)" if others else NONE
        share = percent(right / total) if total else NONE
        rows.append([name, f"{total:,.0f}", share, taken])
    head = ("class", "images", "right, %", "most often taken for")
    caption = f"Accuracy of each class on the {part} images."
    yield details("Accuracy of each class", table(caption, head, rows, (0, 3)))
