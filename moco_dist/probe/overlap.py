"""Images that are in two parts of a data set at once, found by their content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from moco_dist.data.datasets import Images

# Pairs that a sentence names.
_NAMED = 5


@dataclass(frozen=True)
class Overlap:
    """The images of a part that are training images too: their numbers in both, from 0."""

    part: str
    size: int
    pairs: list[tuple[int, int]]

    def sentence(self) -> str:
        """Return what is wrong, in words; nothing if nothing is."""
        if not self.pairs:
            return ""
        named = ", ".join(f"{own} = training {train}" for own, train in self.pairs[:_NAMED])
        more = f" and {len(self.pairs) - _NAMED} more" if len(self.pairs) > _NAMED else ""
        return (
            f"{len(self.pairs)} of {self.size} {self.part} images are training images too, to the "
            f"last pixel ({self.part} {named}{more}): {self.part} accuracy is too high by them; "
            "take them out"
        )


def find(train: Images, images: Images, part: str) -> Overlap:
    """Return which of `images` have the very pixels of a training image."""
    first: dict[bytes, int] = {}
    for number, content in enumerate(_hashes(train)):
        first.setdefault(content, number)
    hashes = _hashes(images)
    pairs = [(number, first[content]) for number, content in enumerate(hashes) if content in first]
    return Overlap(part, len(images), pairs)


def _hashes(images: Images) -> list[bytes]:
    pixels = images.pixels.cpu().contiguous().flatten(1).numpy()
    return [hashlib.blake2b(row.data, digest_size=16).digest() for row in pixels]
