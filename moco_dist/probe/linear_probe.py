"""The probe of encoders: its state, one step of all its heads, its figures and checkpoints."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.yaml_files import to_dict
from moco_dist.data import datasets
from moco_dist.data.view_source import view_source
from moco_dist.distributed import comms, fingerprint, peers
from moco_dist.encoders import features
from moco_dist.encoders.load import Found
from moco_dist.errors import ConfigError, NumbersError
from moco_dist.method import views
from moco_dist.method.encoder import Backbone, build_encoder
from moco_dist.method.plan import Plan, check_batch
from moco_dist.probe import heads, label_fraction
from moco_dist.probe.finetune import FineTuning, calibrate
from moco_dist.probe.frozen import Frozen
from moco_dist.runs import checkpoint
from moco_dist.runs.record import CONTROL, TRAINED
from moco_dist.runs.session import Session

# Images by which the random encoder that is to be fine-tuned gets its statistics.
CALIBRATION = 256


class LinearProbe:
    """A probe in the making: state is in `heads`, `optimizer`, `best`, `step`, and `tuning`.

    Classifiers have the places (encoders, seeds, points of the grid); see `heads.Heads`. A frozen
    encoder's classifiers are trained by every process on the whole batch, of which each computed
    its share of the features: nothing but features ever crosses the network, and on features that
    were computed once all numbers of processes give the same bits.
    """

    def __init__(
        self, config: ProbeConfig, session: Session, splits: datasets.Splits, source: Found
    ) -> None:
        self.config, self.session, self.accelerator = config, session, session.accelerator
        device = session.device
        self.tunes = config.protocol == "finetune"
        if config.augment or self.tunes:
            peers.together(lambda: check_batch(config.batch_size, comms.world_size()))
        self.seeds = range(config.seed, config.seed + config.seeds)
        # Rows of the training images that each seed learns from, int64 (seeds, images).
        self.subsets = peers.together(lambda: self._subsets(splits.train)).to(device)
        self.splits = splits.to(device)
        self.parts = {
            name: part
            for name in ("train", "validation", "test")
            if len(part := getattr(self.splits, name))
        }
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.backbones = self._backbones(source)
        self.names = list(self.backbones)
        self.identity = fingerprint.of_module(self.backbones[TRAINED])
        self.frozen = Frozen(self.backbones, parameters=not self.tunes)
        # Features of the control are scaled to the size of the trained ones: the same learning rate
        # then suits both, and a scale is nothing that a linear classifier could not undo.
        self.scale = torch.ones(len(self.names), 1, 1, dtype=self.dtype, device=device)
        # Of unaugmented images, (encoders, images, features), by part.
        self.features = {"train": self.extract("train")}
        size = self.features["train"].square().mean((1, 2), keepdim=True).sqrt()
        # An encoder whose features are all 0 is left to the verdict.
        self.scale = torch.where((size > 0).all(), size[:1] / size, self.scale)
        self.features["train"] *= self.scale
        self.features |= {part: self.extract(part) for part in self.parts if part != "train"}
        self.plans = peers.together(self._plans)
        # Of each seed, the images that it learns from, numbered as in its plan.
        self.sources = [
            view_source(self._known(subset), config.views, plan, [(0, None)], self.dtype, "plan")
            for subset, plan in zip(self.subsets, self.plans, strict=True)
        ]
        self.steps_per_epoch = self.plans[0].steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        self.points = heads.points(config.grid, config.optim)
        num_features, num_classes = self.features["train"].shape[2], len(splits.train.classes)
        self.heads = heads.Heads(
            len(self.names), self.seeds, len(self.points), num_features, num_classes
        ).to(device, self.dtype)
        self.optimizer = heads.HeadOptimizer(self.heads, self.points, config.optim)
        self.best = heads.Best(self.heads)
        self.tuning = self._tuning() if self.tunes else None
        self.step = 0
        if saved := session.resumed:
            peers.together(lambda: self.restore(saved))

    def _known(self, subset: Tensor) -> datasets.AnyImages:
        train = self.splits.train
        return train if len(subset) == len(train) else train[subset]

    def _subsets(self, train: datasets.AnyImages) -> Tensor:
        fraction = self.config.label_fraction
        return torch.stack([label_fraction.draw(train, fraction, seed) for seed in self.seeds])

    def _backbones(self, source: Found) -> dict[str, Backbone]:
        backbones = {TRAINED: source.backbone}
        if self.config.control:
            control = build_encoder(source.architecture, self.config.seed + 1).backbone
            backbones[CONTROL] = control
        for each in backbones.values():
            each.requires_grad_(False).eval().to(self.session.device, self.dtype)
        if self.tunes and self.config.control:
            first = torch.arange(min(CALIBRATION, len(self.splits.train)))
            pixels = self.splits.train.squares(first)
            calibrate(control, views.center(pixels, self.config.views, self.dtype))
        return backbones

    def _plans(self) -> list[Plan]:
        return [
            Plan(
                num_samples=self.subsets.shape[1],
                batch_size=self.config.batch_size,
                seed=seed,
                rank=comms.rank(),
                world_size=comms.world_size(),
                device=self.session.device,
            )
            for seed in self.seeds
        ]

    def _tuning(self) -> FineTuning:
        optim = dataclasses.replace(self.config.optim, lr=self.config.encoder_lr)
        pixels = self.splits.train.squares(torch.arange(1))
        example = views.center(pixels, self.config.views, self.dtype)
        return FineTuning(self.backbones, optim, self.accelerator, example)

    def extract(self, part: str) -> Tensor:
        """Return each encoder's features of a part's unaugmented images, everywhere."""
        config, found = self.config, []
        with self.accelerator.autocast():
            for each in self.backbones.values():
                images = self.parts[part]
                found.append(features.extract(each, images, config.views, config.batch_size))
        return torch.stack(found).to(self.dtype) * self.scale

    def refresh(self, *parts: str) -> None:
        """Compute the features of these parts again if the encoders have changed."""
        if self.tunes:
            self.features |= {part: self.extract(part) for part in parts}

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return features (encoders, seeds, rows, features) and labels (seeds, rows) of a step.

        And the images of its batch, int64 (seeds, batch). With encoders that are trained, the rows
        are this process's share; else those of the whole batch.
        """
        steps = [plan.step(self.step, key_views=0) for plan in self.plans]
        pairs = zip(self.subsets, steps, strict=True)
        batch = torch.stack([subset[each.samples] for subset, each in pairs])
        labels = self.splits.train.labels
        if not self.config.augment and not self.tunes:
            rows = self.features["train"].index_select(1, batch.flatten())
            return rows.unflatten(1, batch.shape), labels[batch], batch
        self.frozen.check_modes()
        local = self.plans[0].local_rows
        mine, found = batch[:, local], []
        for number, (step, samples) in enumerate(zip(steps, mine, strict=True)):
            if self.config.augment:
                source = self.sources[number]
                source.begin(self.step)
                (made,) = source.views([(step.samples[local], 0)], step.epoch)
            else:
                pixels = self.splits.train.squares(samples)
                made = views.center(pixels, self.config.views, self.dtype)
            found.append(self.encode(made))
        encoded = torch.stack(found, dim=1)
        if self.tunes:
            return encoded, labels[mine], batch
        # Rows first: processes hold consecutive rows of each seed's batch.
        whole = comms.all_gather(encoded.permute(2, 0, 1, 3))
        return whole.permute(1, 2, 0, 3), labels[batch], batch

    def encode(self, images: Tensor) -> Tensor:
        """Return each encoder's features of views, (encoders, rows, features)."""
        networks = self.tuning.networks if self.tuning else self.backbones
        with self.accelerator.autocast(), torch.set_grad_enabled(self.tunes):
            found = [each(images) for each in networks.values()]
        return torch.stack(found).to(self.dtype) * self.scale

    def train_step(self) -> Tensor:
        """Do one step of every head; return their mean losses, (encoders, seeds, points)."""
        place = self.step, self.steps_per_epoch, self.total_steps
        # Steps on features that are there already are too short to ask each time.
        if self.config.augment or self.tunes or self.step % 20 == 0:
            self.session.pause("training")
        encoded, labels, batch = self.inputs()
        losses = heads.losses(self.heads(encoded), labels).mean(-1)
        self.accelerator.backward(losses.sum())
        if self.tuning:
            for parameter in self.heads.parameters():
                assert parameter.grad is not None, "there was a backward pass"
                parameter.grad = comms.mean(parameter.grad)
        self.require_finite(batch)
        self.session.saver.copied()
        self.optimizer.step(self.optimizer.rates(*place))
        if self.tuning:
            self.tuning.step(*place)
        self.step += 1
        peers.me.mark(self.step, "training")
        return losses.detach()

    def require_finite(self, batch: Tensor) -> None:
        """Raise NumbersError, on all processes alike, if a gradient of the step is not finite."""
        weight = self.heads.weight.grad
        assert weight is not None, "there was a backward pass"
        norms = torch.linalg.vector_norm(weight, dim=(3, 4))
        total = norms.sum()
        if self.tuning:
            others = [p.grad for p in self.tuning.encoders.parameters() if p.grad is not None]
            total = total + torch.stack(torch._foreach_norm(others)).sum()
        if total.isfinite():
            return
        bad = (~norms.isfinite()).nonzero().tolist()
        encoder, _, point = bad[0] if bad else (0, 0, 0)
        lr, decay = self.points[point].lr, self.points[point].weight_decay
        error = NumbersError(
            f"train/loss or its gradient is not finite in step {self.step} ({self.names[encoder]} "
            f"with lr {lr:g} and weight decay {decay:g}); nothing of it was kept. Train again with "
            f"lower rates than optim.lr or grid.lr {lr:g}, and name=..."
        )
        error.details = {"step": self.step, "samples": batch.flatten().tolist()}
        raise error.on_all()

    @torch.no_grad()
    def evaluate(self, part: str, best: bool = False) -> Tensor:
        """Return the mean loss, its square, top-1 and top-k of each head, float64 (..., 4).

        Each image counts once, however many processes. `best` takes each head as it was after its
        best epoch.
        """
        mine = slice(comms.rank(), None, comms.world_size())
        inputs, labels = self.features[part][:, None, mine], self.parts[part].labels[None, mine]
        tensors = self.best.tensors if best else self.heads.state_dict()
        sums = heads.sums(inputs, labels, tensors["weight"], tensors["bias"], self.config.top_k)
        return comms.total(sums) / len(self.parts[part])

    def note_best(self) -> Tensor:
        """Return the figures of the epoch that has ended on the validation images.

        Heads for which it was the best epoch are kept for the end.
        """
        figures = self.evaluate("validation")
        self.best.note(self.heads, figures[..., 2], self.step // self.steps_per_epoch)
        return figures

    def save(self, wait: bool = False) -> None:
        """Save the classifiers after `step` steps, in the background or at once."""
        if wait or self.config.augment:
            self.frozen.check()
        model, momentum = self.tensors()
        fix = "a machine has miscalculated: continue without it, from the last checkpoint"
        what = f"the checksum of the heads after step {self.step}"
        peers.same_everywhere(what, fingerprint.checksum(*model.values()), fix)
        state = {
            "epoch": self.step / self.steps_per_epoch,
            "encoder": self.identity,
            "classes": list(self.splits.train.classes),
            "run_id": self.session.run_id,
            "data": self.splits.fingerprint,
            "config": to_dict(self.config),
        }
        self.session.save(self.step, model, momentum, state, wait)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the tensors of the state by name: the model's, and the optimizers'."""
        model = {f"heads.{name}": each for name, each in self.heads.state_dict().items()}
        model |= {f"best.{name}": each for name, each in self.best.tensors.items()}
        momentum = {f"momentum.heads.{name}": b for name, b in self.optimizer.buffers.items()}
        if self.tuning:
            encoders, theirs = self.tuning.state()
            model, momentum = model | encoders, momentum | theirs
        return model, momentum

    @torch.no_grad()
    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Take over the state of a checkpoint, whatever number of processes wrote it."""
        now = {"encoder": self.identity, "data": self.splits.fingerprint}
        before = {key: saved.piece(key) for key in now}
        changed = [f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
        if changed:
            raise ConfigError(
                f"{saved.path}: is the probe of another encoder or of other images "
                f"({'; '.join(changed)}); give name=... for a new probe"
            )
        model, momentum = self.tensors()
        shapes = {name: each.shape for name, each in momentum.items()}
        if self.tuning:
            shapes |= self.tuning.shapes()[1]
        checkpoint.check_tensors(model, saved.model, saved.path)
        checkpoint.check_tensors(shapes, saved.optimizer, saved.path)
        own = {name: each for name, each in model.items() if not name.startswith("encoders.")}
        for name, tensor in own.items():
            tensor.copy_(saved.model[name])
        for name, tensor in self.optimizer.buffers.items():
            tensor.copy_(saved.optimizer[f"momentum.heads.{name}"])
        if self.tuning:
            self.tuning.restore(saved)
        self.step = saved.step
        peers.me.mark(self.step, "starting")
