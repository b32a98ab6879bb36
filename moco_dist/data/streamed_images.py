"""Images that stay on disk and are decoded by workers whenever they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from moco_dist.config.recipe import ViewsConfig
from moco_dist.data import worker_pool
from moco_dist.data.image_file import Recipe
from moco_dist.data.image_index import ImageIndex
from moco_dist.data.set_aside import Aside
from moco_dist.data.worker_pool import Ticket, WorkerPool
from moco_dist.distributed import faults
from moco_dist.errors import DataError, shown
from moco_dist.method import views
from moco_dist.randomness import Key, Purpose, uniform

# Draws of an image that stands in for another, before all are tried in order.
ATTEMPTS = 64


class Draw(NamedTuple):
    """What the images that stand in for unreadable ones depend on, besides the image itself."""

    seed: int = 0
    epoch: int = 0


FIXED = Draw()


@dataclass(frozen=True)
class Order:
    """Requests for images that are on their way."""

    images: StreamedImages
    # The images that were ordered, and the rows of the catalogue that are read for them.
    positions: Tensor
    reads: list[int]
    recipe: Recipe
    numbers: Tensor | None
    draw: Draw
    tickets: list[Ticket]

    def collect(self, device: torch.device) -> Tensor:
        """Wait; return the pixels, uint8 (images, views, channels, size, size), on `device`.

        Raises DataError, or leaves it to `faults.agree`, for what can't be read.
        """
        shape = len(self.positions), *self.recipe.shape
        pixels = torch.zeros(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        first, missing, pool = 0, list[int](), self.images.pool
        while self.tickets:
            ticket = self.tickets[0]
            try:
                pixels[first : first + ticket.shape[0]] = pool.fetch(ticket)
            except DataError as error:
                self.abandon()
                faults.refuse(error)
                break
            for number, reason in ticket.answer.bad:
                if self.images.aside.note(self.reads[first + number], reason):
                    missing.append(first + number)
            first += ticket.shape[0]
            pool.release(self.tickets.pop(0))
        if missing:
            again = torch.tensor(missing)
            numbers = None if self.numbers is None else self.numbers[again]
            order = self.images.order(self.positions[again], self.recipe, numbers, self.draw)
            pixels[again] = order.collect(torch.device("cpu"))
        return pixels.to(device, non_blocking=True)

    def abandon(self) -> None:
        """Release the memory of what was not collected."""
        while self.tickets:
            self.images.pool.release(self.tickets.pop())


@dataclass(frozen=True)
class StreamedImages:
    """Images and classes like `datasets.Images`, with the pixels on disk."""

    catalogue: ImageIndex
    aside: Aside
    pool: WorkerPool
    # The images' rows in the catalogue, int64 (n,), on the CPU.
    rows: Tensor
    # int64 (n,), -1 if unknown.
    labels: Tensor
    # That of `squares`; its channels and background are those of all crops.
    squared: Recipe

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.catalogue.classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> StreamedImages:
        return replace(self, rows=self.rows[rows.cpu()], labels=self.labels[rows])

    def to(self, device: torch.device) -> StreamedImages:
        """Return the same images, to be moved to `device` when they are needed."""
        return replace(self, labels=self.labels.to(device))

    def labelled(self) -> StreamedImages:
        """Return the images whose class is known."""
        known = self.labels >= 0
        return self if bool(known.all()) else self[known]

    def squares(self, rows: Tensor) -> Tensor:
        """Return the centred squares of some images, uint8 (*rows.shape, channels, size, size)."""
        pixels = self.order(rows.flatten(), self.squared).collect(self.labels.device)
        return pixels.reshape(*rows.shape, *pixels.shape[2:])

    def batches(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the squares of each part, while later ones are decoded."""
        ahead = deque[Order]()
        try:
            for place in range(len(parts)):
                while len(ahead) < 3 and place + len(ahead) < len(parts):
                    part = parts[place + len(ahead)]
                    ahead.append(self.order(part, self.squared))
                yield ahead.popleft().collect(self.labels.device)[:, 0]
        finally:
            for order in ahead:
                order.abandon()

    def order(
        self, rows: Tensor, recipe: Recipe, numbers: Tensor | None = None, draw: Draw = FIXED
    ) -> Order:
        """Order images `rows`, int64 (n,), from the workers, with the numbers for `submit`.

        `draw` decides which images stand in for those that are set aside.
        """
        most = worker_pool.images_of_request(recipe)
        rows = rows.cpu()
        reads = self.rows[rows].tolist()
        if self.aside.rows:
            pairs = zip(rows.tolist(), reads, strict=True)
            reads = [r if r not in self.aside.rows else self._stand_in(n, draw) for n, r in pairs]
        places = self.catalogue.places(reads)
        order = Order(self, rows, reads, recipe, numbers, draw, [])
        try:
            for first in range(0, len(places), most):
                part = slice(first, first + most)
                mine = None if numbers is None else numbers[part]
                order.tickets.append(self.pool.submit(places[part], recipe, mine))
        except DataError as error:  # of a worker that has ended
            order.abandon()
            faults.refuse(error)
        return order

    def _stand_in(self, number: int, draw: Draw) -> int:
        """Return the row of the catalogue that is read for an image that is set aside.

        It is drawn among the images of its class, or among all if none of them can be read.
        """
        labels = self.labels.cpu()
        row = int(self.rows[number])
        for candidates in (self.rows[labels == labels[number]], self.rows):
            attempts = torch.arange(ATTEMPTS)
            drawn = uniform(draw.seed, Purpose.STAND_IN, draw.epoch, row, attempts)
            first: list[int] = candidates[(drawn * len(candidates)).long()].tolist()
            for other in (*first, *map(int, candidates)):
                if other not in self.aside.rows:
                    return other
        raise DataError(
            f"{shown(self.catalogue.root)}: none of {len(self)} images can be read; check the "
            "disk or file system, and that these are images"
        )

    def order_crops(
        self,
        recipes: Sequence[ViewsConfig],
        seed: int,
        epoch: Key,
        samples: Tensor,
        wanted: tuple[int, ...],
    ) -> Order:
        """Order the crops of views `wanted` of the images `samples`, int64 (n,).

        Waits for the device if samples or epoch are on one.
        """
        samples, epoch, shared = samples.cpu(), int(epoch), recipes[0]
        numbers = [
            views.crop_numbers(views.recipe(recipes, view), seed, epoch, samples, view)
            for view in (0, 1)
        ]
        recipe = self.squared._replace(
            size=shared.size, views=wanted, ratio_min=shared.ratio_min, ratio_max=shared.ratio_max
        )
        return self.order(samples, recipe, torch.stack(numbers, dim=1), Draw(seed, epoch))
