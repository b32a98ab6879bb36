"""SGD, LARS and AdamW: none of them waits for a GPU, and a step that is refused changes nothing.

All do what `found_inf`, float () on the device, tells PyTorch's fused optimizers: nothing if it
is 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moco_dist.config.optim import OptimConfig


class Lars(torch.optim.SGD):
    """SGD whose steps are in proportion to the weights (You, Gitman, Ginsburg: arXiv:1708.03888).

    As published with MoCo v3 (moco/optimizer.py): the gradient g of a parameter p with more than
    one dimension becomes g + weight_decay p, and that times trust |p| / |g|, or times 1 where a
    norm is 0. Vectors have neither. With `trust_clip`, the factor times the rate is at most the
    rate, as in solo-learn.
    """

    def __init__(self, parameters: list[nn.Parameter], config: OptimConfig) -> None:
        super().__init__(
            parameters, config.lr, config.momentum, nesterov=config.nesterov, fused=True
        )
        self.config = config

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Scale the gradients in place, and take SGD's step."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.ndim > 1 and p.grad is not None]
            gradients: list[Tensor] = [p.grad for p in weights]
            torch._foreach_add_(gradients, weights, alpha=self.config.weight_decay)
            sizes, slopes = _norms(weights), _norms(gradients)
            factors = self.config.trust * sizes / slopes
            if self.config.trust_clip:
                factors = (factors / group["lr"]).clamp(max=1)
            factors = torch.where((sizes > 0) & (slopes > 0), factors, 1)
            torch._foreach_mul_(gradients, list(factors.unbind()))
        return super().step(closure)


def _norms(tensors: list[Tensor]) -> Tensor:
    """Return the Euclidean norms of tensors of two or more dimensions, (tensors,).

    Each is the norm of the norms along the longest dimension: a sum over everything would depend on
    the number of threads, which may differ from process to process. `_foreach_norm` needs pinned
    memory, which no graph may take.
    """
    norms = []
    for x in tensors:
        longest = max(range(x.ndim), key=x.shape.__getitem__)
        others = [place for place in range(x.ndim) if place != longest]
        norms.append(torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=others)))
    return torch.stack(norms)


def build(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of those of the parameters that are trained."""
    trained = [p for p in parameters if p.requires_grad]
    if config.name == "lars":
        return Lars(trained, config)
    if config.name == "adamw":
        on_gpu = trained[0].is_cuda
        optimizer = torch.optim.AdamW(
            *(trained, config.lr), weight_decay=config.weight_decay, fused=True, capturable=on_gpu
        )
        # Otherwise it warns in the eager steps before a capture.
        optimizer._warned_capturable_if_run_uncaptured = True
        return optimizer
    return torch.optim.SGD(
        *(trained, config.lr, config.momentum, 0, config.weight_decay, config.nesterov), fused=True
    )
