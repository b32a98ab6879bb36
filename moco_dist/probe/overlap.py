"""Held-out images that are training images too, found by their pixels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from moco_dist.data.datasets import Images
from moco_dist.errors import shown

# Most pairs that a sentence names.
_NAMED = 5


@dataclass(frozen=True)
class Overlap:
    """The images of a part that are training images too: pairs of their numbers, from 0."""

    part: str
    size: int
    pairs: list[tuple[int, int]]
    # Their files, where they are from files.
    files: list[tuple[str, str]]

    def sentence(self) -> str:
        """Return a sentence about the overlap, empty if there is none."""
        if not self.pairs:
            return ""
        called = [(shown(own, 4096), shown(train, 4096)) for own, train in self.files] or self.pairs
        named = ", ".join(f"{own} = training {train}" for own, train in called[:_NAMED])
        more = f" and {len(self.pairs) - _NAMED} more" if len(self.pairs) > _NAMED else ""
        return (
            f"{len(self.pairs)} of {self.size} {self.part} images are also training images, to the "
            f"last pixel ({self.part} {named}{more}), which inflates {self.part} accuracy; remove "
            "them from one of the two."
        )


def find(train: Images, images: Images, part: str) -> Overlap:
    """Return which of `images` have exactly the pixels of a training image."""
    first: dict[bytes, int] = {}
    for number, content in enumerate(_hashes(train)):
        first.setdefault(content, number)
    hashes = _hashes(images)
    pairs = [(number, first[content]) for number, content in enumerate(hashes) if content in first]
    files = [(images.file(own), train.file(one)) for own, one in pairs] if images.catalogue else []
    return Overlap(part, len(images), pairs, files)


def _hashes(images: Images) -> list[bytes]:
    pixels = images.pixels.cpu().contiguous().flatten(1).numpy()
    return [hashlib.blake2b(row.data, digest_size=16).digest() for row in pixels]
