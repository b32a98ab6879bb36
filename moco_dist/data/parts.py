"""The names of the parts of a data set, as people give them to folders and tar files."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Literal

from moco_dist.errors import ConfigError, shown

Part = Literal["train", "validation", "test"]

# Words for the parts, in lower case.
WORDS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    "trainset": "train",
    "trainval": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "valset": "validation",
    "test": "test",
    "testing": "test",
    "testset": "test",
    "eval": "test",
    "evaluation": "test",
}
# Words that may stand next to these, as in test_set, Training Images and val2017.
NEUTRAL = {"set", "data", "dataset", "split", "image", "images", "img", "imgs"}


def part_of(name: str, anywhere: bool = False) -> Part | None:
    """Return the part that a folder is by its name, whatever its case; None for any other name.

    The name is one of WORDS, alone or with digits and words of NEUTRAL. With `anywhere`, as for tar
    files, any other words may stand there as well: imagenet-val-000000.tar. Of several parts the
    one that is not for training counts, so that no test image is trained on.
    """
    words = re.findall(r"[^\W\d_]+", name.casefold())
    found = [WORDS[word] for word in words if word in WORDS]
    if not found or not (anywhere or all(word in WORDS or word in NEUTRAL for word in words)):
        return None
    return next((part for part in found if part != "train"), "train")


def require_one(key: str, wanted: str, kind: str, root: object, names: Collection[str]) -> None:
    """Raise ConfigError if a key of `data` names a split, column or array that is not there."""
    if wanted and wanted not in names:
        raise ConfigError(
            f"data.{key}={shown(wanted)}: no such {kind} in data.root={shown(root)}, which has "
            f"{', '.join(map(shown, names))}; give one of these"
        )


def of_splits(names: Sequence[str], wanted: str, root: str) -> tuple[str, list[str], list[str]]:
    """Return which of the splits of a set is for training, those to test on, and the others.

    Of those to test on, the first is to be preferred. Raises ConfigError unless one for training is
    `wanted`, named so, or the only one.
    """
    require_one("split", wanted, "split", root, names)
    trains = [name for name in names if part_of(name) == "train"]
    first = [wanted] * bool(wanted) or [n for n in trains if n == "train"] or trains or list(names)
    if len(first) != 1:
        raise ConfigError(
            f"data.root={shown(root)}: no split is called train, of "
            f"{', '.join(map(shown, names))}; choose the one to train on by "
            f"data.split={shown(first[0])}"
        )
    tests = [name for name in names if part_of(name) in ("test", "validation") and name != first[0]]
    tests.sort(key=lambda name: part_of(name) != "test")
    return first[0], tests, [name for name in names if name not in (first[0], *tests)]
