"""The linear probe of frozen encoders: its state, one step of it, its figures and checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_dist import (
    checkpoint,
    comms,
    data,
    features,
    fingerprint,
    guard,
    knn,
    peers,
    schedule,
)
from moco_dist.config import EncoderConfig, ProbeConfig
from moco_dist.config_files import to_dict
from moco_dist.encoder import Encoder, build_encoder
from moco_dist.errors import ConfigError, NumbersError
from moco_dist.plan import Plan, check_batch
from moco_dist.runtime import Session
from moco_dist.view_source import view_source

# The trained encoder, and a randomly initialised one that says what the architecture alone gives.
TRAINED, CONTROL = "probe", "control"


class Heads(nn.Module):
    """One linear classifier for each encoder, trained side by side without touching each other."""

    def __init__(self, names: list[str], num_features: int, num_classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict()
        for name in names:  # in turn: the first one's weights don't depend on the others
            head = nn.Linear(num_features, num_classes)
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
            self.heads[name] = head

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the logits (rows, classes) for the features (rows, features) of each encoder."""
        return {name: head(inputs[name]) for name, head in self.heads.items()}


class LinearProbe:
    """A probe in the making: state is in `heads`, `optimizer` and `step`, encoders never change."""

    def __init__(
        self,
        config: ProbeConfig,
        session: Session,
        splits: data.Splits,
        encoder: Encoder,
        architecture: EncoderConfig,
    ) -> None:
        self.config, self.session, self.accelerator = config, session, session.accelerator
        device = session.device
        peers.together(lambda: check_batch(config.batch_size, comms.world_size()))
        self.splits = splits.to(device)
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.encoders = {TRAINED: encoder}
        if config.control:
            self.encoders[CONTROL] = build_encoder(architecture, config.seed + 1)
        for each in self.encoders.values():
            each.requires_grad_(False).eval().to(device, self.dtype)
        self.frozen = {name: fingerprint.of_module(each) for name, each in self.encoders.items()}
        parts = {
            "train": self.splits.train,
            "validation": self.splits.validation,
            "test": self.splits.test,
        }
        self.parts = {name: part for name, part in parts.items() if len(part)}
        # The encoders are frozen: the features of unaugmented images are computed once.
        self.features = {
            (name, part): self.extract(each, images)
            for name, each in self.encoders.items()
            for part, images in self.parts.items()
        }
        # Features of the control are scaled to the size of the trained ones: the same learning rate
        # then suits both, and a scale is nothing that a linear classifier could not undo.
        size = {name: self.features[name, "train"].square().mean().sqrt() for name in self.encoders}
        self.scale = {name: size[TRAINED] / size[name] for name in self.encoders}
        self.features = {key: self.scale[key[0]] * each for key, each in self.features.items()}
        self.plan = peers.together(
            lambda: Plan(
                num_samples=len(splits.train),
                batch_size=config.batch_size,
                seed=config.seed,
                rank=comms.rank(),
                world_size=comms.world_size(),
                device=device,
            )
        )
        self.source = view_source(
            self.splits.train, config.views, self.plan, [(0, None)], self.dtype, "plan"
        )
        self.total_steps = config.epochs * self.plan.steps_per_epoch
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            heads = Heads(list(self.encoders), encoder.num_features, len(splits.train.classes))
        self.heads = heads.to(device, self.dtype)
        self.optimizer = torch.optim.SGD(
            self.heads.parameters(),
            lr=config.optim.lr,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
        )
        self.classify: Callable[[dict[str, Tensor]], dict[str, Tensor]] = self.accelerator.prepare(
            self.heads
        )
        self.step = 0
        if saved := session.resumed:
            peers.together(lambda: self.restore(saved))

    def extract(self, encoder: Encoder, images: data.AnyImages) -> Tensor:
        """Return the features of the unaugmented images, (len(images), features), everywhere."""
        with self.accelerator.autocast():
            found = features.extract(
                encoder.backbone, images, self.config.views, self.config.batch_size
            )
        return found.to(self.dtype)

    @torch.no_grad()
    def inputs(self, epoch: int, samples: Tensor) -> dict[str, Tensor]:
        """Return each encoder's training features of `samples`: of new views, or computed once."""
        if not self.config.augment:
            return {name: self.features[name, "train"][samples] for name in self.encoders}
        self.source.begin(self.step)
        made = self.source.views(samples, epoch, 0)
        with self.accelerator.autocast():
            found = {name: each.backbone(made) for name, each in self.encoders.items()}
        return {name: self.scale[name] * each.to(self.dtype) for name, each in found.items()}

    def train_step(self) -> Tensor:
        """Do one step of every head; return the trained encoder's mean loss on this process."""
        optim, per_epoch = self.config.optim, self.plan.steps_per_epoch
        # Steps on features that are there already are too short to ask each time.
        if self.config.augment or self.step % 20 == 0:
            self.session.pause("training")
        rows = self.plan.step(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.learning_rate(optim, self.step, per_epoch, self.total_steps)
        samples = rows.samples[rows.query_rows]
        labels = self.splits.train.labels[samples]
        logits = self.classify(self.inputs(rows.epoch, samples))
        losses = {name: F.cross_entropy(each, labels) for name, each in logits.items()}
        self.accelerator.backward(torch.stack(list(losses.values())).sum())
        gradient_norm, _ = guard.norms(list(self.heads.parameters()))
        if not gradient_norm.isfinite():  # the same on all processes
            self.optimizer.zero_grad()
            error = NumbersError(
                f"train/loss or its gradient is not finite in step {self.step}; nothing of it was "
                f"kept. Train anew with a lower optim.lr than {optim.lr:g} and name=..."
            )
            error.details = {"step": self.step, "samples": rows.samples.tolist()}
            raise error.on_all()
        self.session.saver.copied()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        peers.me.mark(self.step, "training")
        return losses[TRAINED].detach()

    @torch.no_grad()
    def evaluate(self, name: str, part: str) -> dict[str, float]:
        """Return loss, top-1, top-k of a part; each image counts once, however many processes."""
        images = self.parts[part]
        mine = features.share(len(images)).to(self.session.device)
        logits = self.heads.heads[name](self.features[name, part][mine])
        labels = images.labels[mine]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        best = logits.topk(self.config.top_k, dim=1).indices == labels[:, None]
        sums = torch.stack([loss.double(), best[:, 0].sum().double(), best.sum().double()])
        values = (comms.total(sums) / len(images)).tolist()
        return dict(zip(("loss", "top1", f"top{self.config.top_k}"), values, strict=True))

    def confusion(self, name: str, part: str) -> Tensor:
        """Return how many images of each class are taken for which, int64 (true, predicted)."""
        images, classes = self.parts[part], len(self.splits.train.classes)
        mine = features.share(len(images)).to(self.session.device)
        predicted = self.heads.heads[name](self.features[name, part][mine]).argmax(1)
        pairs = images.labels[mine] * classes + predicted
        return comms.total(pairs.bincount(minlength=classes**2)).reshape(classes, classes)

    def knn_top1(self, name: str, part: str) -> float:
        """Return the share of a part's images that the nearest training images classify rightly."""
        images, settings = self.parts[part], self.config.knn
        mine = features.share(len(images)).to(self.session.device)
        train = self.parts["train"]
        predicted = knn.predict(
            self.features[name, part][mine],
            self.features[name, "train"],
            train.labels,
            len(train.classes),
            settings.k,
            settings.temperature,
        )
        return float(comms.total((predicted == images.labels[mine]).sum())) / len(images)

    def check_frozen(self) -> None:
        """Prove that no tensor of an encoder has moved since the probe began."""
        for name, each in self.encoders.items():
            now = fingerprint.of_module(each)
            assert now == self.frozen[name], (
                f"the {name} encoder moved: {self.frozen[name]} -> {now}"
            )

    def save(self, wait: bool = False) -> None:
        """Save the classifiers after `step` steps, in the background or at once."""
        self.check_frozen()
        momentum = checkpoint.momentum_buffers(self.optimizer, self.heads)
        state = {
            "epoch": self.step / self.plan.steps_per_epoch,
            "encoder": self.frozen[TRAINED],
            "classes": list(self.splits.train.classes),
            "run_id": self.session.run_id,
            "data": self.splits.fingerprint,
            "config": to_dict(self.config),
        }
        self.session.save(self.step, self.heads.state_dict(), momentum, state, wait)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Take over the state of a checkpoint, whatever number of processes wrote it."""
        now = {"encoder": self.frozen[TRAINED], "data": self.splits.fingerprint}
        before = {key: saved.piece(key) for key in now}
        changed = [f"{key} {before[key]} -> {now[key]}" for key in now if before[key] != now[key]]
        if changed:
            raise ConfigError(
                f"{saved.path}: is the probe of another encoder or of other images "
                f"({'; '.join(changed)}); give name=... for a new probe"
            )
        momentum = checkpoint.momentum_shapes(self.optimizer, self.heads)
        checkpoint.check_tensors(momentum, saved.optimizer, saved.path)
        checkpoint.load_tensors(self.heads, saved.model, saved.path)
        checkpoint.restore_momentum(self.optimizer, self.heads, saved.optimizer)
        self.step = saved.step
        peers.me.mark(self.step, "starting")
