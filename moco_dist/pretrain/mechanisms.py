"""How a step finds its loss and gradients: the three mechanisms of figure 2 of the paper.

Queries meet keys of a momentum encoder, from a queue or from the same step; or vectors that earlier
steps left in a bank; or, with gradients on both sides, the other vectors of the same step. What a
step does around that is the same for all and stands in `trainer.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.profiler import record_function

from moco_dist.config.recipe import PretrainConfig
from moco_dist.data.view_source import Pieces, ViewSource, views_of
from moco_dist.distributed import comms, peers
from moco_dist.method import moco, pairs
from moco_dist.method.batch_norm import Undo
from moco_dist.method.loss import info_nce, owners
from moco_dist.method.plan import Plan, Step
from moco_dist.randomness import Key

Later = Callable[[], Tensor]


class Contrasted(NamedTuple):
    """What a step has found; its gradients are in `.grad`."""

    # Of each micro-batch of each pass on this process: mean losses, (n,), and logits,
    # (rows, 1 + negatives), positive first.
    losses: Tensor
    logits: list[Tensor]
    # This process's queries of the first pass, and the vectors of the whole batch that the queries
    # of each pass are drawn to, float (local, dim) and (batch_size, dim).
    queries: Tensor
    positives: list[Tensor]
    # Vectors of the whole batch that this step has made, the same on all processes, and that enter
    # the memory if there is one, float (n, dim).
    made: list[Tensor]


class Piece(NamedTuple):
    """A micro-batch of queries in one pass over the batch."""

    rows: Tensor  # their places in the batch, int64 (rows,)
    samples: Tensor  # int64 (rows,)
    # Returns the positives of the whole batch, float (batch_size, dim), once they are gathered.
    candidates: Later
    view: Callable[[], Tensor]  # makes their views, float (rows, channels, size, size)
    last: bool  # of the step


class Hooks:
    """What is called between the lines of a step. These hooks only gather the keys."""

    def begin(self, step: int, rows: Step) -> None:
        """Is called once the rows of the step are known and before anything is computed."""

    def gather(self, keys: Tensor) -> Callable[[], Tensor]:
        """Begin to gather the keys of all processes in the order of ranks, (batch_size, dim)."""
        return comms.all_gather_later(keys)

    def pause(self, doing: str) -> None:
        """Is called between parts of what takes long before the first step."""

    def before_update(self, made: list[Tensor], losses: Tensor) -> None:
        """Is called once the gradients are known and before weights and memory change."""

    def before_enqueue(self, queries: Tensor, positives: list[Tensor]) -> None:
        """Is called once the encoders have moved and while the memory holds older vectors only."""


class Mechanism(ABC):
    """What all mechanisms share. Called in each step, with its rows and number."""

    def __init__(
        self,
        config: PretrainConfig,
        network: moco.MoCo,
        query: Callable[[Tensor], Tensor],
        accelerator: Accelerator,
        source: ViewSource,
        plan: Plan,
        undo: Undo,
    ) -> None:
        self.config, self.network, self.query = config, network, query
        self.accelerator, self.source, self.plan, self.undo = accelerator, source, plan, undo
        self.micro_batches = config.runtime.micro_batches

    @abstractmethod
    def __call__(self, rows: Step, step: Key, hooks: Hooks) -> Contrasted:
        """Add the gradients of the step's loss; weights and memory stay as they are."""

    def make_views(self, rows: Step) -> tuple[list[Pieces], list[Pieces]]:
        """Return what gives the views of the keys and of the queries, pass by pass."""
        return views_of(rows, self.config.moco.passes, self.source, self.micro_batches)

    def adding_gradients(self, last: bool) -> AbstractContextManager[None]:
        """Return a context in which gradients are added; the last one averages them over all."""
        return nullcontext() if last else self.accelerator.no_sync(self.query)

    @record_function("query")
    def encode(self, view: Callable[[], Tensor]) -> Tensor:
        """Return the queries of views, unit vectors, float (rows, dim)."""
        return self.query(view())


class AgainstConstants(Mechanism):
    """Queries meet vectors without gradients, micro-batch by micro-batch."""

    @record_function("backward")
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's loss to those of the step.

        The losses of the two passes of the symmetric loss are added, as in the authors' CIFAR demo.
        """
        self.accelerator.backward(loss / self.micro_batches)

    def pieces(self, rows: Step, views: list[Pieces], positives: list[Later]) -> Iterator[Piece]:
        """Yield the micro-batches of this process's queries, pass by pass."""
        parts = rows.query_rows.chunk(self.micro_batches)
        for number, (makes, candidates) in enumerate(zip(views, positives, strict=True), start=1):
            for place, (part, make) in enumerate(zip(parts, makes, strict=True), start=1):
                last = number == len(views) and place == len(parts)
                yield Piece(part, rows.samples[part], candidates, make, last)

    @abstractmethod
    def negatives(self, piece: Piece, step: Key) -> tuple[Tensor, Tensor | None]:
        """Return the negatives of a micro-batch and their owners, as `info_nce` takes them."""

    def contrast(
        self, rows: Step, views: list[Pieces], positives: list[Later], step: Key
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Add the gradients of all micro-batches; return their queries, losses and logits."""
        done = []
        for piece in self.pieces(rows, views, positives):
            with self.adding_gradients(piece.last):
                q = self.encode(piece.view)  # q = f_q.forward(x_q)
                loss, logits = self.loss(q, piece, step)  # loss = CrossEntropyLoss(logits / t, 0)
                self.backward(loss)  # loss.backward()
            done.append((q.detach(), loss.detach(), logits.detach()))
        queries, losses, all_logits = map(list, zip(*done, strict=True))
        return queries, losses, all_logits

    @record_function("loss")
    def loss(self, queries: Tensor, piece: Piece, step: Key) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a micro-batch, (), and its logits; see `info_nce`."""
        negatives, owners = self.negatives(piece, step)
        return self.of_pair(queries, piece.candidates()[piece.rows], negatives, owners)

    def of_pair(
        self, queries: Tensor, positives: Tensor, negatives: Tensor, owners: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return `info_nce` at the temperature of the run."""
        temperature = self.config.moco.temperature
        loss, logits = info_nce(queries, positives, negatives, temperature, owners)
        # A finite loss is multiplied by one; any other makes the gradients of all processes NaN.
        return loss * torch.where(loss.isfinite(), 1.0, torch.nan), logits


class MomentumKeys(AgainstConstants):
    """Keys of a second encoder: Algorithm 1 of the paper, whose lines stand on the right.

    Negatives are the keys of the queue, or those of the same step as in MoCo v3 (Chen, Xie and He
    2021, algorithm 1).
    """

    def __call__(self, rows: Step, step: Key, hooks: Hooks) -> Contrasted:
        """Add the gradients of the step's loss."""
        key_views, query_views = self.make_views(rows)  # x_q, x_k = aug(x), aug(x)
        later = self.keys(rows, key_views, hooks)  # k = f_k.forward(x_k).detach()
        queries, losses, logits = self.contrast(rows, query_views, later, step)
        keys = [whole() for whole in later]
        first = torch.cat(queries[: self.micro_batches])
        return Contrasted(torch.stack(losses), logits, first, keys, keys)

    @record_function("key")
    def keys(self, rows: Step, views: list[Pieces], hooks: Hooks) -> list[Later]:
        """Return the keys of the whole batch, pass by pass, (batch_size, dim); no gradients.

        They are gathered while the queries are encoded.
        """
        encoder = self.network.key_encoder
        with self.accelerator.autocast():
            return [
                moco.shuffled_keys_later(encoder, pieces, unshuffle, hooks.gather)
                for pieces, unshuffle in zip(views, rows.unshuffle, strict=True)
            ]

    def negatives(self, piece: Piece, step: Key) -> tuple[Tensor, Tensor | None]:
        """Return the keys in the queue, or those of the step, of which a row's own one is owned."""
        if self.config.moco.negatives == "queue":
            negatives, samples = self.network.queue.negatives()
            masks = self.config.moco.mask_own_keys
            return negatives, owners(samples, piece.samples) if masks else None
        keys = piece.candidates()
        own = torch.full((len(keys),), -1, device=keys.device)
        own[piece.rows] = torch.arange(len(piece.rows), device=keys.device)
        return keys, own


class FromBank(AgainstConstants):
    """Vectors of a bank with one for each image (Wu et al. 2018; figure 2b of the paper)."""

    def __call__(self, rows: Step, step: Key, hooks: Hooks) -> Contrasted:
        """Add the gradients of the step's loss."""
        if isinstance(step, int) and step == 0 and self.config.moco.bank_start == "pass":
            self.fill(hooks)
        _, views = self.make_views(rows)
        positives = self.network.bank.met_by(rows.samples)
        queries, losses, logits = self.contrast(rows, views, [lambda: positives], step)
        mine = torch.cat(queries)
        made = [hooks.gather(mine)()]
        return Contrasted(torch.stack(losses), logits, mine, [positives], made)

    def negatives(self, piece: Piece, step: Key) -> tuple[Tensor, Tensor | None]:
        """Return the vectors of the images drawn for the step."""
        return self.network.bank.negatives(step, piece.samples)

    @torch.no_grad()
    def fill(self, hooks: Hooks) -> None:
        """Give each image the vector that the new encoder has for it; a collective."""
        vectors, batch = self.network.bank.vectors, self.plan.batch_size
        peers.me.mark(0, "filling the memory bank")
        self.undo.keep()
        for start in range(0, len(vectors), batch):
            hooks.pause("filling the memory bank")
            # The last batch is a whole one, too, because BatchNorm needs whole groups.
            samples = min(start, len(vectors) - batch) + torch.arange(batch, device=vectors.device)
            with self.accelerator.autocast():
                mine = [
                    self.network.query_encoder(self.source.any_views([(part, 0)], 0)[0])
                    for part in samples[self.plan.local_rows].chunk(self.micro_batches)
                ]
            vectors[samples] = comms.all_gather(torch.cat(mine))
        self.undo.restore()


class FromCrossedBanks(FromBank):
    """The queries of each half of the encoder meet the bank of the other one (Tian et al. 2019)."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch: `loss` is a mean, and that of their sum is asked."""
        super().backward(2 * loss)

    @record_function("loss")
    def loss(self, queries: Tensor, piece: Piece, step: Key) -> tuple[Tensor, Tensor]:
        """Return the mean of both halves' losses, (), and their logits, (2 rows, 1 + draws)."""
        negatives, owners = self.negatives(piece, step)
        met = piece.candidates()[piece.rows], negatives
        halves = zip(*(each.unbind(1) for each in (queries, *met)), strict=True)
        each = [self.of_pair(q, k, others, owners) for q, k, others in halves]
        losses, logits = zip(*each, strict=True)
        return torch.stack(losses).mean(), torch.cat(logits)


class Pairs(Mechanism):
    """Gradients on both sides of a pair, and the step's other vectors as negatives.

    One way it is figure 2a of the paper, and symmetric it is SimCLR (Chen et al. 2020). The second
    view is encoded in a permuted order, so that a pair is in two BatchNorm groups. With
    micro-batches the vectors are made first, without gradients, and each piece again with its share
    of the gradient (Gao et al. 2021, arXiv:2101.06983). That is exact, because a piece is whole
    BatchNorm groups.
    """

    def __call__(self, rows: Step, step: Key, hooks: Hooks) -> Contrasted:
        """Add the gradients of the step's loss."""
        (seconds,), (firsts,) = self.make_views(rows)
        whole = self.micro_batches == 1
        if whole:
            vectors = [self.encode(firsts[0]), self.encode(seconds[0])]
        else:
            self.undo.keep()
            vectors = [self.vectors(firsts), self.vectors(seconds)]
            self.undo.restore()
        mine = torch.stack([each.detach() for each in vectors], 1)

        def everyone(x: Tensor) -> Tensor:
            first, second = hooks.gather(x)().unbind(1)
            return torch.cat([first, second[rows.unshuffle[0]]])

        share, everything = self.share(mine, rows, everyone)
        # DDP's mean over the processes becomes their sum.
        gradients = (share.gradient * comms.world_size()).unbind(1)
        with record_function("backward"):
            if whole:
                torch.autograd.backward(vectors, list(gradients))
        if not whole:
            self.again([*firsts, *seconds], torch.cat(gradients))
        keys, losses, logits = [everything.chunk(2)[1]], share.loss[None], [share.logits]
        return Contrasted(losses, logits, mine[:, 0], keys, [everything])

    @record_function("query")
    @torch.no_grad()
    def vectors(self, views: Pieces) -> Tensor:
        """Return the vectors of all micro-batches of a view, (local, dim), without gradients."""
        with self.accelerator.autocast():
            return torch.cat([self.network.query_encoder(view()) for view in views])

    @record_function("loss")
    def share(
        self, mine: Tensor, rows: Step, everyone: pairs.Everyone
    ) -> tuple[pairs.Share, Tensor]:
        """Return this process's share of the loss, and the vectors of all, (2 batch_size, dim)."""
        settings, vectors = self.config.moco, everyone(mine)
        places = torch.stack([rows.query_rows, rows.key_rows[0]], 1)
        loss = pairs.nt_xent if settings.symmetric else pairs.one_way
        return loss(mine, places, vectors, everyone, settings.temperature), vectors

    def again(self, views: Pieces, gradients: Tensor) -> None:
        """Encode each micro-batch once more, and pass its part of `gradients` back."""
        parts = gradients.chunk(len(views))
        for number, (view, part) in enumerate(zip(views, parts, strict=True), start=1):
            with self.adding_gradients(last=number == len(views)):
                vectors = self.encode(view)
                with record_function("backward"):
                    vectors.backward(part)


def of(config: PretrainConfig) -> type[Mechanism]:
    """Return the mechanism of a configuration."""
    if config.moco.negatives == "bank":
        return FromCrossedBanks if config.encoder.vectors > 1 else FromBank
    return MomentumKeys if config.moco.keys == "momentum" else Pairs
