"""Whether encoders recognise images by the BatchNorm statistics of their group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from moco_dist.config import yaml_files
from moco_dist.config.recipe import PretrainConfig
from moco_dist.data import datasets
from moco_dist.errors import ConfigError
from moco_dist.method import views
from moco_dist.method.batch_norm import batch_norms
from moco_dist.method.encoder import Encoder, build_encoder
from moco_dist.method.plan import Plan
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import checkpoint, session
from moco_dist.tracking.start import console

# Steps of the short training where there is no run yet.
STEPS = 200
# BatchNorm groups among which keys are shuffled where the run has fewer: MoCo's own number.
GROUPS = 8
# Batches whose queries are counted, and keys of other batches that they must tell theirs from.
BATCHES = 4
NEGATIVES = 4096
# Of streamed images, so many are taken into memory.
STREAMED_IMAGES = 10_000
# Gain by shared groups above which a run leaks. Without a leak it is 0.05 or less, with one 0.4 or
# more.
LEAK = 0.1


@torch.no_grad()
def leak(
    query_encoder: Encoder, key_encoder: Encoder, pixels: Tensor, config: PretrainConfig
) -> tuple[float, float]:
    """Return the instance accuracy with shared and with shuffled BatchNorm groups, from 0 to 1.

    The share of queries that are more similar to their own key than to the keys of other batches.
    Shared: query and key are normalised among the same images. Shuffled: the key is among others,
    as ShuffleBN has it. Weights, images, views, and the rows of a group are the same in both.
    """
    rows = config.batch_size // config.bn_groups
    groups = max(config.bn_groups, min(GROUPS, len(pixels) // rows))
    batch = rows * groups
    plan = Plan(num_samples=len(pixels), batch_size=batch, seed=config.seed, device=pixels.device)
    dtype = next(query_encoder.parameters()).dtype

    def encode(encoder: Encoder, samples: Tensor, step: int, view: int) -> Tensor:
        recipe = views.recipe(config.view_recipes, view)
        pieces = [
            views.make(pixels[part], recipe, config.seed, step, part, view, dtype)
            for part in samples.split(rows)
        ]
        return torch.cat([encoder(piece).flatten(1) for piece in pieces])

    for encoder in (query_encoder, key_encoder):
        encoder.train()
        for norm in batch_norms(encoder):
            norm.rows_per_group = rows
    # Keys as they come from the steps of a run: each batch shuffled among its groups.
    negatives_wanted = config.moco.candidates(batch, len(pixels)) - 1
    others = max(1, -(-min(NEGATIVES, negatives_wanted) // batch))
    keys_of_steps = []
    for step in range(others):
        drawn = plan.step(step)
        keys_of_steps.append(encode(key_encoder, drawn.samples[drawn.key_rows[0]], step, 1))
    negatives = torch.cat(keys_of_steps)
    right = torch.zeros(2, dtype=torch.int64)
    for step in range(others, others + BATCHES):
        drawn = plan.step(step)
        queries = encode(query_encoder, drawn.samples, step, 0)
        nearest = (queries @ negatives.T).max(1).values
        shared = encode(key_encoder, drawn.samples, step, 1)
        shuffled = encode(key_encoder, drawn.samples[drawn.key_rows[0]], step, 1)
        for place, keys in enumerate((shared, shuffled[drawn.unshuffle[0]])):
            right[place] += ((queries * keys).sum(1) > nearest).sum().cpu()
    with_groups, without = (right / (batch * BATCHES)).tolist()
    return with_groups, without


def trained(config: PretrainConfig) -> tuple[Encoder, Encoder, datasets.AnyImages, str]:
    """Return the encoders for queries and keys, training images, and where the weights are from."""
    # Groups are the same on any number of processes; this is one.
    accelerator = session.join(replace(config, runtime=replace(config.runtime, processes=0)))
    directory = Path(config.output).expanduser() / config.name
    found = checkpoint.newest(directory)
    if found is None:
        splits = datasets.load(config.data, config.encoder.channels)
        trainer = Trainer(config, accelerator, splits)
        while trainer.step < min(STEPS, trainer.total_steps):
            trainer.train_step()
        *_, key = trainer.moco.encoders.values()
        return (
            trainer.moco.query_encoder,
            key,
            trainer.splits.train,
            f"{trainer.step} steps of training",
        )
    changed = yaml_files.changed_keys(found.piece("config"), config)
    if changed:
        raise ConfigError(
            f"{directory} holds a run with another configuration ({'; '.join(changed)}); give "
            f"{directory} in place of the configuration, or name=... for a short training"
        )
    query, key = (
        build_encoder(config.encoder, config.seed).to(accelerator.device) for _ in range(2)
    )
    of_keys = "key_encoder." if config.moco.keys == "momentum" else "query_encoder."
    for encoder, prefix in ((query, "query_encoder."), (key, of_keys)):
        own = {k.removeprefix(prefix): v for k, v in found.model.items() if k.startswith(prefix)}
        checkpoint.load_tensors(encoder, own, found.path)
    images = datasets.load(config.data, config.encoder.channels).train.to(accelerator.device)
    return query, key, images, f"{directory} after step {found.step:,}"


def bn_leak(config: PretrainConfig) -> None:
    """Print whether encoders recognise images by the BatchNorm statistics of their group.

    Raises ConfigError if they do.
    """
    query, key, images, source = trained(config)
    if isinstance(images, datasets.Images):
        pixels = images.pixels
    else:
        pixels = images.squares(torch.arange(min(len(images), STREAMED_IMAGES)))
    shared, shuffled = leak(query, key, pixels, config)
    table = Table(title=f"Instance accuracy of {source}, at fixed weights")
    table.add_column("query and key are normalised")
    table.add_column("accuracy", justify="right")
    table.add_column("this run")
    safe = config.bn_groups > 1
    table.add_row("with the same images (no protection)", f"{shared:.1%}", "" if safe else "trains")
    table.add_row("with others (ShuffleBN)", f"{shuffled:.1%}", "trains" if safe else "")
    console.print(table)
    if not safe and shared - shuffled > LEAK:
        raise ConfigError(
            f"BatchNorm leak: under bn_groups=1, {shared:.1%} of the queries find their own key, "
            f"and {shuffled:.1%} without the statistics that they share with it; train again with "
            f"bn_groups=8 and name=..."
        )
    verdict = (
        f"No leak: bn_groups={config.bn_groups} keeps the groups of queries and keys apart."
        if safe
        else "No leak can be seen yet, but bn_groups=1 allows one; use bn_groups=8."
    )
    console.print(verdict, highlight=False, soft_wrap=True)
