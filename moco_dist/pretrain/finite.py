"""Numbers that are not finite, found before they reach the state and named with their images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from moco_dist.distributed import comms
from moco_dist.errors import NumbersError
from moco_dist.method.plan import Step
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs.record import Metric


def norms(parameters: Sequence[nn.Parameter], *others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Euclidean norm of all gradients, and of all `others`; float () each.

    After the gradients have been averaged they are the same on all processes.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if others[0].is_cuda:  # where a list of norms would need pinned memory, which no graph may take
        joined = (torch.cat([flat(each) for each in some]) for some in (gradients, others))
        of_gradients, of_others = (each.norm() for each in joined)
        return of_gradients, of_others
    each = torch.stack(torch._foreach_norm([*gradients, *others]))
    return each[: len(gradients)].norm(), each[len(gradients) :].norm()


def flat(x: Tensor) -> Tensor:
    """Return all elements of a dense tensor in the order of its memory, without a copy."""
    return x.as_strided((x.numel(),), (1,))


def refuse(
    trainer: Trainer, step: int, rows: Step, keys: Tensor, losses: Tensor, gradient: Tensor
) -> NoReturn:
    """Raise NumbersError, on all processes alike, naming the figures and images at fault."""
    figures = {"keys": keys, Metric.LOSS: losses, "gradient": gradient}
    bad = [name for name, figure in figures.items() if not figure.isfinite().all()]
    # An image that isn't finite spoils its BatchNorm group: the views tell which one it is.
    mine = rows.samples[torch.cat([rows.query_rows, *rows.key_rows])]
    views = trainer.source.any_views([(mine, 0), (mine, 1)], rows.epoch)
    whole = torch.cat([view.flatten(1) for view in views], dim=1).isfinite().all(1)
    found = comms.gather_objects((bad, mine[~whole].tolist()))
    names = ", ".join(dict.fromkeys(name for bad, _ in found for name in bad))
    spoiled = sorted({sample for _, samples in found for sample in samples})
    whose = f"the images {spoiled} are not" if spoiled else "all its images are"
    error = NumbersError(
        f"{names} not finite in step {step} ({whose}; the batch is in not_finite.json); nothing of "
        "the step was kept. Look at its images, or train again with name=... and optim.lr below "
        f"{trainer.config.optim.lr:g}"
    )
    error.details = {
        "step": step,
        "not_finite": names.split(", "),
        "images_not_finite": spoiled,
        "samples": rows.samples.tolist(),
    }
    raise error.on_all()
