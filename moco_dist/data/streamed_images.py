"""Images that stay on disk and are decoded by workers whenever they are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moco_dist.config.recipe import ViewsConfig
from moco_dist.data import worker_pool
from moco_dist.data.image_file import WHITE, Recipe
from moco_dist.data.image_index import ImageIndex
from moco_dist.data.worker_pool import Ticket, WorkerPool
from moco_dist.method import views


@dataclass(frozen=True)
class Order:
    """Requests for images that are on their way."""

    pool: WorkerPool
    tickets: list[Ticket]

    def collect(self, device: torch.device) -> Tensor:
        """Wait; return the pixels, uint8 (images, views, channels, size, size), on `device`."""
        shape = sum(ticket.shape[0] for ticket in self.tickets), *self.tickets[0].shape[1:]
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        first = 0
        while self.tickets:
            ticket = self.tickets[0]
            pixels[first : first + ticket.shape[0]] = self.pool.fetch(ticket)
            first += ticket.shape[0]
            self.pool.release(self.tickets.pop(0))
        return pixels.to(device, non_blocking=True)

    def abandon(self) -> None:
        """Release the memory of what was not collected."""
        while self.tickets:
            self.pool.release(self.tickets.pop())


@dataclass(frozen=True)
class StreamedImages:
    """Images and classes like `datasets.Images`, with the pixels on disk."""

    catalogue: ImageIndex
    pool: WorkerPool
    # The images' rows in the catalogue, int64 (n,), on the CPU.
    rows: Tensor
    # int64 (n,), -1 if unknown.
    labels: Tensor
    # Side in pixels of `squares`.
    size: int
    channels: int = 3
    # RGB, composed with what is transparent.
    background: tuple[int, ...] = WHITE

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.catalogue.classes

    @property
    def squared(self) -> Recipe:
        """The recipe of `squares`."""
        return Recipe(self.size, channels=self.channels, background=self.background)

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

    def order(self, rows: Tensor, recipe: Recipe, numbers: Tensor | None = None) -> Order:
        """Order images `rows`, int64 (n,), from the workers, with the numbers for `submit`."""
        most = worker_pool.images_of_request(recipe)
        places = self.catalogue.places(self.rows[rows.cpu()].tolist())
        tickets = []
        for first in range(0, len(places), most):
            part = slice(first, first + most)
            mine = None if numbers is None else numbers[part]
            tickets.append(self.pool.submit(places[part], recipe, mine))
        return Order(self.pool, tickets)

    def order_crops(
        self, config: ViewsConfig, seed: int, epoch: int, samples: Tensor, wanted: tuple[int, ...]
    ) -> Order:
        """Order the crops of views `wanted` of the images `samples`, int64 (n,)."""
        samples = samples.cpu()
        numbers = [views.crop_numbers(config, seed, epoch, samples, view) for view in (0, 1)]
        shape = config.ratio_min, config.ratio_max
        recipe = Recipe(config.size, wanted, *shape, self.channels, self.background)
        return self.order(samples, recipe, torch.stack(numbers, dim=1))
