"""Momentum Contrast (He, Fan, Wu, Xie, Girshick, CVPR 2020): encoders, memory, shuffled keys."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from moco_dist.config.moco import MocoConfig
from moco_dist.distributed import comms
from moco_dist.method.bank import Bank
from moco_dist.method.encoder import Encoder
from moco_dist.method.key_queue import KeyQueue

# The name of `MoCo.remembered` in checkpoints.
REMEMBERED = "enqueued"


class MoCo(nn.Module):
    """The encoders and the memory: all state of the method except the optimizer's.

    `key_encoder` exists only with keys by momentum, `queue` only with a `queue_size` above 0, and
    `bank` only if one is given (figure 2 of the paper).
    """

    key_encoder: Encoder
    queue: KeyQueue
    bank: Bank

    def __init__(
        self,
        encoder: Encoder,
        queue_size: int = 0,
        dim: int = 0,
        *,
        bank: Bank | None = None,
        momentum_keys: bool = True,
    ) -> None:
        super().__init__()
        self.query_encoder = encoder
        if momentum_keys:
            self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
            self.key_encoder.predictor = None
        if queue_size:
            self.queue = KeyQueue(queue_size, dim)
        if bank:
            self.bank = bank

    @property
    def encoders(self) -> dict[str, Encoder]:
        """The encoders that there are, as "query" and "key"."""
        pairs = ((name, getattr(self, f"{name}_encoder", None)) for name in ("query", "key"))
        return {name: encoder for name, encoder in pairs if encoder is not None}

    @property
    def remembered(self) -> int:
        """Number of keys that have entered the queue; 0 without one."""
        return self.queue.enqueued if hasattr(self, "queue") else 0

    @remembered.setter
    def remembered(self, number: int) -> None:
        if hasattr(self, "queue"):
            self.queue.enqueued = number

    @property
    def fill(self) -> float | None:
        """The share of the queue that holds keys; None without a queue."""
        return self.queue.filled / self.queue.size if hasattr(self, "queue") else None

    @torch.no_grad()
    def fill_up(self, images: int) -> None:
        """Fill an empty memory with random keys of so many images, as a bench needs it."""
        if self.fill is None:
            return
        keys, device = self.queue.keys, self.queue.keys.device
        draws = torch.randn(keys.shape, generator=torch.Generator().manual_seed(0))
        samples = torch.arange(self.queue.size, device=device) % images
        self.queue.enqueue(F.normalize(draws, dim=1).to(keys), samples)

    def remember(
        self,
        vectors: Tensor,
        samples: Tensor,
        remembered: Tensor | None = None,
        good: Tensor | None = None,
    ) -> None:
        """Put `vectors` (n, dim) of `samples` (n,) into the memory, if there is one.

        With `remembered`, int64 (), and `good`, bool (), the device knows how many keys there are
        and whether these may enter; the count of this object stays as it is.
        """
        if hasattr(self, "queue"):
            if remembered is None or good is None:
                self.queue.enqueue(vectors, samples)
            else:
                self.queue.write(vectors, samples, remembered, good)
        elif hasattr(self, "bank"):
            self.bank.update(vectors, samples, good)

    @record_function("momentum")
    @torch.no_grad()
    def update_key_encoder(self, momentum: float | Tensor) -> None:
        """Move the key parameters to momentum * key + (1 - momentum) * query (equation 2)."""
        keys: list[Tensor] = list(self.key_encoder.shared_parameters())
        queries: list[Tensor] = list(self.query_encoder.shared_parameters())
        if not keys[0].is_cuda and isinstance(momentum, float):
            torch._foreach_lerp_(keys, queries, 1 - momentum)
        else:  # which has no lerp whose weight is read on the device
            ways, share = torch._foreach_sub(queries, keys), 1 - momentum
            torch._foreach_mul_(ways, share.to(keys[0]) if isinstance(share, Tensor) else share)
            torch._foreach_add_(keys, ways)


def build(encoder: Encoder, settings: MocoConfig, seed: int, images: int) -> MoCo:
    """Return the encoders and the memory that `settings` ask for, for so many training images."""
    dim = encoder.config.dim
    if settings.negatives == "queue":
        return MoCo(encoder, settings.queue_size, dim)
    if settings.negatives == "batch":
        return MoCo(encoder, momentum_keys=settings.keys == "momentum")
    parts = settings.bank_draws, settings.bank_momentum, settings.bank_start == "random"
    bank = Bank(images, dim, seed, *parts, halves=encoder.config.vectors)
    return MoCo(encoder, bank=bank, momentum_keys=False)


@torch.no_grad()
def shuffled_keys(
    encoder: Callable[[Tensor], Tensor],
    pieces: Sequence[Callable[[], Tensor]],
    unshuffle: Tensor,
) -> Tensor:
    """Return the keys of the global batch on every process, in its order, float (batch_size, dim).

    `pieces` return the views of this process's share of the permuted batch, and `unshuffle`, int64
    (batch_size,), undoes the permutation (section 3.3).
    """
    return shuffled_keys_later(encoder, pieces, unshuffle, comms.all_gather_later)()


@torch.no_grad()
def shuffled_keys_later(
    encoder: Callable[[Tensor], Tensor],
    pieces: Sequence[Callable[[], Tensor]],
    unshuffle: Tensor,
    gather: Callable[[Tensor], Callable[[], Tensor]],
) -> Callable[[], Tensor]:
    """Return what `shuffled_keys` returns, once the gather that `gather` begins has ended."""
    whole = gather(torch.cat([encoder(piece()) for piece in pieces]))
    return cache(lambda: whole()[unshuffle])
