"""A pretraining: what it consists of, and a step of it, whose loss is found in `mechanisms.py`.

A trainer knows no run directory: it can take a step in a notebook or in a benchmark. What a run
does between the lines of a step is in `hooks.py`, how a run is saved in `state.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import record_function

from moco_dist.config.recipe import PretrainConfig
from moco_dist.data import datasets
from moco_dist.data.view_source import view_source
from moco_dist.distributed import comms, fingerprint, peers
from moco_dist.encoders import features, load
from moco_dist.errors import ConfigError
from moco_dist.method import batch_norm, moco, optimizers, schedule
from moco_dist.method.compilation import compile_errors
from moco_dist.method.encoder import build_encoder, freeze_unused
from moco_dist.method.plan import Plan, Step, check_batch, check_groups, check_images, group_share
from moco_dist.pretrain import mechanisms, state
from moco_dist.randomness import Key
from moco_dist.runs.checkpoint import Checkpoint
from moco_dist.runs.record import Metric
from moco_dist.tracking import media, terminal
from moco_dist.tracking.start import console

GATHER_ONLY = mechanisms.Hooks()


class Clock:
    """What a step depends on besides the state, here as numbers that the host knows."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def rows(self) -> Step:
        """Return the rows of the step, with their crops at hand where images are streamed."""
        trainer = self.trainer
        trainer.source.begin(trainer.step)
        return trainer.plan.step(trainer.step, len(trainer.config.moco.passes))

    @property
    def now(self) -> Key:
        """The step, counted from 0."""
        return self.trainer.step

    def rate(self) -> float | Tensor:
        """Return the learning rate."""
        trainer = self.trainer
        times = trainer.step, trainer.steps_per_epoch, trainer.total_steps
        rate = schedule.learning_rate(trainer.config.optim, *times)
        # A CUDA graph reads it as float32.
        return float(torch.tensor(rate)) if trainer.device.type == "cuda" else rate

    def momentum(self) -> float | Tensor:
        """Return the share of the key encoder that stays."""
        trainer = self.trainer
        return schedule.key_momentum(trainer.config.moco, trainer.step, trainer.total_steps)

    def remember(self, vectors: Tensor, samples: Tensor) -> None:
        """Put vectors into the memory, if there is one."""
        self.trainer.moco.remember(vectors, samples)


class Trainer:
    """Models, data and place of a pretraining; all state is in `moco`, `optimizer` and `step`."""

    def __init__(
        self,
        config: PretrainConfig,
        accelerator: Accelerator,
        splits: datasets.Splits,
        saved: Checkpoint | None = None,
    ) -> None:
        if config.monitor.linear and not (splits.train.classes and len(splits.validation)):
            raise ConfigError(
                "monitor.linear=true needs labels and validation images, as kNN does; leave it "
                "out, or give images with classes and data.validation above 0"
            )
        self.config, self.accelerator = config, accelerator
        self.device: torch.device = accelerator.device
        processes = comms.world_size()
        self.splits = splits.to(self.device)
        self.plan = peers.together(self._plan)
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        passes = config.moco.passes
        self.source = view_source(
            *(self.splits.train, config.view_recipes, self.plan, passes, self.dtype),
            config.data.keys_by,
        )
        share = group_share(config.batch_size, config.bn_groups, processes)
        encoder = build_encoder(config.encoder, config.seed, *share)
        # The names of the tensors taken from `init_from`, and of those left there.
        self.initial: tuple[list[str], list[str]] = [], []
        if config.init_from and not saved:
            path = Path(config.init_from).expanduser()
            self.initial = peers.together(lambda: load.start_from(encoder, path))
        if config.encoder.is_timm:
            side = config.views.size
            freeze_unused(encoder.backbone, torch.zeros(1, config.encoder.channels, side, side))
        images = len(self.splits.train)
        network = moco.build(encoder, config.moco, config.seed, images)
        self.moco = network.to(self.device, self.dtype)
        encoder.expect(config.views.mean, config.views.std)
        self.optimizer = optimizers.build(config.optim, self.moco.query_encoder.parameters())
        # DDP would give all processes the weights of process 0 without a word.
        weights = fingerprint.of_module(self.moco)
        peers.same_everywhere("the fingerprint of the new model", weights)
        self.step = 0
        self.clock = Clock(self)
        # The step that was evaluated last, and step and accuracy of the best one.
        self.evaluated = -1
        self.best: dict[str, float] | None = None
        # Neighbours of the first validation images, among the labelled training images.
        self.nearest: Tensor | None = None
        ends = saved is not None and saved.step >= self.total_steps
        self.undo = batch_norm.Undo(*self.moco.encoders.values())
        if config.runtime.compile and not ends:
            peers.together(self._compile)
        # The query encoder alone gets DDP: keys have no gradients, and DDP would send the queue
        # at each step. It would also give each process the BatchNorm statistics of process 0.
        self.query = accelerator.prepare(self.moco.query_encoder)
        # DDP has moved the statistics to other memory.
        self.undo = batch_norm.Undo(*self.moco.encoders.values())
        if processes > 1:
            self.query.broadcast_buffers = False
            # After a backward pass DDP lays out its sums in another order. With three processes or
            # more the layout decides in which order gradients are added: without this pass, the
            # first step of a launch that resumes would have other bits than in the middle of a run.
            self._rehearse(self.query)
        self.contrast = self.mechanism()
        if saved:
            peers.together(lambda: self.restore(saved))

    def _plan(self) -> Plan:
        config, processes = self.config, comms.world_size()
        check_batch(config.batch_size, processes)
        pieces, compiled = config.runtime.micro_batches, config.runtime.compile
        check_groups(config.bn_groups, processes, pieces, compiled)
        check_images(config.batch_size, config.bn_groups, processes, len(self.splits.train))
        return Plan(
            num_samples=len(self.splits.train),
            batch_size=config.batch_size,
            seed=config.seed,
            rank=comms.rank(),
            world_size=processes,
            device=self.device,
        )

    @property
    def _rows(self) -> int:
        """Rows of a micro-batch on this process."""
        return self.config.batch_size // comms.world_size() // self.config.runtime.micro_batches

    def _rehearse(self, *encoders: Callable[[Tensor], Tensor]) -> None:
        """Encode black images once round the BatchNorm groups; also backward, where it can.

        Nothing of it stays, but what compiles in it is compiled.
        """
        size = self.config.views.size, self.config.views.size
        shape = self._rows, self.config.encoder.channels, *size
        images = torch.zeros(shape, dtype=self.dtype, device=self.device)
        self.undo.keep()
        for _ in range(self.config.runtime.micro_batches):
            for encoder in encoders:
                with self.accelerator.autocast():
                    vectors = encoder(images)
                if vectors.requires_grad:
                    self.accelerator.backward(vectors.sum())
        self.undo.restore()
        self.moco.query_encoder.zero_grad()

    def _compile(self) -> None:
        """Compile views and encoders for the shapes of a step; ConfigError if that fails."""
        if comms.is_main():
            text = "compiling views and encoders: a minute or more at a first launch, then seconds"
            terminal.write_line(console, text)
        # A process keeps few compiled forms of a function, and may have had other runs.
        torch.compiler.reset()
        self.source.maker.compile_step()
        for encoder in self.moco.encoders.values():
            encoder.compile_training()
        views = [view for views in self.config.moco.passes for view in views if view is not None]
        whole = self.config.runtime.micro_batches == 1
        together = [views] if whole else [[view] for view in {*views}]
        samples = torch.arange(self._rows, device=self.device)
        shape = len(together[0]) * self._rows, *self.source.shape
        images = samples.new_zeros(shape, dtype=torch.uint8)
        with compile_errors():
            for views in together:
                self.source.maker.of_step(images, [(samples, view) for view in views], 0)
            # What runs without gradients in a step is another graph: mostly the key encoder.
            *_, last = self.moco.encoders.values()
            self._rehearse(self.moco.query_encoder, torch.no_grad()(last.forward))

    def mechanism(self, query: Callable[[Tensor], Tensor] | None = None) -> mechanisms.Mechanism:
        """Return what finds the loss and gradients of a step, from the parts of this trainer.

        Without `query`, which encodes views, DistributedDataParallel averages the gradients.
        """
        parts = self.moco, query or self.query, self.accelerator, self.source, self.plan, self.undo
        return mechanisms.of(self.config)(self.config, *parts)

    def train_step(self, hooks: mechanisms.Hooks = GATHER_ONLY) -> tuple[Tensor, list[Tensor]]:
        """Take one step: for MoCo Algorithm 1 (He et al. 2020), whose lines stand on the right.

        Returns this process's mean loss, (), and the logits of each micro-batch of each pass,
        (rows, 1 + negatives), positive first. What a hook raises leaves weights and memory as they
        were.
        """
        self.moco.train()
        rows = self.clock.rows()  # for x in loader:
        hooks.begin(self.step, rows)
        found = self.contrast(rows, self.clock.now, hooks)  # loss.backward()
        hooks.before_update(found.made, found.losses)
        self.update_query_encoder()  # update(f_q.params)
        if "key" in self.moco.encoders:  # f_k.params = m f_k.params + (1 - m) f_q.params
            self.moco.update_key_encoder(self.clock.momentum())
        hooks.before_enqueue(found.queries, found.positives)
        samples = rows.samples.repeat(len(found.made))
        self.clock.remember(torch.cat(found.made), samples)  # enqueue(queue, k), dequeue(queue)
        self.step += 1
        return found.losses.mean(), found.logits

    @record_function("optimizer")
    def update_query_encoder(self) -> None:
        """Move the query encoder by its gradients, which are then gone."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.clock.rate()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def schedule(self, epochs: int, step: int) -> dict[str, float]:
        """Return learning rate and key momentum of a step if the run had so many epochs."""
        total, optim = epochs * self.steps_per_epoch, self.config.optim
        return {
            "the learning rate goes": schedule.learning_rate(
                optim, step, self.steps_per_epoch, total
            ),
            "the key momentum goes": schedule.key_momentum(self.config.moco, step, total),
        }

    def views(self, samples: Tensor, epoch: Key, view: int) -> Tensor:
        """Return view number `view` of the training images `samples`, (rows, c, size, size)."""
        return self.source.any_views([(samples, view)], epoch)[0]

    def accuracies(self, pause: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Return the share of validation images that the nearest training images get right.

        With `monitor.linear`, also the share that a linear classifier of the training images gets
        right. `pause` is called between batches; what it raises ends the evaluation.
        """
        config, encoder = self.config, self.moco.query_encoder
        batch_norm.average_statistics(encoder)
        encoder.eval()
        train, validation = self.splits.train.labelled(), self.splits.validation
        classes, settings = len(train.classes), (config.views, config.batch_size, pause)

        def extracted(seen: nn.Module) -> list[Tensor]:
            with self.accelerator.autocast():
                return [features.extract(seen, part, *settings) for part in (train, validation)]

        seen = encoder if config.knn.features == "head" else encoder.backbone
        bank, queries = extracted(seen)
        pause()
        self.nearest = features.nearest(queries[: media.ROWS], bank, media.NEIGHBOURS)
        mine = features.share(len(queries))
        predicted = features.predict(
            *(queries[mine], bank, train.labels, classes),
            *(config.knn.k, config.knn.temperature),
        )
        right = comms.total((predicted == validation.labels[mine]).sum())
        found: dict[str, float] = {Metric.KNN_TOP1: float(right) / len(queries)}
        if config.monitor.linear:
            if seen is encoder:
                bank, queries = extracted(encoder.backbone)
            logits = features.linear_logits(queries, bank, train.labels, classes, pause)
            right = (logits.argmax(1) == validation.labels).sum()
            found[Metric.ONLINE_TOP1] = float(right) / len(queries)
        return found

    def restore(self, saved: Checkpoint) -> None:
        """Take over the state of a checkpoint, whatever number of processes wrote it."""
        datasets.require_same(saved.piece("data"), self.splits, saved.path)
        state.restore(self.moco, self.optimizer, self.config.bn_groups, saved)
        self.evaluated, self.best = saved.piece("evaluated"), saved.piece("best")
        self.step = saved.step
        peers.me.mark(self.step, "starting")
