"""Momentum Contrast (He, Fan, Wu, Xie, Girshick, CVPR 2020): encoders, queue, shuffled keys."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from moco_dist.distributed import comms
from moco_dist.method.encoder import Encoder
from moco_dist.method.key_queue import KeyQueue


class MoCo(nn.Module):
    """The two encoders and the queue: all state of the method except the optimizer's."""

    def __init__(self, encoder: Encoder, queue_size: int, dim: int) -> None:
        super().__init__()
        self.query_encoder = encoder
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.key_encoder.predictor = None
        self.queue = KeyQueue(queue_size, dim)

    @record_function("momentum")
    @torch.no_grad()
    def update_key_encoder(self, momentum: float | Tensor) -> None:
        """Move the key parameters to momentum * key + (1 - momentum) * query (equation 2)."""
        keys: list[Tensor] = list(self.key_encoder.shared_parameters())
        queries: list[Tensor] = list(self.query_encoder.shared_parameters())
        if not keys[0].is_cuda:
            torch._foreach_lerp_(keys, queries, 1 - float(momentum))
        else:  # which has no lerp whose weight is read on the device
            ways, share = torch._foreach_sub(queries, keys), 1 - momentum
            torch._foreach_mul_(ways, share.to(keys[0]) if isinstance(share, Tensor) else share)
            torch._foreach_add_(keys, ways)


@torch.no_grad()
def shuffled_keys(
    encoder: Callable[[Tensor], Tensor],
    pieces: Sequence[Callable[[], Tensor]],
    unshuffle: Tensor,
    gather: Callable[[Tensor], Tensor] = comms.all_gather,
) -> Tensor:
    """Return the keys of the global batch on every process, in its order, float (batch_size, dim).

    `pieces` return the views of this process's share of the permuted batch. `gather` joins the keys
    of all ranks, and `unshuffle`, int64 (batch_size,), undoes the permutation (section 3.3).
    """
    mine = torch.cat([encoder(piece()) for piece in pieces])
    return gather(mine)[unshuffle]
