"""Pretraining by Momentum Contrast: its state, one step of it, and its checkpoints."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import to_dict
from moco_dist.data import datasets
from moco_dist.data.view_source import Pieces, view_source, views_of
from moco_dist.distributed import agreement, comms, fingerprint, peers
from moco_dist.encoders import features, knn, load
from moco_dist.errors import UserError
from moco_dist.method import batch_norm, moco, schedule
from moco_dist.method import loss as method_loss
from moco_dist.method.encoder import build_encoder
from moco_dist.method.plan import Plan, Step, check_batch, check_groups
from moco_dist.pretrain import finite, health, metrics, rehearsal
from moco_dist.runs import checkpoint, environment
from moco_dist.runs.session import Session
from moco_dist.tracking import media


class Trainer:
    """A run in the making: models, data, place; all state is in `moco`, `optimizer` and `step`."""

    def __init__(self, config: PretrainConfig, session: Session, splits: datasets.Splits) -> None:
        self.config, self.session = config, session
        self.accelerator, device = session.accelerator, session.device
        processes = comms.world_size()
        self.splits = splits.to(device)
        self.plan = peers.together(self._plan)
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.source = view_source(
            self.splits.train, config.views, self.plan, self.passes, self.dtype, config.data.keys_by
        )
        rows, groups = config.batch_size // config.bn_groups, config.bn_groups // processes
        encoder = build_encoder(config.encoder, config.seed, rows, groups)
        if config.init_from and not session.resumed:
            source, run = Path(config.init_from), session.directory
            peers.together(lambda: load.start(encoder, source, run))
        self.moco = moco.MoCo(encoder, config.moco.queue_size, config.encoder.dim).to(
            device, self.dtype
        )
        self.optimizer = torch.optim.SGD(
            self.moco.query_encoder.parameters(),
            *(config.optim.lr, config.optim.momentum, 0, config.optim.weight_decay),
            fused=True,
        )
        # DDP would give all processes the weights of process 0 without a word.
        weights = fingerprint.of_module(self.moco)
        peers.same_everywhere("the fingerprint of the new model", weights)
        left = session.resumed is None or session.resumed.step < self.total_steps
        if config.runtime.compile and left:
            peers.together(lambda: rehearsal.compile_all(self))
        # The query encoder alone gets DDP: keys have no gradients, and DDP would send the queue
        # at each step. It would also give each process the BatchNorm statistics of process 0.
        self.query = self.accelerator.prepare(self.moco.query_encoder)
        if processes > 1:
            self.query.broadcast_buffers = False
            rehearsal.settle_buckets(self)
        self.parameters = list(self.moco.query_encoder.parameters())
        self.undo = batch_norm.Undo(self.moco.query_encoder, self.moco.key_encoder)
        self.step = 0
        # The step that was evaluated last, and step and accuracy of the best one.
        self.evaluated = -1
        self.best: dict[str, float] | None = None
        # Neighbours of the first validation images, among the labelled training images.
        self.nearest: Tensor | None = None
        self.gradient_norm = torch.zeros(())
        # Figures of the last step, if it was one in which they are due.
        self.health: dict[str, float] = {}
        self.agreed = agreement.Agreement(stop=0, save=False)
        if saved := session.resumed:
            peers.together(lambda: self.restore(saved))

    def _plan(self) -> Plan:
        config, processes = self.config, comms.world_size()
        check_batch(config.batch_size, processes)
        check_groups(config.bn_groups, processes, config.runtime.micro_batches)
        return Plan(
            num_samples=len(self.splits.train),
            batch_size=config.batch_size,
            seed=config.seed,
            rank=comms.rank(),
            world_size=processes,
            device=self.session.device,
        )

    @property
    def passes(self) -> list[tuple[int, int]]:
        """The views of the queries and of their keys, for each pass over the batch."""
        return [(0, 1), (1, 0)] if self.config.moco.symmetric else [(0, 1)]

    def train_step(self, wants_save: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Do one step of Algorithm 1 (He et al. 2020), whose lines stand on the right.

        Returns this process's mean loss and, pass by piece, the logits. Raises, on all processes
        alike and with the state as it was before the step: StoppedError if one was asked to stop,
        NumbersError for what is not finite.
        """
        rows, note = self.begin_step(wants_save)  # for x in loader:
        key_views, query_views = self.make_views(rows)  # x_q, x_k = aug(x), aug(x)
        keys = self.encode_keys(rows, key_views, note)  # k = f_k.forward(x_k).detach()
        losses, logits, queries = self.backward(rows, keys, query_views)  # q; loss; loss.backward()
        self.require_finite(rows, keys, losses)
        self.session.saver.copied()  # a save of the state before this step, which ends here
        self.update_query_encoder()  # update(f_q.params)
        momentum = schedule.key_momentum(self.config.moco, self.step, self.total_steps)
        self.moco.update_key_encoder(momentum)  # f_k.params = m f_k.params + (1 - m) f_q.params
        self.measure_health(queries, keys, rows)
        self.moco.queue.enqueue(torch.cat(keys), rows.samples.repeat(len(keys)))  # enqueue, dequeue
        self.step += 1
        return torch.stack(losses).mean(), logits

    def begin_step(self, wants_save: bool) -> tuple[Step, Tensor]:
        """Return the rows of this step, and the note that goes to all processes with its keys.

        From here on `undo` can put back what a forward pass changes.
        """
        self.source.begin(self.step)
        peers.me.mark(self.step, "encoding keys")
        rows = self.plan.step(self.step, len(self.passes))
        self.moco.train()
        self.undo.keep()
        asked, alone = self.session.request(), comms.world_size() == 1
        return rows, agreement.note(self.step, rows.samples, asked, wants_save, alone)

    def make_views(self, rows: Step) -> tuple[list[Pieces], list[Pieces]]:
        """Return what gives the views of the keys and of the queries, pass by pass."""
        micro_batches = self.config.runtime.micro_batches
        return views_of(rows, self.passes, self.source, micro_batches)

    def encode_keys(self, rows: Step, key_views: list[Pieces], note: Tensor) -> list[Tensor]:
        """Return the keys of the whole batch, pass by pass, (batch_size, dim), without gradients.

        The gather of the first ones brings the notes of all processes too: where one was asked to
        stop, all stop here, before anything has changed.
        """
        keys = []
        for number, views in enumerate(key_views):
            encoded, notes = self.keys(rows, number, views, note)
            keys.append(encoded)
            if number == 0:
                self.agreed = agreement.agree(notes)
                if self.agreed.stop:
                    self.undo.restore()
                    self.session.stop_for(self.agreed.stop)
        peers.me.mark(self.step, "encoding queries")
        return keys

    def require_finite(self, rows: Step, keys: list[Tensor], losses: list[Tensor]) -> None:
        """Raise NumbersError, with the state as before the step, for what is not finite.

        Keys and gradients are the same on all processes, and `backward` gives a loss that is not
        finite gradients that are not: all processes raise it or none does.
        """
        self.gradient_norm, keys_norm = finite.norms(self.parameters, *keys)
        # Either is not finite if a number in it isn't.
        if not (self.gradient_norm + keys_norm).isfinite():
            self.undo.restore()
            self.optimizer.zero_grad()
            figures = {
                "keys": torch.cat(keys),
                "train/loss": torch.stack(losses),
                "gradient": self.gradient_norm,
            }
            finite.refuse(self.step, figures, rows, self.source, self.config.optim.lr)

    def update_query_encoder(self) -> None:
        """Move the query encoder by its gradients, which are then gone."""
        rate = schedule.learning_rate(
            self.config.optim, self.step, self.steps_per_epoch, self.total_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()

    def measure_health(self, queries: Tensor, keys: list[Tensor], rows: Step) -> None:
        """Note how keys and queries lie on the sphere, in the steps in which that is due."""
        due = health.due(self.config.tracking.health_every_steps, self.step + 1)
        self.health = health.of_step(self.moco, queries, keys, rows.samples) if due else {}

    def keys(self, rows: Step, number: int, views: Pieces, note: Tensor) -> tuple[Tensor, Tensor]:
        """Return the whole batch's keys for pass `number`, (batch_size, dim), without gradients.

        And the notes of all processes, int64 (processes, fields), which come by the same gather.
        """
        size, mine = self.config.batch_size, len(rows.key_rows[number])
        others = {len(rows.samples), mine * comms.world_size()} - {size}
        if others:  # a gather of unequal messages would kill the other processes
            raise UserError(
                f"process {comms.rank()} is at a batch of {max(others)} in step {self.step} and "
                f"batch_size={size}; nothing was changed by it: start all processes with the same "
                "command, files and versions"
            )
        notes = []

        def gather(mine: Tensor) -> Tensor:
            gathered, noted = comms.all_gather_with_note(mine, note)
            notes.append(noted)
            return gathered

        with self.accelerator.autocast():
            keys = moco.shuffled_keys(self.moco.key_encoder, views, rows.unshuffle[number], gather)
        return keys, notes[0]

    def backward(
        self, rows: Step, keys: list[Tensor], views: list[Pieces]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Compute the gradients of a step; return losses and logits, pass by piece.

        And this process's queries of the first pass, (rows, dim).
        """
        config = self.config
        negatives, _ = self.moco.queue.negatives()
        micro_batches = rows.query_rows.chunk(config.runtime.micro_batches)
        pieces = [
            (number, piece, make)
            for number, makes in enumerate(views)
            for piece, make in zip(micro_batches, makes, strict=True)
        ]
        losses, all_logits, all_queries = [], [], []
        for place, (number, piece, make) in enumerate(pieces, start=1):
            with nullcontext() if place == len(pieces) else self.accelerator.no_sync(self.query):
                samples = rows.samples[piece]
                queries = self.query(make())
                owners = self.moco.queue.owners(samples) if config.moco.mask_own_keys else None
                loss, logits = method_loss.info_nce(
                    queries, keys[number][piece], negatives, config.moco.temperature, owners
                )
                # One times a finite loss is the loss; another shows in the gradient, on all.
                loss = loss * torch.where(loss.isfinite(), 1.0, torch.nan)
                # The passes of the symmetric loss are added, as in the authors' CIFAR demo.
                self.accelerator.backward(loss / config.runtime.micro_batches)
            losses.append(loss.detach())
            all_logits.append(logits.detach())
            all_queries.append(queries.detach())
        return losses, all_logits, torch.cat(all_queries[: config.runtime.micro_batches])

    def views(self, samples: Tensor, epoch: int, view: int) -> Tensor:
        """Return view number `view` of the training images `samples`, (rows, c, size, size)."""
        return self.source.any_views([(samples, view)], epoch)[0]

    def knn_top1(self) -> float:
        """Return the share of validation images that the nearest training images get right."""
        config, encoder = self.config, self.moco.query_encoder
        batch_norm.average_statistics(encoder)
        encoder.eval()
        parts = [self.splits.train.labelled(), self.splits.validation]
        with self.accelerator.autocast():
            pause = partial(self.session.pause, "evaluating kNN")
            bank, queries = (
                features.extract(encoder.backbone, part, config.views, config.batch_size, pause)
                for part in parts
            )
        self.nearest = knn.nearest(queries[: media.ROWS], bank, media.NEIGHBOURS)
        mine = features.share(len(queries))
        classes, (train, validation) = len(parts[0].classes), parts
        predicted = knn.predict(
            queries[mine], bank, train.labels, classes, config.knn.k, config.knn.temperature
        )
        right = comms.total((predicted == validation.labels[mine]).sum())
        return float(right) / len(queries)

    def save(self, wait: bool = False) -> None:
        """Write a checkpoint of the state after `step` steps, in the background or at once."""
        session, config, network = self.session, self.config, self.moco
        peers.me.mark(self.step, "saving")
        statistics: dict[str, Tensor] = {}
        for name, encoder in (("query", network.query_encoder), ("key", network.key_encoder)):
            batch_norm.average_statistics(encoder)
            groups = batch_norm.group_statistics(encoder)
            statistics |= {f"statistics.{name}.{key}": value for key, value in groups.items()}
        momentum = checkpoint.momentum_buffers(self.optimizer, network.query_encoder)
        model = network.state_dict()
        checksum = fingerprint.checksum(*model.values(), *momentum.values())
        way_out = "a machine has miscalculated: go on without it, from the last checkpoint"
        what = f"the checksum of the state after step {self.step}"
        peers.same_everywhere(what, checksum, way_out)
        state = {
            "epoch": self.step / self.steps_per_epoch,
            "enqueued": network.queue.enqueued,
            "evaluated": self.evaluated,
            "best": self.best,
            "run_id": session.run_id,
            "data": self.splits.fingerprint,
            "config": to_dict(config),
        }
        session.save(self.step, model, momentum | statistics, state, wait)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Take over the state of a checkpoint, whatever number of processes wrote it."""
        datasets.require_same(saved.piece("data"), self.splits, saved.path)
        network = self.moco
        encoders = {"query": network.query_encoder, "key": network.key_encoder}
        expected = checkpoint.momentum_shapes(self.optimizer, network.query_encoder)
        for name, encoder in encoders.items():
            shapes = batch_norm.statistics_shapes(encoder, self.config.bn_groups)
            expected |= {f"statistics.{name}.{key}": shape for key, shape in shapes.items()}
        checkpoint.check_tensors(expected, saved.optimizer, saved.path)
        checkpoint.load_tensors(network, saved.model, saved.path)
        for name, encoder in encoders.items():
            prefix = f"statistics.{name}."
            own = {
                k.removeprefix(prefix): v
                for k, v in saved.optimizer.items()
                if k.startswith(prefix)
            }
            batch_norm.restore_group_statistics(encoder, own)
        checkpoint.restore_momentum(self.optimizer, network.query_encoder, saved.optimizer)
        network.queue.enqueued = saved.piece("enqueued")
        self.evaluated, self.best = saved.piece("evaluated"), saved.piece("best")
        self.step = saved.step
        peers.me.mark(self.step, "starting")

    def metrics(
        self, loss: Tensor, all_logits: list[Tensor], seconds: float, steps: int
    ) -> dict[str, float]:
        """Return the last step's figures over all processes; `steps` steps took `seconds`."""
        queue = self.moco.queue
        return {
            "epoch": self.step / self.steps_per_epoch,
            **metrics.of_step(loss, torch.cat(all_logits), self.config.moco.temperature),
            "queue/fill": queue.filled / queue.size,
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "train/gradient_norm": float(self.gradient_norm),
            "train/images_per_second": steps * self.config.batch_size / seconds,
            "system/memory_gb": environment.memory_gb(self.session.device),
            **self.health,
        }
