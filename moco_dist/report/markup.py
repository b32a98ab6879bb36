"""HTML of a report: text is escaped, pictures are in the page, nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

from moco_dist.errors import shown

# What stands in a table where there is no figure.
NONE = "\N{EN DASH}"
_VOID = {"img", "link", "meta", "source"}


class Html(str):
    """Text that is HTML already; every other text is escaped where it is put into an element."""

    __slots__ = ()


@dataclass(frozen=True)
class Picture:
    """A PNG for a light page and, unless it suits both, one for a dark page; sizes in CSS pixels.

    `alt` says in words what is seen.
    """

    name: str
    alt: str
    width: int
    height: int
    light: bytes
    dark: bytes | None = None


def element(tag: str, *children: object, **attributes: object) -> Html:
    """Return an element; None among the children or attributes is left out.

    `class_` is the attribute class, and an underscore inside a name is a hyphen.
    """
    names = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Html(f"<{tag}{names}>")
    return Html(f"<{tag}{names}>{join(children)}</{tag}>")


def join(children: Iterable[object]) -> Html:
    """Return the children, one after the other, each escaped unless it is Html."""
    return Html("".join(_escaped(child) for child in children if child is not None))


def _escaped(value: object) -> str:
    if isinstance(value, Html):
        return value
    return html.escape(shown(value, limit=sys.maxsize), quote=True)


def paragraphs(*texts: object) -> Html:
    """Return each text as a paragraph."""
    return join(element("p", text) for text in texts)


def section(title: str, *children: object, level: int = 2) -> Html:
    """Return a section under a heading."""
    return element("section", element(f"h{level}", title), *children)


def table(
    caption: str,
    head: Sequence[object],
    rows: Sequence[Sequence[object]],
    words: Collection[int] = (0,),
) -> Html:
    """Return a table: the first cell names its row; columns but those in `words` are numbers.

    It scrolls by itself where it is wider than the page.
    """

    def kind(place: int) -> str | None:
        return None if place in words else "number"

    header = (element("th", cell, scope="col", class_=kind(i)) for i, cell in enumerate(head))
    body = (
        element(
            "tr",
            *(
                element("td", cell, class_=kind(i)) if i else element("th", cell, scope="row")
                for i, cell in enumerate(row)
            ),
        )
        for row in rows
    )
    content = element(
        "table",
        element("thead", element("tr", *header)) if head else None,
        element("tbody", *body),
        aria_label=caption,
    )
    scrolled = element("div", content, class_="wide", role="region", tabindex=0, aria_label=caption)
    # Above it and not in it, where it would be as wide as the table.
    return join([element("p", caption, class_="caption"), scrolled])


def details(title: str, *children: object) -> Html:
    """Return what is shown on a click."""
    return element("details", element("summary", title), *children)


class Gallery:
    """The pictures of a page, in their order."""

    def __init__(self) -> None:
        self.pictures: list[Picture] = []

    def show(self, picture: Picture, caption: object) -> Html:
        """Add a picture; return it as a figure with its caption; a dark page takes the dark one."""
        self.pictures.append(picture)
        dark = picture.dark and element(
            "source", srcset=_uri(picture.dark), media="(prefers-color-scheme: dark)"
        )
        size = {"width": picture.width, "height": picture.height}
        source: dict[str, object] = {"src": _uri(picture.light), "alt": picture.alt}
        image = element("img", decoding="sync", **source, **size)
        content = element("picture", dark, image), element("figcaption", caption)
        return element("figure", *content, id=picture.name)


def _uri(content: bytes) -> Html:
    return Html(f"data:image/png;base64,{base64.b64encode(content).decode()}")


def page(title: str, *body: object) -> str:
    """Return the whole document, which forbids a browser to load anything but its own pictures."""
    style = resources.files("moco_dist.report").joinpath("report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        # Else a browser asks the server for one.
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Html(style)),
    )
    document = element("html", head, element("body", element("main", *body)), lang="en")
    return f"<!doctype html>\n{document}\n"
