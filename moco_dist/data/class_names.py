"""Classes of labels that are written as numbers or as names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple


class Numbered(NamedTuple):
    """The class of each label, -1 if unknown; without labels, `classes` is empty."""

    labels: list[int]
    classes: tuple[str, ...]
    # Classes of labels that are none of those that were given.
    unknown: tuple[str, ...] = ()


def numbered(labels: Sequence[str | None], classes: tuple[str, ...] | None = None) -> Numbered:
    """Return classes and numbers of labels, None for an unknown one.

    The classes are those that some label has: in order of their size if all are numbers, where 007
    is 7, or else by name. One alone is no class. With `classes`, labels of others have no number.
    """
    numbers = all(_number(label) for label in {*labels, *(classes or ())} if label is not None)
    given = [str(int(label)) if label is not None and numbers else label for label in labels]
    known = {label for label in given if label is not None}
    if len(known) < 2 and classes is None:
        return Numbered([-1] * len(labels), ())
    if classes is None:
        classes = tuple(sorted(known, key=int) if numbers else sorted(known))
    return among(given, classes)


def among(labels: Sequence[str | None], classes: tuple[str, ...]) -> Numbered:
    """Return the numbers of labels that are written as the classes are, None for an unknown one."""
    place = {name: number for number, name in enumerate(classes)}
    others = {label for label in labels if label is not None} - place.keys()
    return Numbered(
        [place.get(x, -1) if x is not None else -1 for x in labels], classes, tuple(sorted(others))
    )


def _number(label: str) -> bool:
    return re.fullmatch(r"[0-9]{1,6}", label) is not None
