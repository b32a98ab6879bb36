"""The labelled training images of a probe that uses only a fraction of the labels."""

from __future__ import annotations

import torch
from torch import Tensor

from moco_dist.data.datasets import AnyImages
from moco_dist.errors import ConfigError, DataError
from moco_dist.randomness import Purpose, permutation


def require_classes(train: AnyImages) -> None:
    """Raise DataError unless each class has training images and each label is a class."""
    counts, classes = train.labels.bincount(minlength=len(train.classes)).tolist(), train.classes
    if len(counts) > len(classes):
        raise DataError(
            f"the training images have labels up to {len(counts) - 1}, but there are "
            f"{len(classes)} classes, 0 to {len(classes) - 1}; correct the labels"
        )
    absent = [f"'{name}'" for name, count in zip(classes, counts, strict=True) if count == 0]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        raise DataError(
            f"{len(absent)} of the {len(classes)} classes have no training images: "
            f"{', '.join(absent[:5])}{more}; raise data.limit, lower data.validation, or remove "
            "the class"
        )


def draw(train: AnyImages, fraction: float, seed: int) -> Tensor:
    """Return the rows of `train` whose labels are used, int64 (n,), ascending.

    A fraction below 1 draws equally many of each class by `seed`. Raises ConfigError if that is
    none, and DataError if a class has too few.
    """
    if fraction == 1:
        return torch.arange(len(train))
    classes = len(train.classes)
    each = round(fraction * len(train) / classes)
    if each == 0:
        raise ConfigError(
            f"label_fraction={fraction} of {len(train)} images is less than one for each of the "
            f"{classes} classes; use {-(-1000 * classes // len(train)) / 1000} or more"
        )
    order = permutation(len(train), seed, Purpose.LABELS)
    labels = train.labels.cpu()[order]
    chosen = []
    for number, name in enumerate(train.classes):
        rows = order[labels == number][:each]
        if len(rows) < each:
            raise DataError(
                f"label_fraction={fraction} needs {each} images of each class, but class '{name}' "
                f"has {len(rows)} training images; use {len(rows) * classes / len(train):.3g} or "
                "less, or label_fraction=1 for all images"
            )
        chosen.append(rows)
    return torch.cat(chosen).sort().values
