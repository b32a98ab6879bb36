"""The views of a step, made from images in memory or from crops that workers cut from files.

Streamed keys reach their process in two ways with the same result. By exchange, a process decodes
the images of its queries once, cuts both crops and sends the keys' crops where the permutation
assigns them. By plan, it also decodes the images of its own keys.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.profiler import record_function

from moco_dist.config.recipe import ViewsConfig
from moco_dist.data.datasets import AnyImages, Images
from moco_dist.data.streamed_images import Order, StreamedImages
from moco_dist.distributed import comms, peers
from moco_dist.method import views
from moco_dist.method.compilation import compiled
from moco_dist.method.plan import Plan, Step
from moco_dist.randomness import Key

# Steps, and images per worker, to decode ahead.
STEPS_AHEAD = 2
IMAGES_AHEAD = 32

# Samples, int64 (n,), and the number of their view.
Wanted = tuple[Tensor, int]
# Each returns the views of one micro-batch.
Pieces = list[Callable[[], Tensor]]


class Maker:
    """Makes views of uint8 images, or of crops that are `cut` and resized."""

    def __init__(
        self, recipes: Sequence[ViewsConfig], seed: int, dtype: torch.dtype, cut: bool
    ) -> None:
        def making(config: ViewsConfig) -> Callable[..., Tensor]:
            def make(images: Tensor, epoch: Tensor, samples: Tensor, numbers: Tensor) -> Tensor:
                return views.make(images, config, seed, epoch, samples, numbers, dtype, cut)

            return make

        self._make = self._make_step = [making(config) for config in recipes]

    def compile_step(self) -> None:
        """Compile `of_step`, once for each recipe and number of images."""
        self._make_step = [compiled(make) for make in self._make]

    def of_step(self, images: Tensor, wanted: Sequence[Wanted], epoch: Key) -> list[Tensor]:
        """Return the views of each of `wanted`, (n, c, size, size), in one pass for each recipe.

        `images` (n, c, H, W) are those of all of `wanted` in order.
        """
        return self._split(self._make_step, images, wanted, epoch)

    def of_any(self, images: Tensor, wanted: Sequence[Wanted], epoch: Key) -> list[Tensor]:
        """Return what `of_step` does, for any number of images without compiling."""
        return self._split(self._make, images, wanted, epoch)

    @torch.no_grad()  # gradients are on for some passes of a step, and would need another graph
    def _split(
        self,
        makes: list[Callable[..., Tensor]],
        images: Tensor,
        wanted: Sequence[Wanted],
        epoch: Key,
    ) -> list[Tensor]:
        # The epoch is a tensor, because each int would need a graph.
        if not isinstance(epoch, Tensor):
            epoch = torch.full_like(wanted[0][0][0], epoch)
        if len(makes) == 1:
            return _made(makes[0], images, wanted, epoch)
        parts = images.split([len(samples) for samples, _ in wanted])
        views: list[Tensor] = [images] * len(wanted)
        for number, make in enumerate(makes):
            places = [place for place, (_, view) in enumerate(wanted) if view == number]
            if places:
                mine = torch.cat([parts[place] for place in places])
                made = _made(make, mine, [wanted[place] for place in places], epoch)
                for place, each in zip(places, made, strict=True):
                    views[place] = each
        return views


def _made(
    make: Callable[..., Tensor], images: Tensor, wanted: Sequence[Wanted], epoch: Tensor
) -> list[Tensor]:
    samples = torch.cat([samples for samples, _ in wanted])
    numbers = torch.cat([torch.full_like(samples, view) for samples, view in wanted])
    made = make(images, epoch, samples, numbers)
    return list(made.split([len(samples) for samples, _ in wanted]))


class MemorySource:
    """Views of images in memory."""

    def __init__(
        self, images: Images, recipes: Sequence[ViewsConfig], seed: int, dtype: torch.dtype
    ) -> None:
        self.images, self.maker = images, Maker(recipes, seed, dtype, cut=False)
        # Shape of an image that views are made from.
        self.shape = images.pixels.shape[1:]

    def begin(self, step: int) -> None:
        """Prepare a step, which images in memory don't need."""

    def stay(self) -> None:
        """Keep what `begin` prepares where it is."""

    @record_function("views")
    def views(self, wanted: Sequence[Wanted], epoch: Key) -> list[Tensor]:
        """Return the views of each of `wanted`, (n, c, size, size)."""
        return self.maker.of_step(self._pixels(wanted), wanted, epoch)

    def any_views(self, wanted: Sequence[Wanted], epoch: Key) -> list[Tensor]:
        """Return what `views` does, for any number of images without compiling."""
        return self.maker.of_any(self._pixels(wanted), wanted, epoch)

    def _pixels(self, wanted: Sequence[Wanted]) -> Tensor:
        return self.images.pixels[torch.cat([samples for samples, _ in wanted])]


class StreamedSource:
    """Views of the crops of a step, which workers cut some steps ahead."""

    def __init__(
        self,
        images: StreamedImages,
        recipes: Sequence[ViewsConfig],
        dtype: torch.dtype,
        plan: Plan,
        passes: Sequence[tuple[int, int | None]],
        keys_by: Literal["exchange", "plan"],
    ) -> None:
        self.images, self.recipes, self.seed = images, recipes, plan.seed
        self.maker = Maker(recipes, plan.seed, dtype, cut=True)
        self.shape = torch.Size([images.squared.channels, recipes[0].size, recipes[0].size])
        self.device = plan.device
        self.plan = replace(plan, device=torch.device("cpu"))
        self.passes, self.keys_by = passes, keys_by
        self.steps_ahead = max(
            STEPS_AHEAD, -(-IMAGES_AHEAD * images.pool.size * plan.world_size // plan.batch_size)
        )
        self._next = 0
        self._ahead = deque[tuple[Step, list[Order]]]()
        # For each view of the step: its samples, ascending, and their crops.
        self._crops: dict[int, tuple[Tensor, Tensor]] = {}
        self._stays = False

    def begin(self, step: int) -> None:
        """Collect the crops of a step and order those of later ones; a collective.

        Raises DataError for an unreadable image or a dead worker.
        """
        if step != self._next:
            self.forget()
            self._next = step
        while len(self._ahead) <= self.steps_ahead:
            rows = self.plan.step(self._next + len(self._ahead), len(self.passes))
            parts = self._parts(rows)
            self._ahead.append((rows, [self._order(rows.epoch, *part) for part in parts]))
        rows, orders = self._ahead.popleft()
        self._next = step + 1
        peers.me.mark(step, "waiting for data")
        pixels = [order.collect(self.device) for order in orders]
        peers.me.mark(step, "exchanging crops")
        parts = self._parts(rows)
        found = [
            (view, samples, pixels[number][:, place])
            for number, (samples, wanted) in enumerate(parts)
            for place, view in enumerate(wanted)
        ]
        if self.keys_by == "exchange":
            for number, (_, view) in enumerate(self.passes):
                if view is not None:
                    crops = comms.all_to_all_rows(pixels[0][:, view], rows.unshuffle[number])
                    found.append((view, rows.samples[rows.key_rows[number]], crops))
        for view in (0, 1):
            samples = [samples for each, samples, _ in found if each == view]
            if samples:
                ascending = torch.cat(samples).sort()
                known, order = (comms.without_waiting(x, self.device) for x in ascending)
                crops = torch.cat([crops for each, _, crops in found if each == view])
                if self._stays:
                    self._crops[view][0].copy_(known)
                    torch.index_select(crops, 0, order, out=self._crops[view][1])
                else:
                    self._crops[view] = known, crops[order]

    def stay(self) -> None:
        """Keep the crops of later steps in the memory of this one's, which a CUDA graph reads."""
        self._stays = True

    def _parts(self, rows: Step) -> list[tuple[Tensor, tuple[int, ...]]]:
        """Return the samples that this process decodes for a step, and the views of each."""
        mine = rows.samples[rows.query_rows]
        keys = [
            (rows.samples[places], (view,))
            for places, (_, view) in zip(rows.key_rows, self.passes, strict=True)
            if view is not None
        ]
        if keys and self.keys_by == "exchange":
            return [(mine, (0, 1))]
        return [(mine, tuple(sorted(view for view, _ in self.passes))), *keys]

    def _order(self, epoch: Key, samples: Tensor, wanted: tuple[int, ...]) -> Order:
        return self.images.order_crops(self.recipes, self.seed, epoch, samples, wanted)

    def forget(self) -> None:
        """Abandon everything that was ordered ahead."""
        while self._ahead:
            for order in self._ahead.pop()[1]:
                order.abandon()

    @record_function("views")
    def views(self, wanted: Sequence[Wanted], epoch: Key) -> list[Tensor]:
        """Return the views of each of `wanted`, which are queries or keys of the current step."""
        crops = []
        for samples, view in wanted:
            known, of_view = self._crops[view]
            crops.append(of_view[torch.searchsorted(known, samples)])
        return self.maker.of_step(torch.cat(crops), wanted, epoch)

    def any_views(self, wanted: Sequence[Wanted], epoch: Key) -> list[Tensor]:
        """Return what `views` does, for any images, decoding them now."""
        orders = [self._order(epoch, samples, (view,)) for samples, view in wanted]
        crops = [order.collect(self.device)[:, 0] for order in orders]
        return self.maker.of_any(torch.cat(crops), wanted, epoch)


ViewSource = MemorySource | StreamedSource


def views_of(
    rows: Step, passes: Sequence[tuple[int, int | None]], source: ViewSource, micro_batches: int
) -> tuple[list[Pieces], list[Pieces]]:
    """Return functions that return the views of keys and of queries, for each pass over the batch.

    There are none of keys in passes without them. Whole batches are made in one call of the source.
    Micro-batches are made one by one, when they are needed, to save memory.
    """
    keys = zip(rows.key_rows, passes, strict=True)
    wanted = [(rows.samples[places], view) for places, (_, view) in keys if view is not None]
    number = len(wanted)
    wanted += [(rows.samples[rows.query_rows], view) for view, _ in passes]
    found: list[Pieces]
    if micro_batches == 1:
        found = [[partial(_same, made)] for made in source.views(wanted, rows.epoch)]
    else:
        found = [
            [partial(_one, source, (part, view), rows.epoch) for part in each.chunk(micro_batches)]
            for each, view in wanted
        ]
    return found[:number], found[number:]


def _one(source: ViewSource, wanted: Wanted, epoch: Key) -> Tensor:
    return source.views([wanted], epoch)[0]


def _same(views: Tensor) -> Tensor:
    return views


def view_source(
    images: AnyImages,
    recipes: Sequence[ViewsConfig],
    plan: Plan,
    passes: Sequence[tuple[int, int | None]],
    dtype: torch.dtype,
    keys_by: Literal["exchange", "plan"],
) -> ViewSource:
    """Return the source of the views of training images.

    `recipes` are one for all views, or one for each of the two. `passes` are the views of queries
    and of keys in each pass over the batch, None without keys.
    """
    if isinstance(images, Images):
        return MemorySource(images, recipes, plan.seed, dtype)
    return StreamedSource(images, recipes, dtype, plan, passes, keys_by)
