"""Pretraining by Momentum Contrast: its state, one step of it, and its checkpoints."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from moco_dist import checkpoint, comms, data, features, knn, moco, schedule, views
from moco_dist.config import PretrainConfig
from moco_dist.config_files import to_dict
from moco_dist.encoder import build_encoder
from moco_dist.errors import ConfigError, UserError
from moco_dist.plan import Plan, Step, check_batch, check_groups
from moco_dist.runtime import Session


class Trainer:
    """A run in the making: models, data, place; all state is in `moco`, `optimizer` and `step`."""

    def __init__(self, config: PretrainConfig, session: Session, splits: data.Splits) -> None:
        self.config, self.session = config, session
        self.accelerator, device = session.accelerator, session.device
        processes = comms.world_size()
        check_batch(config.batch_size, processes)
        check_groups(config.bn_groups, processes, config.runtime.micro_batches)
        self.splits = splits.to(device)
        self.plan = Plan(
            num_samples=len(splits.train),
            batch_size=config.batch_size,
            seed=config.seed,
            rank=comms.rank(),
            world_size=processes,
            device=device,
        )
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.total_steps = config.epochs * self.steps_per_epoch
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        encoder = build_encoder(
            config.encoder,
            config.seed,
            rows_per_group=config.batch_size // config.bn_groups,
            groups=config.bn_groups // processes,
        )
        self.moco = moco.MoCo(encoder, config.moco.queue_size, config.encoder.dim).to(
            device, self.dtype
        )
        self.optimizer = torch.optim.SGD(
            self.moco.query_encoder.parameters(),
            lr=config.optim.lr,
            momentum=config.optim.momentum,
            weight_decay=config.optim.weight_decay,
        )
        # The query encoder alone gets DDP: keys have no gradients, and DDP would send the queue
        # at each step. It would also give each process the BatchNorm statistics of process 0.
        self.query = self.accelerator.prepare(self.moco.query_encoder)
        if processes > 1:
            self.query.broadcast_buffers = False
        self.step = 0
        if session.resumed:
            self.restore(session.resumed)

    @property
    def passes(self) -> list[tuple[int, int]]:
        """The views of the queries and of their keys, for each pass over the batch."""
        return [(0, 1), (1, 0)] if self.config.moco.symmetric else [(0, 1)]

    def train_step(self) -> tuple[Tensor, list[Tensor]]:
        """Do one step; return this process's mean loss and, pass by piece, the logits."""
        config, network = self.config, self.moco
        rows = self.plan.step(self.step, len(self.passes))
        rate = schedule.learning_rate(
            config.optim, self.step, self.steps_per_epoch, self.total_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        network.train()
        keys = [self.keys(rows, number, view) for number, (_, view) in enumerate(self.passes)]
        negatives, their_samples = network.queue.negatives()
        pieces = [
            (number, view, piece)
            for number, (view, _) in enumerate(self.passes)
            for piece in rows.query_rows.chunk(config.runtime.micro_batches)
        ]
        losses, all_logits = [], []
        for place, (number, view, piece) in enumerate(pieces, start=1):
            with nullcontext() if place == len(pieces) else self.accelerator.no_sync(self.query):
                samples = rows.samples[piece]
                queries = self.query(self.views(samples, rows.epoch, view))
                own = their_samples == samples[:, None] if config.moco.mask_own_keys else None
                loss, logits = moco.info_nce(
                    queries, keys[number][piece], negatives, config.moco.temperature, own
                )
                # The passes of the symmetric loss are added, as in the authors' CIFAR demo.
                self.accelerator.backward(loss / config.runtime.micro_batches)
            losses.append(loss.detach())
            all_logits.append(logits.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()
        momentum = schedule.key_momentum(config.moco, self.step, self.total_steps)
        network.update_key_encoder(momentum)
        network.queue.enqueue(torch.cat(keys), rows.samples.repeat(len(keys)))
        self.step += 1
        return torch.stack(losses).mean(), all_logits

    def keys(self, rows: Step, number: int, view: int) -> Tensor:
        """Return the whole batch's keys for pass `number`, (batch_size, dim), without gradients."""
        mine = rows.samples[rows.key_rows[number]]
        pieces = [
            partial(self.views, piece, rows.epoch, view)
            for piece in mine.chunk(self.config.runtime.micro_batches)
        ]
        with self.accelerator.autocast():
            return moco.shuffled_keys(self.moco.key_encoder, pieces, rows.unshuffle[number])

    def views(self, samples: Tensor, epoch: int, view: int) -> Tensor:
        """Return view number `view` of the training images `samples`, (rows, 3, size, size)."""
        pixels = self.splits.train.pixels[samples]
        return views.make(
            pixels, self.config.views, self.config.seed, epoch, samples, view, self.dtype
        )

    def knn_top1(self) -> float:
        """Return the share of validation images that the nearest training images get right."""
        config, encoder = self.config, self.moco.query_encoder
        moco.average_statistics(encoder)
        encoder.eval()
        parts = [self.splits.train.labelled(), self.splits.validation]
        with self.accelerator.autocast():
            bank, queries = (
                features.extract(encoder.backbone, part, config.views, config.batch_size)
                for part in parts
            )
        mine = features.share(len(queries))
        classes, (train, validation) = len(parts[0].classes), parts
        predicted = knn.predict(
            queries[mine], bank, train.labels, classes, config.knn.k, config.knn.temperature
        )
        right = comms.total((predicted == validation.labels[mine]).sum())
        return float(right) / len(queries)

    def save(self) -> None:
        """Write a checkpoint of the state after `step` steps."""
        config, network = self.config, self.moco
        encoders = {"query": network.query_encoder, "key": network.key_encoder}
        statistics: dict[str, Tensor] = {}
        for name, encoder in encoders.items():
            moco.average_statistics(encoder)
            groups = moco.group_statistics(encoder)
            statistics |= {f"statistics.{name}.{key}": value for key, value in groups.items()}
        momentum = checkpoint.momentum_buffers(self.optimizer, network.query_encoder)
        state = {
            "epoch": self.step / self.steps_per_epoch,
            "enqueued": network.queue.enqueued,
            "data": self.splits.fingerprint,
            "config": to_dict(config),
        }
        model = network.state_dict()
        checkpoint.save(
            self.session.directory,
            self.step,
            model,
            momentum | statistics,
            state,
            config.checkpoint.keep,
        )

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Take over the state of a checkpoint, whatever number of processes wrote it."""
        if saved.state["data"] != self.splits.fingerprint:
            raise ConfigError(
                f"{saved.path}: was trained on other images (fingerprint {saved.state['data']}, "
                f"now {self.splits.fingerprint}); give the same data, or name=... for a new run"
            )
        checkpoint.load_tensors(self.moco, saved.model, saved.path)
        for name, encoder in (("query", self.moco.query_encoder), ("key", self.moco.key_encoder)):
            prefix = f"statistics.{name}."
            chosen = {
                k.removeprefix(prefix): v
                for k, v in saved.optimizer.items()
                if k.startswith(prefix)
            }
            moco.restore_group_statistics(encoder, chosen)
        checkpoint.restore_momentum(self.optimizer, self.moco.query_encoder, saved.optimizer)
        self.moco.queue.enqueued = saved.state["enqueued"]
        self.step = saved.step

    def metrics(
        self, loss: Tensor, all_logits: list[Tensor], seconds: float, steps: int
    ) -> dict[str, float]:
        """Return the last step's figures over all processes; `steps` steps took `seconds`."""
        logits = torch.cat(all_logits)
        positive, negative = logits[:, :1], logits[:, 1:]
        rank = (negative >= positive).sum(1)
        count = negative.isfinite().sum()
        mean_negative = negative.masked_fill(~negative.isfinite(), 0).sum() / count.clamp(min=1)
        figures = [
            loss,
            (rank < 1).double().mean(),
            (rank < 5).double().mean(),
            positive.mean(),
            mean_negative,
        ]
        values = comms.mean(torch.stack([figure.double() for figure in figures])).tolist()
        if not torch.isfinite(torch.tensor(values)).all():
            raise UserError(
                f"train/loss is {values[0]} at step {self.step}; lower optim.lr, and go on from "
                "the last checkpoint, which is kept"
            )
        queue, temperature = self.moco.queue, self.config.moco.temperature
        shown = {
            "epoch": self.step / self.steps_per_epoch,
            "train/loss": values[0],
            "train/accuracy_top1": values[1],
            "train/accuracy_top5": values[2],
            "similarity/positive": values[3] * temperature,
            "similarity/negative": values[4] * temperature,
            "queue/fill": queue.filled / queue.size,
            "train/lr": self.optimizer.param_groups[0]["lr"],
        }
        if not all_logits[0][0, 1:].numel():  # the first step has no negatives yet
            del shown["similarity/negative"]
        return shown | {"train/images_per_second": steps * self.config.batch_size / seconds}
