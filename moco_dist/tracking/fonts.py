"""Names in pictures: which font can draw them, and what stands there if none can."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from fontTools.ttLib import TTFont

from moco_dist.errors import shown

# Where systems and people keep fonts, besides the one that comes with matplotlib.
FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts"),
)
# Fonts that are looked into for the letters of another script; reading one takes milliseconds.
MOST = 300
NOTE = "#N: name N in order, as no font here\nhas its letters (install Noto Sans CJK)"


class Drawn(NamedTuple):
    """A text for a picture, and the file of the font that has its letters."""

    text: str
    font: Path


def drawable(names: Iterable[str]) -> tuple[list[Drawn], str]:
    """Return each name as it can be drawn, as #N (from 1) if no font can, and a note if so."""
    found: list[Drawn] = []
    missing = False
    for place, name in enumerate(names, 1):
        printable = shown(name)
        font = _font(frozenset(printable))
        missing |= font is None
        found.append(Drawn(f"#{place}", plain()) if font is None else Drawn(printable, font))
    return found, NOTE if missing else ""


@lru_cache
def plain() -> Path:
    """Return the file of DejaVu Sans, which has the letters of Latin, Greek and Cyrillic."""
    package = find_spec("matplotlib")
    assert package, "a dependency"
    assert package.origin, "a package with files"
    return Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"


@lru_cache(maxsize=4096)
def _font(letters: frozenset[str]) -> Path | None:
    """Return the first font that has the letters that the plain one lacks, None without one."""
    others = set(map(ord, letters)) - _codes(plain())
    if not others:
        return plain()
    return next((font for font in _installed() if others <= _codes(font)), None)


@lru_cache(maxsize=1)
def _installed() -> Sequence[Path]:
    own = Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share", "fonts")
    files = {
        file
        for folder in (*FOLDERS, own)
        # A user without a name, as in containers, has no home: Path.expanduser would end there.
        for file in Path(os.path.expanduser(folder)).rglob("*")
        if file.suffix.lower() in (".ttf", ".otf", ".ttc")
    }
    # Regular before bold; those made for many scripts have such names.
    many = ("noto", "cjk", "unicode", "droid", "han", "wqy", "gothic", "msyh", "pingfang")
    order = sorted(
        files,
        key=lambda file: (
            not any(word in file.name.lower() for word in many),
            "regular" not in file.name.lower(),
            str(file),
        ),
    )
    return order[:MOST]


@lru_cache(maxsize=MOST + 1)
def _codes(font: Path) -> frozenset[int]:
    """Return the letters that a font has, by number; none if it can't be read."""
    try:
        # The library leaves the file of a font that it can't read open.
        with font.open("rb") as file, TTFont(file, fontNumber=0, lazy=True) as opened:
            return frozenset(opened.getBestCmap() or {})
    except Exception:  # of many kinds, for a file that is no font
        return frozenset()
