"""Backbone features of images, computed by all processes, and classifiers that need only them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_dist.config.recipe import ViewsConfig
from moco_dist.data.datasets import AnyImages
from moco_dist.distributed import comms
from moco_dist.method import views

# Queries and rows of the bank whose similarities are in memory at once.
QUERIES, BANK = 1024, 65536
# Iterations of the linear classifier between two pauses, and how many times that.
_ITERATIONS, _ROUNDS = 10, 3


def share(size: int) -> Tensor:
    """Return this process's share of range(`size`), int64; the shares are disjoint."""
    return torch.arange(comms.rank(), size, comms.world_size())


@torch.no_grad()
def extract(
    backbone: nn.Module,
    images: AnyImages,
    config: ViewsConfig,
    batch_size: int,
    pause: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the features of the images' centre views, (len(images), features), in order.

    Every process gets all of them and calls `pause` equally often, before each batch. The backbone
    must be in evaluation mode; the features have its dtype.
    """
    assert not backbone.training, "features need a backbone in evaluation mode"
    dtype = next(backbone.parameters()).dtype
    size, processes = len(images), comms.world_size()
    each = -(-size // processes)
    rows = torch.arange(each) * processes + comms.rank()
    # Every process has equally many rows; the last image replaces those beyond the end.
    rows = rows.clamp(max=max(size - 1, 0)).to(images.labels.device)
    batches = rows.split(batch_size)
    pixels, whole, done = images.batches(batches), torch.empty(0), 0
    for _ in batches:
        pause()
        # Autocast ends in bf16, which is too coarse for similarities.
        mine = backbone(views.center(next(pixels), config, dtype)).flatten(1).to(dtype)
        if not done:
            whole = mine.new_empty(processes * each, *mine.shape[1:])
        # Gathered batch by batch, so that all features are in memory only once.
        gathered = comms.all_gather(mine[None]).transpose(0, 1).flatten(0, 1)
        whole[done : done + len(gathered)] = gathered
        done += len(gathered)
    return whole[:size]


def nearest(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Return the rows of `bank` with the highest cosine similarity, int64 (queries, k), in order.

    A `k` above the length of the bank returns all of it.
    """
    return most_similar(queries, bank, k)[1]


@torch.no_grad()
def most_similar(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the `k` highest cosine similarities of each query to rows of `bank`, and the rows.

    Both are (queries, k), in descending order, the rows int64. A `k` above the length of the bank
    returns all of it. The bank is normalised piece by piece, because it may fill half a GPU.
    """
    chunks = F.normalize(queries, dim=1).split(QUERIES)
    found: list[tuple[Tensor, Tensor]] = []
    for first in range(0, len(bank), BANK):
        part = F.normalize(bank[first : first + BANK], dim=1)
        for number, chunk in enumerate(chunks):
            values, rows = (chunk @ part.T).topk(min(k, len(part)), dim=1)
            if first == 0:
                found.append((values, rows))
                continue
            values = torch.cat([found[number][0], values], dim=1)
            rows = torch.cat([found[number][1], rows + first], dim=1)
            values, places = values.topk(min(k, values.shape[1]), dim=1)
            found[number] = values, rows.gather(1, places)
    values, rows = (torch.cat(each) for each in zip(*found, strict=True))
    return values, rows


@torch.no_grad()
def predict(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int, k: int, temperature: float
) -> Tensor:
    """Return the class of each query, int64 (rows,).

    The `k` nearest of `bank` (n, features) by cosine similarity s vote for their class in
    `bank_labels`, int64 (n,), with weight exp(s / temperature). Wu et al. 2018 (arXiv:1805.01978),
    section 3.4.
    """
    similarity, nearest = most_similar(queries, bank, k)
    # The largest similarity is subtracted against overflow.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(queries), num_classes)
    votes.scatter_add_(1, bank_labels[nearest], weights)
    return votes.argmax(1)


def linear_logits(
    queries: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    pause: Callable[[], None] = lambda: None,
) -> Tensor:
    """Return the logits of queries, (rows, classes), by a linear classifier of the bank.

    It is that of scikit-learn's StandardScaler and LogisticRegression with their defaults, as near
    as 30 iterations of L-BFGS come: least is the sum of the cross-entropies of `bank` (n, features)
    plus half the squared weights. Nothing is random or exchanged. Overwrites `bank` with its
    standardised features, because it may fill half a GPU. `pause` is called _ROUNDS times.
    """
    count, size = bank.shape
    rows = QUERIES * BANK // max(size, num_classes)
    var, mean = torch.var_mean(bank, 0, correction=0)
    # A spread that is mere rounding is none.
    real = var.sqrt() > 100 * torch.finfo(bank.dtype).eps * mean.abs()
    scale = torch.where(real, var.sqrt(), 1)
    pieces = list(
        zip(bank.sub_(mean).div_(scale).split(rows), bank_labels.split(rows), strict=True)
    )
    # L-BFGS needs a fifth of the iterations in coordinates in which features are uncorrelated.
    moments = sum((part.double().T @ part.double() for part, _ in pieces), bank.new_zeros(()))
    moments.diagonal().add_(num_classes)
    # They are found on the host, which takes a moment.
    root = torch.linalg.cholesky_ex((moments / count).cpu()).L
    turn: Tensor = torch.linalg.inv_ex(root).inverse.to(bank)
    turned = bank.new_zeros(num_classes, size, requires_grad=True)
    bias = bank.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [turned, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        whole = turned @ turn
        penalty = whole.square().sum() / 2
        leaf, total = whole.detach().requires_grad_(), penalty.detach().double()
        for part, labels in pieces:
            losses = F.cross_entropy(F.linear(part, leaf, bias), labels, reduction="none")
            loss = losses.double().sum()
            (loss / count).backward()
            total += loss.detach()
        torch.autograd.backward([whole, penalty / count], [leaf.grad, None])
        return total / count

    for _ in range(_ROUNDS):
        pause()
        optimizer.step(objective)
    with torch.no_grad():
        points = ((part - mean) / scale for part in queries.split(rows))
        logits = [F.linear(part, turned @ turn, bias) for part in points]
    return torch.cat(logits)
