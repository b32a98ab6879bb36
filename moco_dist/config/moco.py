"""The `moco` group of the configuration: what a query is compared with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from moco_dist.config.rules import OWN, check, check_momentum, check_positive, given, require
from moco_dist.errors import ConfigError, counted

# The queue that MoCo uses for the 1.28 million images of ImageNet.
LONGEST = 65_536
# Share of the images whose keys are in the queue. With a quarter, an image meets its own key of the
# epoch before in one step of 32: two places in orders of n images lie less than n / 4 apart with a
# probability of (1 / 4)^2 / 2. With as many keys as images it is one step of two.
SHARE = 0.25


@dataclass(frozen=True)
class MocoConfig:
    """What a query is compared with: the mechanisms of figure 2 of the paper, and the loss."""

    # queue: the newest keys of all images; batch: the keys of the same step; bank: a vector for
    # each image, the moving average of its queries.
    negatives: Literal["queue", "batch", "bank"] = "queue"
    # momentum: a second encoder makes the keys (MoCo); gradient: the encoder itself, and learns
    # from them too (SimCLR). A bank has no keys, and needs gradient.
    keys: Literal["momentum", "gradient"] = "momentum"
    # Keys in the queue, independent of the batch size.
    queue_size: int = 4096
    temperature: float = 0.1
    # Share of the key encoder that each step keeps.
    momentum: float = 0.99
    # cosine raises the momentum to 1 at the end of the run.
    momentum_schedule: Literal["constant", "cosine"] = "constant"
    # Use each view once as query and once as key, and add the two losses. With batch and gradient
    # that is the loss of SimCLR, whose negatives are both views.
    symmetric: bool = False
    # Don't count an image's own older keys in the queue as its negatives.
    mask_own_keys: bool = True
    # Images whose vectors in the bank are the negatives of a step; 0 means all.
    bank_draws: int = 4096
    # Share of an image's old vector in the bank that a step keeps.
    bank_momentum: float = 0.5
    # pass: the bank begins with the new encoder's vectors; random: with random ones, as published.
    bank_start: Literal["pass", "random"] = "pass"

    def __post_init__(self) -> None:
        check("moco.", self, queue_size=(1, None), temperature=OWN, momentum=OWN, bank_momentum=OWN)
        check_positive("moco.", self, temperature="0.1 or 0.2 is usual")
        check_momentum("moco.", self.momentum, 0.99)
        check_momentum("moco.", self.bank_momentum, 0.5, "bank_momentum")
        require(
            self.negatives == "batch" or (self.keys == "gradient") == (self.negatives == "bank"),
            "moco.negatives=queue needs moco.keys=momentum, because the keys of other steps can't "
            "have a gradient; use moco.negatives=batch with moco.keys=gradient"
            if self.negatives == "queue"
            else "moco.negatives=bank needs moco.keys=gradient, because the bank's vectors are "
            "those of queries: there is no key encoder",
        )
        require(
            self.negatives != "bank" or not self.symmetric,
            "moco.symmetric=true needs two views of an image, and moco.negatives=bank has one; use "
            "moco.symmetric=false",
        )

    @property
    def passes(self) -> list[tuple[int, int | None]]:
        """The views of the queries and of their keys, if any, for each pass over the batch."""
        if self.negatives == "bank":
            return [(0, None)]
        return [(0, 1), (1, 0)] if self.symmetric and self.keys == "momentum" else [(0, 1)]

    @classmethod
    def stored(cls, found: Mapping[str, Any]) -> MocoConfig | None:
        """Return the group that the leaves of a run's config.yaml hold; None if they are no such.

        A key that an older version did not know has its default.
        """
        own = {key.removeprefix("moco."): value for key, value in found.items()}
        names = {field.name for field in dataclasses.fields(cls)}
        with suppress(ConfigError, TypeError):
            return cls(**{name: value for name, value in own.items() if name in names})
        return None

    @property
    def fills(self) -> bool:
        """Whether the memory is empty at first, so that the loss rises while it fills."""
        return self.negatives == "queue"

    def check_batch(self, batch_size: int) -> None:
        """Raise ConfigError unless the memory can take what a step makes."""
        keys = batch_size * len(self.passes)
        require(
            self.negatives != "queue" or self.queue_size >= keys,
            f"moco.queue_size={self.queue_size} can't hold the {keys} keys of one step; "
            f"use {keys} or more",
        )

    def fitting_queue(self, batch_size: int, images: int) -> int:
        """Return the power of two nearest to a quarter of the images that a step's keys fit into.

        It is 2,048 for 10,000 images and 16,384 for 60,000, and never more than MoCo's 65,536.
        """
        keys = batch_size * len(self.passes)
        nearest = 1 << round(math.log2(max(1, SHARE * images)))
        return max(keys, min(LONGEST, nearest))

    def too_long(self, batch_size: int, images: int) -> str:
        """Return the sentence about a queue of more keys than there are images, or nothing."""
        if not self.fills or self.queue_size < images:
            return ""
        masked = " (masked)" if self.mask_own_keys else " as negatives"
        fits = self.fitting_queue(batch_size, images)
        fix = f"use moco.queue_size={fits} or so" if fits < images else "lower it and batch_size"
        return (
            f"moco.queue_size={self.queue_size} is not below the {images} training images: every "
            f"image meets its own older keys{masked}; {fix}"
        )

    def candidates(self, batch_size: int, images: int) -> int:
        """Return how many vectors a query is compared with, its own positive included.

        That is with a full memory and `images` training images; a loss of log(candidates) is that
        of guessing.
        """
        if self.negatives == "queue":
            return 1 + self.queue_size
        if self.negatives == "bank":
            return 1 + self.bank_draws if self.bank_draws else images
        return 2 * batch_size - 1 if self.keys == "gradient" and self.symmetric else batch_size

    def kept(self, images: int) -> int:
        """Return the number of vectors in the memory."""
        return {"queue": self.queue_size, "batch": 0, "bank": images}[self.negatives]

    def described(self, batch_size: int, images: int) -> str:
        """Return what the negatives of a query are, in words."""
        others = f"{self.candidates(batch_size, images) - 1:,}"
        if self.negatives == "queue":
            steps = -(-self.queue_size // (batch_size * len(self.passes)))
            share = f" ({self.queue_size / images:.1%} of the images)" if images else ""
            full = f"full after {counted(steps, 'step')}; the loss rises until then"
            return f"{others} keys in a queue{share}, {full}"
        if self.negatives == "bank":
            drawn = "draws from" if self.bank_draws else "of"  # with replacement
            return f"{others} {drawn} a bank's {images:,} vectors, one for each image"
        views = "both views" if self.keys == "gradient" and self.symmetric else "the other view"
        learns = "by momentum" if self.keys == "momentum" else "with gradients"
        return f"{others} vectors of the same step, {views} of its other images, {learns}"

    @property
    def unused(self) -> list[str]:
        """Those given keys that have no effect with these negatives and keys, KEY=VALUE."""
        names = (each.name for each in dataclasses.fields(self))
        return given("moco.", self, *(name for name in names if name not in self.settings))

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of the group that have an effect, with their values."""
        names = ["negatives", "keys", "temperature"]
        if self.negatives == "queue":
            names += ["queue_size", "mask_own_keys"]
        if self.negatives == "bank":
            names += ["bank_draws", "bank_momentum", "bank_start"]
        else:
            names += ["symmetric"]
        if self.keys == "momentum":
            names += ["momentum", "momentum_schedule"]
        return {name: getattr(self, name) for name in names}
