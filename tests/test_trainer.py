"""What a training step touches, and what it leaves alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.distributed import comms
from moco_dist.method import loss as method_loss
from moco_dist.method import views
from moco_dist.method.batch_norm import batch_norms
from moco_dist.pretrain import loop, run
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import environment, session
from tests import processes

TINY = [
    *("batch_size=16", "bn_groups=8", "encoder.width=4", "encoder.dim=8", "moco.queue_size=40"),
    *("data.shapes_train=100", "data.shapes_test=30", "data.size=16", "views.size=16"),
    "runtime.device=cpu",
]


def build(*overrides: str) -> Trainer:
    """Return a trainer without a run directory."""
    config = load(PretrainConfig, [*TINY, *overrides])
    return Trainer(config, session.join(config), datasets.load(config.data))


def test_a_step_needs_no_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = build()
    trainer.train_step()
    trainer.train_step(RunHooks(trainer))
    assert trainer.step == 2
    assert list(tmp_path.iterdir()) == []


def test_only_the_query_encoder_is_trained() -> None:
    trainer = build()
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.moco.query_encoder.parameters()}
    for _ in range(3):
        trainer.train_step()
    assert all(p.grad is None for p in trainer.moco.key_encoder.parameters())
    assert not trainer.moco.queue.keys.requires_grad


def wrapped() -> tuple[list[str], float, float]:
    trainer = build()
    assert isinstance(trainer.query, DistributedDataParallel)
    assert trainer.query.module is trainer.moco.query_encoder
    norm = batch_norms(trainer.moco.query_encoder)[0]
    norm.running_mean += comms.rank()  # a mark that DDP's broadcast of buffers would wipe out
    for _ in range(3):
        trainer.train_step()
    names = [name for name, _ in trainer.query.named_parameters()]
    return names, float(norm.running_mean[0]), float(norm.group_mean.sum())


def test_ddp_wraps_the_query_encoder_alone_and_leaves_statistics_alone() -> None:
    (names, first, own_first), (_, second, own_second) = processes.run(wrapped, 2)
    assert names
    assert all(name.startswith(("module.backbone.", "module.head.")) for name in names)
    assert (first, second) == (0, 1)
    assert own_first != own_second


def test_an_images_own_older_keys_are_no_negatives() -> None:
    trainer = build("moco.queue_size=200", "moco.mask_own_keys=true")
    hits = 0
    for _ in range(15):  # three epochs: each image stands in the queue up to three times
        samples = trainer.plan.step(trainer.step).samples
        _, older = trainer.moco.queue.negatives()
        expected = older == samples[:, None]
        _, (logits,) = trainer.train_step()
        assert logits[:, 1:].isinf().equal(expected)
        hits += int(expected.sum())
    assert hits > 100


def in_mixed_precision(symmetric: str) -> tuple[set[torch.dtype], ...]:
    trainer = build("precision=bf16", f"moco.symmetric={symmetric}")
    inside: set[torch.dtype] = set()
    trainer.moco.key_encoder.backbone.layer1.register_forward_hook(
        lambda _module, _inputs, output: inside.add(output.dtype)
    )
    outside = {p.dtype for p in trainer.moco.parameters()}
    for _ in range(4):
        loss, logits = trainer.train_step()
        assert loss.isfinite()
        outside |= {loss.dtype, logits[0].dtype, trainer.moco.queue.keys.dtype}
    norms = trainer.moco.queue.keys[: trainer.moco.queue.filled].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    return inside, outside


@pytest.mark.parametrize("symmetric", ["false", "true"])
def test_mixed_precision_keeps_keys_loss_and_weights_in_float32(symmetric: str) -> None:
    inside, outside = processes.run(in_mixed_precision, 1, symmetric)[0]
    assert inside == {torch.bfloat16}
    assert outside == {torch.float32}


def test_the_symmetric_loss_adds_both_directions_and_enqueues_both_views() -> None:
    trainer = build("moco.symmetric=true", "precision=fp64")
    trainer.train_step()
    queue, samples = trainer.moco.queue, trainer.plan.step(0).samples
    assert queue.filled == 32
    assert queue.samples[:32].equal(samples.repeat(2))
    # The same step by hand, without groups of processes or pieces: gradients of two losses, added.
    by_hand = build("moco.symmetric=true", "precision=fp64")
    by_hand.train_step()
    rows = by_hand.plan.step(1, 2)
    network = by_hand.moco.train()
    total = torch.zeros((), dtype=torch.float64)
    negatives, their_samples = network.queue.negatives()
    owners = [(rows.samples == sample).nonzero().flatten().tolist() for sample in their_samples]
    own = torch.tensor([found[0] if found else -1 for found in owners])
    for number, (query_view, key_view) in enumerate([(0, 1), (1, 0)]):
        with torch.no_grad():
            keys = network.key_encoder(
                by_hand.views(rows.samples[rows.key_rows[number]], 0, key_view)
            )
        keys = keys[rows.unshuffle[number]]
        queries = network.query_encoder(by_hand.views(rows.samples, 0, query_view))
        total += method_loss.info_nce(queries, keys, negatives, 0.1, own)[0].detach()
    loss, _ = trainer.train_step()
    assert float(loss) == pytest.approx(float(total) / 2, abs=1e-12)


def test_views_made_in_one_pass_are_those_of_their_samples_and_numbers() -> None:
    trainer = build()
    config, rows = trainer.config, trainer.plan.step(1)
    wanted = [(rows.samples[rows.key_rows[0]], 1), (rows.samples, 0)]
    for (samples, view), made in zip(wanted, trainer.source.views(wanted, 3), strict=True):
        pixels = trainer.splits.train.squares(samples)
        assert made.equal(views.make(pixels, config.views, config.seed, 3, samples, view))


class Largest(TorchDispatchMode):
    """Notes the most elements that a tensor has that is made, leaving out views."""

    elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves(arguments) if _is(t)}
        results = function(*arguments, **(named or {}))
        for made in filter(_is, tree_leaves(results)):
            if made.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, made.untyped_storage().nbytes() // 4)
        return results


def _is(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)


@pytest.mark.parametrize("masked", ["true", "false"])
def test_a_step_makes_no_tensor_as_large_as_the_queue(masked: str) -> None:
    queue = ["moco.queue_size=65536", "encoder.dim=128", f"moco.mask_own_keys={masked}"]
    trainer = build(*queue, "tracking.health_every_steps=0")
    trainer.moco.fill_up(len(trainer.splits.train))
    for _ in range(2):  # before the second one the momentum of SGD is made
        with Largest() as largest:  # type: ignore[no-untyped-call]
            trainer.train_step()
    # The logits, and their shares in the gradient, are (16, 1 + 65536).
    assert largest.elements == 16 * (1 + 65536)
    assert largest.elements < trainer.moco.queue.keys.numel() / 7


def accuracy() -> float:
    trainer = build()
    for _ in range(3):
        trainer.train_step()
    return trainer.accuracies()["knn/top1"]


def test_the_nearest_neighbour_monitor_counts_each_image_once() -> None:
    alone = processes.run(accuracy, 1)[0]
    several = processes.run(accuracy, 4)
    assert several == [alone] * 4
    assert alone * 10 == pytest.approx(round(alone * 10))  # of 10 validation images


def test_memory_is_the_peak_of_what_the_system_says_this_process_has() -> None:
    ballast = torch.ones(100_000_000)  # 0.4 GB, written
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9  # type: ignore[index]
    del ballast
    assert environment.memory_gb(torch.device("cpu")) == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_a_vision_transformer_is_trained_and_resumed_with_patches_and_positions_fixed(
    optimizer: str, tmp_path: Path
) -> None:
    architecture = ["encoder.backbone=timm/test_vit", "encoder.stem=imagenet", "encoder.width=64"]
    architecture += ["encoder.patches=frozen", f"optim.name={optimizer}"]
    architecture += ["encoder.options=[img_size=16,patch_size=8]", "encoder.positions=sincos"]
    config = load(PretrainConfig, [*TINY, f"output={tmp_path}", *architecture])
    opened = session.start(config)
    trainer = run.build(config, opened)
    first = {name: p.clone() for name, p in trainer.moco.query_encoder.named_parameters()}
    for _ in range(2):  # the first has no negatives, and so no gradient
        trainer.train_step()
    for name, parameter in trainer.moco.query_encoder.named_parameters():
        fixed = "patch_embed" in name or "pos_embed" in name
        assert torch.equal(parameter, first[name]) == fixed, name
    keys = dict(trainer.moco.key_encoder.named_parameters())
    assert keys["backbone.pos_embed"].equal(first["backbone.pos_embed"])
    loop.save(trainer, opened, wait=True)
    ours, _ = trainer.train_step()
    opened.close()
    opened = session.start(config)
    again = run.build(config, opened)
    assert again.step == 2
    theirs, _ = again.train_step()
    assert torch.equal(ours, theirs)
    opened.close()


def test_the_launchers_compiler_is_left_out_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    AcceleratorState._reset_state()  # it keeps what the first trainer of a process has found
    trainer = build()
    assert trainer.query is trainer.moco.query_encoder
    assert "dynamo backend eager is ignored; runtime.compile=true compiles" in caplog.text
