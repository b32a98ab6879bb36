"""The names of the parts of a data set, as people give them to folders and tar files."""

from __future__ import annotations

import re
from typing import Literal

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
