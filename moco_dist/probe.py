"""Measure a pretrained encoder: train a linear classifier on its frozen features, and on a random encoder's."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from moco_dist import checkpoint, comms, data, features, fingerprint, knn, runtime, schedule, views
from moco_dist.config import PretrainConfig, ProbeConfig, to_dict
from moco_dist.encoder import Encoder, build_encoder, calibrate
from moco_dist.errors import ConfigError
from moco_dist.plan import Plan, check_batch
from moco_dist.runtime import Session, console, logger

# The trained encoder, and a randomly initialised one that says what the architecture alone gives.
TRAINED, CONTROL = "probe", "control"
CALIBRATION_IMAGES = 512


class Heads(nn.Module):
    """One linear classifier for each encoder, trained side by side without touching each other."""

    def __init__(self, names: list[str], num_features: int, num_classes: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(num_features, num_classes) for name in names})
        for head in self.heads.values():
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the logits (rows, classes) for the features (rows, features) of each encoder."""
        return {name: head(inputs[name]) for name, head in self.heads.items()}


class Probing:
    """A probe in the making. All state is in `heads`, `optimizer` and `step`; the encoders never change."""

    def __init__(
        self, config: ProbeConfig, session: Session, splits: data.Splits, encoder: Encoder, pretrained: PretrainConfig
    ) -> None:
        self.config, self.session, self.accelerator = config, session, session.accelerator
        device = session.device
        check_batch(config.batch_size, comms.world_size())
        self.splits = splits.to(device)
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.encoders = {TRAINED: encoder}
        if config.control:
            self.encoders[CONTROL] = build_encoder(pretrained.encoder, config.seed + 1)
        for each in self.encoders.values():
            each.requires_grad_(False).to(device, self.dtype)
        if config.control:  # with statistics of real images its features are as large as a trained encoder's
            some = self.splits.train.pixels[:CALIBRATION_IMAGES]
            calibrate(self.encoders[CONTROL], views.center(some, config.views, self.dtype))
        self.frozen = {name: fingerprint.of_module(each) for name, each in self.encoders.items()}
        parts = {"train": self.splits.train, "validation": self.splits.validation, "test": self.splits.test}
        self.parts = {name: part for name, part in parts.items() if len(part)}
        # The encoders are frozen: the features of unaugmented images are computed once.
        self.features = {
            (name, part): self.extract(each, images)
            for name, each in self.encoders.items()
            for part, images in self.parts.items()
        }
        self.plan = Plan(
            num_samples=len(splits.train),
            batch_size=config.batch_size,
            seed=config.seed,
            rank=comms.rank(),
            world_size=comms.world_size(),
            device=device,
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
        self.classify: Callable[[dict[str, Tensor]], dict[str, Tensor]] = self.accelerator.prepare(self.heads)
        self.step = 0
        if session.resumed:
            self.restore(session.resumed)

    def extract(self, encoder: Encoder, images: data.Images) -> Tensor:
        """Return the features of the unaugmented images, (len(images), features), on every process."""
        with self.accelerator.autocast():
            found = features.extract(encoder.backbone, images, self.config.views, self.config.batch_size)
        return found.to(self.dtype)

    @torch.no_grad()
    def inputs(self, epoch: int, samples: Tensor) -> dict[str, Tensor]:
        """Return the training features of each encoder for `samples`: of new views, or the ones computed once."""
        if not self.config.augment:
            return {name: self.features[name, "train"][samples] for name in self.encoders}
        pixels = self.splits.train.pixels[samples]
        made = views.make(pixels, self.config.views, self.config.seed, epoch, samples, 0, self.dtype)
        with self.accelerator.autocast():
            return {name: each.backbone(made).to(self.dtype) for name, each in self.encoders.items()}

    def train_step(self) -> Tensor:
        """Do one step of every head; return the trained encoder's loss, the mean over this process's rows."""
        optim, per_epoch = self.config.optim, self.plan.steps_per_epoch
        rows = self.plan.step(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.learning_rate(optim, self.step, per_epoch, self.total_steps)
        samples = rows.samples[rows.query_rows]
        labels = self.splits.train.labels[samples]
        logits = self.classify(self.inputs(rows.epoch, samples))
        losses = {name: F.cross_entropy(each, labels) for name, each in logits.items()}
        self.accelerator.backward(torch.stack(list(losses.values())).sum())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return losses[TRAINED].detach()

    @torch.no_grad()
    def evaluate(self, name: str, part: str) -> dict[str, float]:
        """Return loss, top-1 and top-k on a part of the data; each image counts once on any number of processes."""
        images = self.parts[part]
        mine = features.share(len(images)).to(self.session.device)
        logits = self.heads.heads[name](self.features[name, part][mine])
        labels = images.labels[mine]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        best = logits.topk(self.config.top_k, dim=1).indices == labels[:, None]
        sums = torch.stack([loss.double(), best[:, 0].sum().double(), best.sum().double()])
        values = (comms.total(sums) / len(images)).tolist()
        return dict(zip(("loss", "top1", f"top{self.config.top_k}"), values, strict=True))

    def knn_top1(self, name: str, part: str) -> float:
        """Return the share of a part's images that their nearest training images classify rightly."""
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
            assert now == self.frozen[name], f"the {name} encoder moved: {self.frozen[name]} -> {now}"

    def save(self) -> None:
        """Write a checkpoint of the classifiers after `step` steps."""
        self.check_frozen()
        momentum = checkpoint.momentum_buffers(self.optimizer, self.heads)
        state = {
            "epoch": self.step / self.plan.steps_per_epoch,
            "encoder": self.frozen[TRAINED],
            "classes": list(self.splits.train.classes),
            "data": self.splits.fingerprint,
            "config": to_dict(self.config),
        }
        model = self.heads.state_dict()
        checkpoint.save(self.session.directory, self.step, model, momentum, state, self.config.checkpoint.keep)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Take over the state of a checkpoint, whatever number of processes wrote it."""
        now = {"encoder": self.frozen[TRAINED], "data": self.splits.fingerprint}
        changed = [f"{key} {saved.state[key]} -> {now[key]}" for key in now if saved.state[key] != now[key]]
        if changed:
            raise ConfigError(
                f"{saved.path}: is the probe of another encoder or of other images ({'; '.join(changed)}); "
                "give name=... for a new probe"
            )
        checkpoint.load_tensors(self.heads, saved.model, saved.path)
        checkpoint.restore_momentum(self.optimizer, self.heads, saved.optimizer)
        self.step = saved.step


def run(config: ProbeConfig) -> None:
    """Probe an encoder from where the run directory stands to the end."""
    if not config.encoder:
        raise ConfigError("encoder is empty; give encoder=runs/NAME, a run directory or a checkpoint folder")
    source = Path(config.encoder).expanduser()
    run_name = source.parent.parent.name if source.name.startswith("step_") else source.resolve().name
    config = dataclasses.replace(config, name=config.name or f"{run_name}-probe")
    encoder, pretrained, place = comms.together(lambda: _open_encoder(source))
    session = runtime.start(config)
    splits = data.load(config.data)
    data.require_labels(splits, config.data)
    splits = dataclasses.replace(splits, train=splits.train.labelled())
    classes = len(splits.train.classes)
    if config.top_k > classes:
        raise ConfigError(
            f"top_k={config.top_k} is more than the {classes} classes of {config.data.name}; use {classes} or less"
        )
    for key in ("size", "mean", "std"):
        ours, theirs = getattr(config.views, key), getattr(pretrained.views, key)
        if ours != theirs:
            logger.warning("views.%s=%s here and %s in pretraining; use the same", key, ours, theirs)
    probing = Probing(config, session, splits, encoder, pretrained)
    announce(probing, place)
    total = min(probing.total_steps, config.stop_at_step or probing.total_steps)
    with runtime.tracker(session, config, total) as tracker:
        loop(probing, total, tracker)
    probing.check_frozen()
    if probing.step == probing.total_steps:
        results = final_results(probing)
        runtime.finish(session, results)
        summarize(probing, results)


def _open_encoder(source: Path) -> tuple[Encoder, PretrainConfig, str]:
    found = checkpoint.find(source)
    return *checkpoint.load_encoder(found), f"{found.path} (step {found.step:,})"


def loop(probing: Probing, total: int, tracker: Any) -> None:
    """Train the heads up to step `total`."""
    config, per_epoch = probing.config, probing.plan.steps_per_epoch
    since, evaluated = time.monotonic(), probing.step
    part = "validation" if "validation" in probing.parts else "test"
    while probing.step < total:
        loss = probing.train_step()
        step, last = probing.step, probing.step == total
        epoch_ends = step % per_epoch == 0
        if epoch_ends or last:
            metrics = {"epoch": step / per_epoch, "train/loss": float(comms.mean(loss))}
            metrics["train/images_per_second"] = (step - evaluated) * config.batch_size / (time.monotonic() - since)
            for name in probing.encoders:
                metrics |= {f"{name}/{k}": v for k, v in probing.evaluate(name, part).items()}
            tracker.log(step, metrics | {"train/lr": probing.optimizer.param_groups[0]["lr"]})
            since, evaluated = time.monotonic(), step
        keep = config.checkpoint
        due = keep.every_epochs and epoch_ends and step // per_epoch % keep.every_epochs == 0
        if last or due or (keep.every_steps and step % keep.every_steps == 0):
            probing.save()


def final_results(probing: Probing) -> dict[str, dict[str, dict[str, float]]]:
    """Return the figures of the last step: encoder, part of the data, metric."""
    return {
        name: {
            part: probing.evaluate(name, part) | {"knn_top1": probing.knn_top1(name, part)}
            for part in probing.parts
            if part != "train"
        }
        for name in probing.encoders
    }


def announce(probing: Probing, place: str) -> None:
    """Print the banner."""
    config, splits, processes = probing.config, probing.splits, comms.world_size()
    rows = {
        "encoder": place,
        "data": f"{config.data.name}: {len(splits.train):,} training, {len(splits.validation):,} validation and "
        f"{len(splits.test):,} test images, {len(splits.train.classes)} classes",
        "features": f"{probing.heads.heads[TRAINED].in_features}, "
        + ("new views in each epoch" if config.augment else "computed once, without augmentation"),
        "batch": f"{config.batch_size} = {processes} x {config.batch_size // processes}",
        "steps": f"{probing.plan.steps_per_epoch:,} an epoch, {probing.total_steps:,} in {config.epochs} epochs",
    }
    runtime.banner(probing.session, "probe", rows)


def summarize(probing: Probing, results: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print the figures of the last epoch, trained encoder and control side by side."""
    if not comms.is_main():
        return
    table = Table(title=f"{probing.session.directory}: linear probe after {probing.config.epochs} epochs")
    table.add_column("encoder")
    table.add_column("images")
    top_k = f"top{probing.config.top_k}"
    for column in ("top-1", top_k.replace("top", "top-"), "loss", "kNN top-1"):
        table.add_column(column, justify="right")
    titles = {TRAINED: "trained", CONTROL: "random control"}
    for name, parts in results.items():
        for part, figures in parts.items():
            shares = [f"{100 * figures[key]:.2f} %" for key in ("top1", top_k)]
            knn_text = f"{100 * figures['knn_top1']:.2f} %"
            table.add_row(titles[name], part, *shares, f"{figures['loss']:.4f}", knn_text)
    console.print(table)


if __name__ == "__main__":
    runtime.main(ProbeConfig, run, __doc__)
