"""How the runs of a report stand, their key figures, a table of them, and their alarms."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from moco_dist.report import curves
from moco_dist.report.markup import NONE, Html, element, section, table
from moco_dist.report.probing import percent, shown
from moco_dist.report.results import TITLES, Results, results
from moco_dist.runs.record import CONTROL, Record, number, text_of
from moco_dist.tracking.progress import RunProgress, duration
from moco_dist.tracking.terminal import loss

KINDS = {"pretrain": "pretraining", "probe": "probe", "": "unknown"}


def standing(name: str, record: Record) -> Html:
    """Return in words how a run stands."""
    kind, total, step = KINDS[record.kind], record.total_steps, record.step
    what = f"{kind} {name}" if record.kind else name
    place = f"step {step:,} of {total:,}" if total else f"step {step:,}"
    share = f" ({100 * step / total:.0f} %)" if total else ""
    warn = True
    if record.state == "done":
        return element("p", f"The {what} is done: {place}{_last_moment(record)}.", class_="quiet")
    if record.state == "running":
        left = _seconds_left(record)
        rest = f", about {duration(left)} left by then" if left else ""
        text = (
            f"The {what} is still going on: {place}{share}{_last_moment(record)}{rest}. What is "
            "shown here is up to there; the same command makes the page again."
        )
        warn = False
    elif record.state == "starting":
        text, warn = f"The {what} is just starting; what is shown is of its starts before.", False
    elif record.state == "gone":
        text = f"The {what} was killed or lost its machine after {place}: {record.reason}."
    elif record.state in ("stopped", "interrupted"):
        text = f"The {what} was stopped at {place}{share}: {record.reason or 'no reason was noted'}"
    elif record.state == "empty":
        text, warn = f"{name}: nothing is there yet.", False
    elif record.state == "unknown":
        text = f"The {what} has no status.json that tells how it stands; its files end at {place}."
    else:
        reason = record.reason or "no reason was noted"
        text = f"The {what} ended with an error ({record.state}) at {place}: {reason}"
    return element("p", text, class_="note warn" if warn else "note")


def _last_moment(record: Record) -> str:
    times = [moment for line in record.lines[-1:] if (moment := number(line.get("time")))]
    return f", {date(times[0])}" if times else ""


def date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):
        return "at an unknown time"


def _seconds_left(record: Record) -> float | None:
    every = number(record.config.get("knn.every_epochs")) or 0
    progress = RunProgress(record.total_steps, knn_every=int(min(every, 1e6)))
    for line in record.lines:
        progress.add(line)
    return progress.seconds_left()


def overview(named: Sequence[tuple[str, Record]]) -> Iterator[Html]:
    """Yield the key figures of one pretraining and its probe, or a table of all runs; alarms."""
    probes = [(name, found) for name, r in named if (found := results(r))]
    pretrainings = [record for _, record in named if record.kind == "pretrain"]
    for name, found in probes:
        sentence, better = found.verdict
        if sentence:
            about = f"{name}: " if len(probes) > 1 else ""
            yield element("p", about + sentence, class_="note" if better else "note warn")
        for fault in found.faults:
            yield element("p", f"{name}: {fault}", class_="note warn")
    if len(pretrainings) <= 1 and len([r for _, r in named if r.kind == "probe"]) <= 1:
        cells = [_key(*key) for key in _key_figures(pretrainings, [each for _, each in probes])]
        if cells:
            yield element("dl", *cells, class_="key")
    if len(named) > 1:
        yield section("Runs", _run_table(named))
    alarms = [
        element(
            "li",
            element("strong", text_of(line["alarm"])),
            f" ({name}, step {line['step']:,}): {text_of(line.get('text'))}",
        )
        for name, record in named
        for line in record.alarms
    ]
    if alarms:
        yield section(
            "Alarms",
            element("div", element("ul", *alarms), class_="note warn"),
        )


def _key(title: str, value: str, beside: str) -> Html:
    shown = element("dd", value, class_="value"), element("dd", beside, class_="beside")
    return element("div", element("dt", title), *shown)


def _key_figures(
    pretrainings: Sequence[Record], probes: Sequence[Results]
) -> Iterator[tuple[str, str, str]]:
    for found in probes:
        for name in [name for name in found.names if name.startswith("top")][:2]:
            trained, control = (found.value(e, found.part, name) for e in ("probe", "control"))
            if trained is None:
                continue
            beside = [f"{found.part} images"]
            if trained.low is not None and trained.high is not None:
                beside.append(f"95 % interval {percent(trained.low)} to {percent(trained.high)}")
            beside += [f"{found.titles[CONTROL]} {percent(control.mean)} %"] if control else []
            majority = found.majority(found.part) if name == "top1" else None
            beside += [f"majority class {percent(majority)} %"] if majority is not None else []
            title = f"Linear probe, {name.replace('top', 'top-')}"
            yield title, f"{percent(trained.mean)} %", ", ".join(beside)
    for record in pretrainings:
        if best := record.best_knn:
            x, y = curves.epochs(record, "knn/top1")
            before = f", {percent(y[0])} % before the first step" if x[0] == 0 else ""
            last = record.last("knn/top1")
            yield (
                "kNN top-1, best",
                f"{percent(best[1])} %",
                (f"validation images, at step {best[0]:,}; last {percent(last)} %{before}"),
            )
        if (value := record.last("train/loss")) is not None:
            yield "Loss, last", loss(value), f"after {record.step:,} steps"


def _run_table(named: Sequence[tuple[str, Record]]) -> Html:
    head = ("run", "kind", "state", "step", "loss", "kNN, best %")
    rows: list[list[str]] = []
    for name, record in named:
        value, best, found = record.last("train/loss"), record.best_knn, results(record)
        figures = [found.value(e, found.part, "top1") if found else None for e in TITLES]
        rows.append(
            [name, KINDS[record.kind], record.state]
            + [f"{record.step:,} of {record.total_steps:,}" if record.total_steps else NONE]
            + [NONE if value is None else loss(value)]
            + [percent(best and best[1])]
            + [shown(figure) for figure in figures]
        )
    caption = (
        "Top-1 of probes, and of the random encoder beside each, is on the test images; where "
        "there are none, on the validation images."
    )
    return table(caption, (*head, "probe, %", "random, %"), rows, (0, 1, 2))
