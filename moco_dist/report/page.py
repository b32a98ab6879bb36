"""The page of a report: what is known of one run, or of several side by side, on one HTML page."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import moco_dist
from moco_dist.report import curves as report_curves
from moco_dist.report import figures, pretraining, probing
from moco_dist.report.curves import Course
from moco_dist.report.figures import Chart
from moco_dist.report.markup import (
    NONE,
    Gallery,
    Html,
    Picture,
    details,
    element,
    page,
    paragraphs,
    section,
    table,
)
from moco_dist.report.overview import KINDS, date, overview, standing
from moco_dist.runs.partners import labels
from moco_dist.runs.record import Record, number, read_object, text_of

if TYPE_CHECKING:
    from moco_dist.report.encoder import Look

# Keys that say where a run is, not what it is.
PLACES = ("name", "output", "encoder", "data.root", "data.cache")
Looks = Mapping[Path, "Look | str"]


def build(records: Sequence[Record], looks: Looks) -> tuple[str, list[Picture]]:
    """Return the page about the runs, and the pictures on it.

    `looks` has what each pretraining's encoder makes of images, or why that can't be shown, under
    the run's directory; one that isn't there was not asked for.
    """
    gallery = Gallery()
    named = list(zip(labels(records), records, strict=True))
    kinds = {kind: [(n, r) for n, r in named if r.kind == kind] for kind in ("pretrain", "probe")}
    # The page of one run is the report of that run; what belongs to it is on it too.
    one = len(kinds["pretrain"]) == 1 or len(named) == 1
    title = named[0][0] if one else "Runs compared"
    sections = [
        *overview(named),
        *_probe_curves(kinds["probe"], gallery),
        *_pretrain_curves(kinds["pretrain"], gallery),
    ]
    slugs = _slugs([name for name, _ in named])
    for (name, record), slug in zip(named, slugs, strict=True):
        alone = len(kinds.get(record.kind, ())) == 1
        sections.append(_own_section(name, record, looks, gallery, "" if alone else f"{slug}_"))
    sections += [each for kind in kinds if (each := _differences(kinds[kind]))]
    body = page(
        f"{title}: moco_dist report",
        element("h1", title),
        *(standing(name, record) for name, record in named),
        *sections,
        _footer(),
    )
    return body, gallery.pictures


def _figures(charts: Iterator[tuple[Chart, str]], gallery: Gallery) -> Html | None:
    shown = [gallery.show(figures.chart(chart), caption) for chart, caption in charts]
    return element("div", *shown, class_="figures") if shown else None


def _probe_curves(probes: Sequence[tuple[str, Record]], gallery: Gallery) -> Iterator[Html]:
    if not probes:
        return
    curves = _figures(report_curves.of_probes(probes), gallery)
    yield section(
        "Probe over its epochs", curves or paragraphs("No epoch of a probe is complete yet.")
    )


def _pretrain_curves(runs: Sequence[tuple[str, Record]], gallery: Gallery) -> Iterator[Html]:
    if not runs:
        return

    def charts(
        courses: Sequence[Course],
    ) -> Iterator[tuple[Chart, str]]:
        for course in courses:
            if chart := report_curves.of_runs(course, runs):
                yield chart, course.caption

    def first() -> Iterator[tuple[Chart, str]]:
        if found := report_curves.loss(runs):
            yield found
        yield from charts([report_curves.EVALUATION, *report_curves.PRETRAINING])

    remarks = []
    if without := [name for name, record in runs if not record.figures("knn/top1")]:
        remarks.append(
            f"No kNN accuracy of {', '.join(without)}: it needs labelled images and "
            "knn.every_epochs, or comes with the first evaluation."
        )
    yield section(
        "Pretraining",
        _figures(first(), gallery) or paragraphs("No step has been noted yet."),
        *(pretraining.note(text) for text in remarks),
    )
    health = _figures(charts(report_curves.HEALTH), gallery)
    yield section(
        "Health, without labels",
        health or paragraphs("Not measured (tracking.health_every_steps), or not yet."),
    )


def _own_section(name: str, record: Record, looks: Looks, gallery: Gallery, prefix: str) -> Html:
    """Return the section of one run: pictures or results, then configuration and command."""
    if record.kind == "pretrain":
        title = f"What {name} sees"
        shown = pretraining.parts(record, looks.get(record.directory), gallery, prefix)
    elif record.kind == "probe":
        title, shown = f"Results of {name}", probing.parts(record, gallery, prefix)
    else:
        title, shown = name, iter([pretraining.note("No config.yaml tells what this is.")])
    return section(title, *shown, *_background(name, record))


def _background(name: str, record: Record) -> Iterator[Html]:
    environment = read_object(record.directory / "environment.json")
    if (arguments := environment.pop("arguments", None)) and isinstance(arguments, list):
        processes = number(environment.get("processes")) or 1
        module = f"moco_dist.{record.kind}"
        start = (
            f"accelerate launch --num_processes {processes:.0f} -m {module}"
            if processes > 1
            else f"python -m {module}"
        )
        command = shlex.join(text_of(each) for each in arguments)
        told = paragraphs(
            "With these arguments the run was started last, by this command or one like it:"
        )
        yield details(f"Command of {name}", told, element("pre", f"{start} {command}"))
    if record.config:
        rows = [(key, text_of(value)) for key, value in record.config.items()]
        yield details(
            f"Configuration of {name}",
            table("Every key, also where it is the default.", ("key", "value"), rows, (0, 1)),
        )
    if environment:
        rows = [(key, text_of(NONE if v is None else v)) for key, v in environment.items()]
        yield details(
            f"Environment of {name}",
            table("What the last start ran on.", ("", "value"), rows, (0, 1)),
        )
    saved = record.checkpoints
    if saved.steps or saved.damaged:
        kept = ", ".join([f"step {step:,}" for step in saved.steps] + saved.damaged)
        yield details(f"Checkpoints of {name}", paragraphs(kept))


def _differences(runs: Sequence[tuple[str, Record]]) -> Html | None:
    """Return a table of the keys whose values differ between runs of one kind."""
    if len(runs) < 2:
        return None
    keys = dict.fromkeys(key for _, record in runs for key in record.config)
    rows = [
        [key, *(text_of(record.config.get(key, NONE)) for _, record in runs)]
        for key in keys
        if key not in PLACES and len({str(record.config.get(key)) for _, record in runs}) > 1
    ]
    kind = KINDS[runs[0][1].kind]
    if not rows:
        return section(f"Configurations of the {kind} runs", paragraphs("They are equal."))
    head = ("key", *(name for name, _ in runs))
    caption = "Keys whose values differ, but for names and places."
    return section(
        f"What differs between the {kind} runs", table(caption, head, rows, range(len(head)))
    )


def _slugs(names: Sequence[str]) -> list[str]:
    """Return a name for the files of each run, all different."""
    found: list[str] = []
    for name in names:
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:60] or "run"
        found.append(slug if slug not in found else f"{slug}-{len(found)}")
    return found


def _footer() -> Html:
    made = f"Made by moco_dist {moco_dist.__version__} on {date(time.time())}"
    told = f"{made}, from the files of the runs. The page loads nothing and can be sent as it is."
    return element("footer", element("p", told, class_="quiet"))
