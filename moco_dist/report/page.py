"""The HTML page about one run, or about several to compare."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

import moco_dist
from moco_dist.errors import shown
from moco_dist.report import curves, figures, pictures, pretraining, probing, table
from moco_dist.report.figures import Picture
from moco_dist.report.results import results
from moco_dist.runs.partners import labels
from moco_dist.runs.record import CONTROL, Metric, Record, number, read_object, text_of

if TYPE_CHECKING:
    from moco_dist.report.encoder import Look


def build(records: Sequence[Record], looks: Mapping[Path, Look | str]) -> tuple[str, list[Picture]]:
    """Return the page about the runs, and the pictures on it.

    `looks` maps a run's directory to what is drawn of its encoder, or to why that is missing.
    """
    named = list(zip(labels(records), records, strict=True))
    kinds = {kind: [(n, r) for n, r in named if r.kind == kind] for kind in table.KINDS}
    pretrainings, probes = kinds["pretrain"], kinds["probe"]
    prefixes: list[str] = []
    for name, record in named:
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:60] or "run"
        prefix = f"{slug}_" if len(kinds[record.kind]) > 1 else ""
        prefixes.append(f"{slug}-{len(prefixes)}_" if prefix and prefix in prefixes else prefix)
    shown: list[Picture] = []

    def add(picture: Picture) -> str:
        shown.append(picture)
        return picture.name

    text = _template().render(
        add=add,
        # A page with a single pretraining is about that run, even with several probes of it.
        title=named[0][0] if len(pretrainings) == 1 or len(named) == 1 else "Runs compared",
        runs=[
            (name, record, prefix, looks.get(record.directory))
            for (name, record), prefix in zip(named, prefixes, strict=True)
        ],
        probes=probes,
        pretrainings=pretrainings,
        alarms=[(name, line) for name, record in named for line in record.alarms],
        probe_charts=_drawn(curves.of_probes(probes)),
        charts=[
            *_drawn(curves.loss(pretrainings)),
            *_drawn(curves.of_runs((curves.EVALUATION, *curves.PRETRAINING), pretrainings)),
        ],
        health_charts=_drawn(curves.of_runs(curves.HEALTH, pretrainings)),
        without_knn=[name for name, record in pretrainings if not record.figures(Metric.KNN_TOP1)],
        differences=[
            (table.KINDS[kind], [name for name, _ in found], list(table.differences(found)))
            for kind, found in kinds.items()
            if kind and len(found) > 1
        ],
    )
    return text, shown


def _launched(record: Record) -> tuple[str, dict[str, Any]]:
    """Return the command and the environment of a run's last launch."""
    environment = read_object(record.directory / "environment.json")
    arguments = environment.pop("arguments", None)
    if not arguments or not isinstance(arguments, list):
        return "", environment
    processes = number(environment.get("processes")) or 1
    launcher = f"accelerate launch --num_processes {processes:.0f} -m"
    start = f"{launcher if processes > 1 else 'python -m'} moco_dist.{record.kind}"
    return f"{start} {shlex.join(text_of(each) for each in arguments)}", environment


def _drawn(charts: Iterable[curves.Captioned]) -> list[tuple[Picture, str]]:
    return [(figures.chart(chart), caption) for chart, caption in charts]


def _template() -> Template:
    """Return the template of the page, which makes all text printable and escapes it."""
    environment = Environment(
        loader=(loader := PackageLoader("moco_dist.report", ".")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else shown(value, sys.maxsize),
    )
    filters: dict[str, Callable[..., str]] = {
        "count": lambda number: f"{number:,}",
        "text": table.value_text,
        "uri": lambda png: Markup("data:image/png;base64," + base64.b64encode(png).decode()),
    }
    environment.filters |= filters
    style, _, _ = loader.get_source(environment, "report.css")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment.globals |= {
        **{"pictures": pictures, "pretraining": pretraining, "probing": probing, "table": table},
        **{"launched": _launched, "results": results, "CONTROL": CONTROL},
        **{"style": Markup(style), "digest": digest},
        **{"now": table.date(time.time()), "version": moco_dist.__version__},
    }
    return environment.get_template("page.html.jinja")
