"""The linear probe: its state, training step, evaluation and checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from moco_dist.config.probe import ProbeConfig
from moco_dist.data import datasets
from moco_dist.data.view_source import view_source
from moco_dist.distributed import comms, fingerprint, peers
from moco_dist.encoders.load import Found
from moco_dist.errors import ConfigError, DataError, NumbersError, StoppedError
from moco_dist.method import views
from moco_dist.method.cuda_graph import Replayed
from moco_dist.method.plan import Plan, check_batch
from moco_dist.probe import heads, state
from moco_dist.probe.extraction import extract
from moco_dist.probe.finetune import CALIBRATION, FineTuning, calibrate
from moco_dist.probe.frozen import Frozen, both
from moco_dist.probe.label_fraction import draw
from moco_dist.randomness import Key
from moco_dist.runs import checkpoint
from moco_dist.runs.record import CONTROL, TRAINED
from moco_dist.runs.session import Session


class LinearProbe:
    """A probe in training; `heads`, `optimizer`, `best`, `tuning` and `step` hold the state.

    With frozen encoders, each process computes features of its share of the batch, gathers the
    others, and trains all classifiers on the whole batch. Cached features therefore give the same
    bits on any number of processes.
    """

    def __init__(
        self, config: ProbeConfig, session: Session, splits: datasets.Splits, source: Found
    ) -> None:
        self.config, self.session, self.accelerator = config, session, session.accelerator
        device = session.device
        self.tunes = config.protocol == "finetune"
        if config.augment or self.tunes:
            peers.together(lambda: check_batch(config.batch_size, comms.world_size()))
        self.seeds, fraction = range(config.seed, config.seed + config.seeds), config.label_fraction
        # Rows of the training images that each seed learns from, int64 (seeds, images).
        self.subsets = peers.together(
            lambda: torch.stack([draw(splits.train, fraction, seed) for seed in self.seeds])
        ).to(device)
        self.splits = splits.to(device)
        self.parts = {
            name: part
            for name in ("train", "validation", "test")
            if len(part := getattr(self.splits, name))
        }
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.backbones = both(source, config, device, self.dtype)
        if self.tunes and config.control:
            first = torch.arange(min(CALIBRATION, len(self.splits.train)))
            calibrate(self.backbones[CONTROL], self._center(first))
        self.names = list(self.backbones)
        self.identity = fingerprint.of_module(self.backbones[TRAINED])
        self.frozen = Frozen(self.backbones, parameters=not self.tunes)
        # The control's features are scaled to the size of the trained encoder's, so that the same
        # learning rate suits both; a linear classifier could undo the scale.
        self.scale = torch.ones(len(self.names), 1, 1, dtype=self.dtype, device=device)
        # By part, features of unaugmented images (encoders, images, features).
        self.features = {"train": self.extract("train")}
        size = self.features["train"].square().mean((1, 2), keepdim=True).sqrt()
        # The verdict deals with an encoder whose features are all 0.
        self.scale = torch.where((size > 0).all(), size[:1] / size, self.scale)
        self.features["train"] *= self.scale
        self.features |= {part: self.extract(part) for part in self.parts if part != "train"}
        count, size_of_batch = self.subsets.shape[1], config.batch_size
        place = {"rank": comms.rank(), "world_size": comms.world_size()}
        self.plans = peers.together(
            lambda: [Plan(count, size_of_batch, s, **place, device=device) for s in self.seeds]
        )
        # For each seed, the images that it learns from, numbered as in its plan.
        train = self.splits.train
        known = [train if count == len(train) else train[subset] for subset in self.subsets]
        self.sources = [
            view_source(images, [config.views], plan, [(0, None)], self.dtype, "plan")
            for images, plan in zip(known, self.plans, strict=True)
        ]
        self.steps_per_epoch = self.plans[0].steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        decays = config.grid.weight_decay or [config.optim.weight_decay]
        self.points = [heads.Point(lr, decay) for decay in decays for lr in config.rates()]
        num_features, num_classes = self.features["train"].shape[2], len(splits.train.classes)
        self.heads = heads.Heads(
            len(self.names), self.seeds, len(self.points), num_features, num_classes
        ).to(device, self.dtype)
        self.optimizer = heads.HeadOptimizer(self.heads, self.points, config.optim)
        self.best = heads.Best(self.heads)
        self.tuning = None
        if self.tunes:
            optim = dataclasses.replace(config.optim, lr=config.encoder_lr)
            example = self._center(torch.arange(1))
            self.tuning = FineTuning(self.backbones, optim, self.accelerator, example)
        self.step = 0
        # A GPU is not waited for in each step: whether all steps since `settled` were good, and how
        # many were before the first that wasn't, is known there and read from time to time.
        self.settles = device.type == "cuda" and not self.tunes
        # Such a step is a CUDA graph; of several processes, only its views and encoders are.
        self.captures = self.settles and config.runtime.cuda_graph
        self.captures_all = self.captures and comms.world_size() == 1
        self._graph: Replayed | None = None
        self.settled = 0
        self.good = torch.ones((), dtype=torch.bool, device=device)
        self.kept = torch.zeros((), dtype=torch.int64, device=device)
        if saved := session.resumed:
            peers.together(lambda: self.restore(saved))

    def _center(self, rows: Tensor) -> Tensor:
        """Return unaugmented views of these training images."""
        return views.center(self.splits.train.squares(rows), self.config.views, self.dtype)

    def extract(self, part: str) -> Tensor:
        """Return each encoder's features of a part's unaugmented images, on every process."""
        own, given = self.backbones.values(), (self.config, self.session, self.splits)
        return extract(own, self.parts[part], *given).to(self.dtype) * self.scale

    def refresh(self, *parts: str) -> None:
        """Extract the features of these parts again if the encoders are trained."""
        if self.tunes:
            self.features |= {part: self.extract(part) for part in parts}

    def rows(self) -> tuple[Tensor, list[int]]:
        """Return the images of a step as numbers of the plans, int64 (seeds, batch), and epochs."""
        steps = [plan.step(self.step, key_views=0) for plan in self.plans]
        return torch.stack([each.samples for each in steps]), [int(each.epoch) for each in steps]

    def inputs(self, samples: Tensor, *epochs: Key) -> tuple[Tensor, Tensor]:
        """Return features (encoders, seeds, rows, features) and labels (seeds, rows) of `rows`.

        In fine-tuning, the rows are this process's share of the batch; otherwise they are the whole
        batch.
        """
        batch, labels = self.subsets.gather(1, samples), self.splits.train.labels
        if not self.config.augment and not self.tunes:
            rows = self.features["train"].index_select(1, batch.flatten())
            return rows.unflatten(1, batch.shape), labels[batch]
        self.frozen.check_modes()
        local = self.plans[0].local_rows
        if not self.config.augment:
            made = [self.encode(self._center(mine)) for mine in batch[:, local]]
            encoded = torch.stack(made, dim=1)
        elif self.captures and not self.captures_all:
            encoded = self._replayed(self._encoded, samples[:, local], *epochs)
        else:
            encoded = self._encoded(samples[:, local], *epochs)
        if self.tunes:
            return encoded, labels[batch[:, local]]
        # Rows first: processes hold consecutive rows of each seed's batch.
        whole = comms.all_gather(encoded.permute(2, 0, 1, 3))
        return whole.permute(1, 2, 0, 3), labels[batch]

    def _encoded(self, samples: Tensor, *epochs: Key) -> Tensor:
        asked = zip(self.sources, samples, epochs, strict=True)
        made = (source.views([(mine, 0)], epoch)[0] for source, mine, epoch in asked)
        return torch.stack([self.encode(images) for images in made], dim=1)

    def encode(self, images: Tensor) -> Tensor:
        """Return each encoder's features of views, (encoders, rows, features)."""
        networks = self.tuning.networks if self.tuning else self.backbones
        with self.accelerator.autocast(), torch.set_grad_enabled(self.tunes):
            found = [each(images) for each in networks.values()]
        return torch.stack(found).to(self.dtype) * self.scale

    def train_step(self) -> Tensor:
        """Train every head for one step; return the mean losses (encoders, seeds, points)."""
        place = self.step, self.steps_per_epoch, self.total_steps
        # Steps on cached features are too short to check for a stop request each time.
        often = self.step % 20 == 0
        if often:
            self.settle()
        samples, epochs = self.rows()
        rates = torch.tensor(self.optimizer.rates(*place), dtype=self.dtype)
        rates = comms.without_waiting(rates, self.session.device)
        if self.config.augment:
            for source in self.sources:
                source.begin(self.step)
        losses = None if self.captures_all else self.add_gradients(samples, *epochs)
        if self.config.augment or self.tunes or often:
            try:
                self.session.pause("training")  # also for an image that could not be read
            except (StoppedError, DataError):
                self.settle()
                raise
        if not self.settles:
            self.require_finite()
        self.session.saver.copied()
        if losses is None:
            losses = self._replayed(self._whole, rates, samples, *epochs)
        else:
            self._update(rates)
        if self.tuning:
            self.tuning.step(*place)
        self.step += 1
        peers.me.mark(self.step, "training")
        return losses

    def add_gradients(self, samples: Tensor, *epochs: Key) -> Tensor:
        """Compute the gradients of the step with these `rows`; return the heads' mean losses."""
        encoded, labels = self.inputs(samples, *epochs)
        losses = heads.losses(self.heads(encoded), labels).mean(-1)
        self.accelerator.backward(losses.sum())
        if self.tuning:
            for parameter in self.heads.parameters():
                assert parameter.grad is not None, "there was a backward pass"
                parameter.grad = comms.mean(parameter.grad)
        return losses.detach()

    def _update(self, rates: Tensor) -> None:
        """Update the heads by their gradients; on a GPU only if all steps so far were good."""
        if self.settles:
            self.good &= self.norms()[1].isfinite()
            self.kept += self.good
        self.optimizer.step(rates, self.good if self.settles else None)

    def _whole(self, rates: Tensor, samples: Tensor, *epochs: Key) -> Tensor:
        losses = self.add_gradients(samples, *epochs)
        self._update(rates)
        return losses

    def _replayed(self, work: Callable[..., Tensor], *inputs: Tensor | int) -> Tensor:
        """Return what `work` returns, by a CUDA graph."""
        if not self._graph:
            for source in self.sources:
                source.stay()
            self.good.fill_(False)  # so that the steps before the capture change nothing
            self._graph = Replayed(work, *inputs)
            self.good.fill_(True)
        return self._graph(*inputs)

    def settle(self) -> None:
        """Wait for the device; raise NumbersError if a step since the last time was not finite.

        That step and those after it have changed nothing, and `step` is again what it was before.
        """
        if not self.settles or bool(self.good):
            self.settled = self.step
            self.kept.zero_()
            return
        self.step = self.settled + int(self.kept)
        self.good.fill_(True)
        self.kept.zero_()
        samples, epochs = self.rows()
        for source in self.sources if self.config.augment else ():
            source.begin(self.step)
        self.add_gradients(samples, *epochs)  # the same step again, to name what it was
        self.require_finite()
        raise NumbersError(
            f"a gradient was not finite in step {self.step}, but is when the step is repeated; the "
            "step was discarded. A GPU has miscalculated: continue from the last checkpoint on "
            "another one"
        ).on_all()

    def norms(self) -> tuple[Tensor, Tensor]:
        """Return the norms of the heads' gradients, (encoders, seeds, points), and of all, ()."""
        weight = self.heads.weight.grad
        assert weight is not None, "there was a backward pass"
        norms = torch.linalg.vector_norm(weight, dim=(3, 4))
        total = norms.sum()
        if self.tuning:
            others = [p.grad for p in self.tuning.encoders.parameters() if p.grad is not None]
            total = total + torch.stack(torch._foreach_norm(others)).sum()
        return norms, total

    def require_finite(self) -> None:
        """Raise NumbersError on all processes if a gradient of the step is not finite."""
        norms, total = self.norms()
        if total.isfinite():
            return
        bad = (~norms.isfinite()).nonzero().tolist()
        encoder, _, point = bad[0] if bad else (0, 0, 0)
        lr, decay = self.points[point].lr, self.points[point].weight_decay
        error = NumbersError(
            f"train/loss or its gradient is not finite in step {self.step} ({self.names[encoder]} "
            f"with lr {lr:g} and weight decay {decay:g}); the step was discarded. Train again with "
            f"an optim.lr or grid.lr below {lr:g} and a new name=..."
        )
        samples = self.subsets.gather(1, self.rows()[0]).flatten().tolist()
        error.details = {"step": self.step, "samples": samples}
        raise error.on_all()

    @torch.no_grad()
    def evaluate(self, part: str, best: bool = False) -> Tensor:
        """Return the mean loss, squared loss, top-1 and top-k of each head, float64 (..., 4).

        `best` evaluates each head as it was after its best epoch.
        """
        self.settle()
        mine = slice(comms.rank(), None, comms.world_size())
        inputs, labels = self.features[part][:, None, mine], self.parts[part].labels[None, mine]
        tensors = self.best.tensors if best else self.heads.state_dict()
        sums = heads.sums(inputs, labels, tensors["weight"], tensors["bias"], self.config.top_k)
        return comms.total(sums) / len(self.parts[part])

    def note_best(self) -> Tensor:
        """Return the figures on the validation images after an epoch; keep each head's best."""
        figures = self.evaluate("validation")
        self.best.note(self.heads, figures[..., 2], self.step // self.steps_per_epoch)
        return figures

    def save(self, wait: bool = False) -> None:
        """Save the state in the background, or before returning if `wait`."""
        self.settle()
        if wait or self.config.augment:
            self.frozen.check()
        model, momentum = self.tensors()
        fix = "one machine miscalculated: continue from the last checkpoint without it"
        what = f"the checksum of the heads after step {self.step}"
        peers.same_everywhere(what, fingerprint.checksum(*model.values()), fix)
        about = {
            "epoch": self.step / self.steps_per_epoch,
            "encoder": self.identity,
            "classes": list(self.splits.train.classes),
            "data": self.splits.fingerprint,
        }
        self.session.save(self.step, model, momentum, about, wait)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the tensors of the models and of the optimizers, by name."""
        return state.tensors(self.heads, self.best, self.optimizer, self.tuning)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Load the state of a checkpoint; ConfigError if it is of another encoder or data."""
        now = {"encoder": self.identity, "data": self.splits.fingerprint}
        before = {key: saved.piece(key) for key in now}
        changed = [f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
        if changed:
            raise ConfigError(
                f"{saved.path}: is the probe of another encoder or of other images "
                f"({'; '.join(changed)}); give a new probe another name=..."
            )
        state.restore(saved, self.heads, self.best, self.optimizer, self.tuning)
        self.step = self.settled = saved.step
        peers.me.mark(self.step, "starting")
