"""The page of a report, filled from what is known of one run, or of several to compare."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

import moco_dist
from moco_dist.errors import shown
from moco_dist.report import curves, figures, overview, pictures, pretraining, probing
from moco_dist.report.figures import Chart, Picture
from moco_dist.report.results import CONTROL, results
from moco_dist.runs.partners import labels
from moco_dist.runs.record import Record, number, read_object, text_of

if TYPE_CHECKING:
    from moco_dist.report.encoder import Look

# Keys that say where a run is, not what it is.
PLACES = ("name", "output", "encoder", "data.root", "data.cache")
# A longer table of learning rates is folded.
FOLDED = 12


class Gallery:
    """The pictures of a page, in their order."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []

    def add(self, picture: Picture) -> str:
        """Note that the page shows a picture; return its name."""
        self.pictures.append(picture)
        return picture.name


def build(records: Sequence[Record], looks: Mapping[Path, Look | str]) -> tuple[str, list[Picture]]:
    """Return the page about the runs, and the pictures on it.

    `looks` holds, under a run's directory, what its encoder makes of images or why that can't be
    shown; a run without an entry was not asked.
    """
    named = list(zip(labels(records), records, strict=True))
    kinds = {kind: [(n, r) for n, r in named if r.kind == kind] for kind in overview.KINDS}
    runs = [
        _run(name, record, looks.get(record.directory), f"{slug}_" if several else "")
        for (name, record), slug in zip(named, _slugs([name for name, _ in named]), strict=True)
        for several in [len(kinds[record.kind]) > 1]
    ]
    pretrainings, probes = kinds["pretrain"], kinds["probe"]
    gallery = Gallery()
    # The page of a pretraining is the report of that run, with the probes that belong to it.
    title = named[0][0] if len(pretrainings) == 1 or len(named) == 1 else "Runs compared"
    text = _template(gallery).render(
        title=title,
        runs=runs,
        probes=probes,
        pretrainings=pretrainings,
        one_of_each=max(len(pretrainings), len(probes)) <= 1,
        alarms=[(name, line) for name, record in named for line in record.alarms],
        probe_charts=_drawn(curves.of_probes(probes)),
        charts=_drawn(_pretraining_charts(pretrainings)),
        health_charts=_drawn(_charts(curves.HEALTH, pretrainings)),
        without_knn=[name for name, record in pretrainings if not record.figures("knn/top1")],
        differences=[
            (overview.KINDS[kind], [name for name, _ in found], list(_differences(found)))
            for kind, found in kinds.items()
            if kind and len(found) > 1
        ],
    )
    return text, gallery.pictures


def _run(name: str, record: Record, looked: Look | str | None, prefix: str) -> overview.Run:
    environment = read_object(record.directory / "environment.json")
    arguments, command = environment.pop("arguments", None), ""
    if arguments and isinstance(arguments, list):
        processes = number(environment.get("processes")) or 1
        launcher = f"accelerate launch --num_processes {processes:.0f} -m"
        start = f"{launcher if processes > 1 else 'python -m'} moco_dist.{record.kind}"
        command = f"{start} {shlex.join(text_of(each) for each in arguments)}"
    look, why_not = (None, looked) if isinstance(looked, str) else (looked, "")
    return overview.Run(name, record, prefix, results(record), look, why_not, command, environment)


def _pretraining_charts(runs: Sequence[tuple[str, Record]]) -> Iterator[tuple[Chart, str]]:
    if found := curves.loss(runs):
        yield found
    yield from _charts((curves.EVALUATION, *curves.PRETRAINING), runs)


def _charts(
    courses: Sequence[curves.Course], runs: Sequence[tuple[str, Record]]
) -> Iterator[tuple[Chart, str]]:
    for course in courses:
        if chart := curves.of_runs(course, runs):
            yield chart, course.caption


def _drawn(charts: Iterator[tuple[Chart, str]]) -> list[tuple[Picture, str]]:
    return [(figures.chart(chart), caption) for chart, caption in charts]


def _differences(runs: Sequence[tuple[str, Record]]) -> Iterator[list[str]]:
    """Yield each key whose values differ between the runs, and its values."""
    for key in dict.fromkeys(key for _, record in runs for key in record.config):
        values = [_text(record.config.get(key)) for _, record in runs]
        if key not in PLACES and len(set(values)) > 1:
            yield [key, *values]


def _text(value: object) -> str:
    return text_of(probing.NONE if value is None else value)


def _slugs(names: Sequence[str]) -> list[str]:
    """Return a name for the files of each run; all are different."""
    found: list[str] = []
    for name in names:
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:60] or "run"
        found.append(slug if slug not in found else f"{slug}-{len(found)}")
    return found


def _template(gallery: Gallery) -> Template:
    """Return the template of the page. All text is escaped and made printable."""
    environment = Environment(
        loader=PackageLoader("moco_dist.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else _printable(value),
    )
    filters: dict[str, Callable[..., str]] = {
        "count": lambda number: f"{number:,}",
        "text": _text,
        "uri": lambda png: Markup("data:image/png;base64," + base64.b64encode(png).decode()),
    }
    environment.filters |= filters
    style = environment.loader.get_source(environment, "report.css")[0]  # type: ignore[union-attr]
    environment.globals |= {
        "gallery": gallery,
        "overview": overview,
        "pictures": pictures,
        "pretraining": pretraining,
        "probing": probing,
        "style": Markup(style),
        "digest": base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        "now": overview.date(time.time()),
        "version": moco_dist.__version__,
        "CONTROL": CONTROL,
        "FOLDED": FOLDED,
    }
    return environment.get_template("page.html.jinja")


def _printable(value: object) -> str:
    return shown(value, limit=sys.maxsize)
