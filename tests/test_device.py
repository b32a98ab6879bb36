"""A step on another device than the CPU: what crosses to it, and what waits for it.

No GPU is needed: PyTorch's fake tensors have shapes and devices and no numbers. Their device is
"lazy" here, behind which no driver is looked for; all that is not the CPU is treated as a GPU is.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.data.view_source import view_source
from moco_dist.distributed import agreement
from moco_dist.method import batch_norm
from moco_dist.pretrain import loop
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.step_graph import Stepper
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import session
from tests import processes
from tests.test_trainer import TINY, build

DEVICE = torch.device("lazy", 0)
READ = torch.ops.aten._local_scalar_dense.default
# What the host is told where there are no numbers: all is finite, nobody asks for anything.
TOLD = {torch.bool: True, torch.int64: 0}
ALL = [
    *("moco.symmetric=true", "runtime.micro_batches=2", "encoder.head=mlp", "views.blur=0.5"),
    *("views.grayscale_before_jitter=true", "encoder.stem=imagenet", "seed=1"),
]


class Crossings(TorchDispatchMode):
    """Counts the operations by which host and device meet, each of which waits for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Counter[str]()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        given = _tensors((arguments, named))
        if function is READ:
            # All numbers of a tensor are read in one go.
            self.found["read"] += given[0].device == DEVICE
            return TOLD.get(given[0].dtype, 1.0)
        made = function(*arguments, **(named or {}))
        # A number on the host travels with the operation, without waiting.
        before = {each.device for each in given if each.dim() or each.device == DEVICE}
        after = {each.device for each in _tensors(made)}
        if len(before) > 1 or (before and after - before):
            self.found[str(function)] += 1
        return made


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def watched() -> Iterator[Counter[str]]:
    with FakeTensorMode(allow_non_fake_inputs=True), Crossings() as crossings:
        yield crossings.found


def moved(trainer: Trainer) -> Trainer:
    """Return `trainer` with its state and its data on DEVICE, in fake tensors."""
    config, device = trainer.config, DEVICE
    for module in trainer.moco.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                there = torch.empty_like(parameter, device=device)
                module._parameters[name] = nn.Parameter(there, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    trainer.query = trainer.moco.query_encoder
    trainer.optimizer = torch.optim.SGD(trainer.query.parameters(), 0.1, 0.9)
    trainer.plan = dataclasses.replace(trainer.plan, device=device)
    trainer.splits = trainer.splits.to(device)
    trainer.source = view_source(
        trainer.splits.train,
        [config.views],
        trainer.plan,
        trainer.config.moco.passes,
        trainer.dtype,
        "exchange",
    )
    trainer.undo = batch_norm.Undo(*trainer.moco.encoders.values())
    trainer.contrast = trainer.mechanism()
    return trainer


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none for DEVICE."""
    monkeypatch.setattr(torch, "autocast", lambda *_args, **_named: nullcontext())


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("overrides", [[], ALL], ids=["plain", "all"])
def test_a_step_of_one_process_waits_for_its_device_once(
    overrides: list[str],
) -> None:
    trainer = build("bn_groups=2", "tracking.health_every_steps=3", *overrides)
    with watched() as found:
        hooks = RunHooks(moved(trainer))
        trainer.train_step(hooks)  # the first one measures health, as the third
        found.clear()
        loss, (logits, *_) = trainer.train_step(hooks)
        assert found == {"read": 1}
        assert {loss.device, logits.device, hooks.gradient_norm.device} == {DEVICE}
        assert {p.device for p in trainer.moco.state_dict().values()} == {DEVICE}
        # Figures, health and neighbours, once in many steps, are computed there as well.
        taken = Stepper(trainer, hooks)()
        figures = loop.figures_of(trainer, 3, taken, hooks.health, 1.0)
        assert figures.keys() >= {"train/loss", "health/rankme", "queue/own_images"}
        found.clear()
        trainer.accuracies()
        assert found["read"] == 2  # are all images labelled; how many neighbours are right
        assert trainer.nearest is not None
        assert trainer.nearest.device == DEVICE


def test_a_note_to_others_is_made_on_the_device() -> None:
    samples = torch.tensor([7, 5, 3])
    assert agreement.note(9, samples, 1, True, alone=False).tolist() == [
        9,
        3,
        1,
        1,
        7 + 2 * 5 + 3 * 3,
    ]
    with watched() as found:
        there = torch.empty(3, dtype=torch.int64, device=DEVICE)
        assert agreement.note(9, there, 1, True, alone=False).device == DEVICE
    assert not found


def test_the_watch_sees_what_crosses() -> None:
    with watched() as found:
        there, here = torch.empty(3, device=DEVICE), torch.empty(3)
        assert not found
        there.sum().item()
        there[torch.tensor([0, 1])]
        torch.tensor([1.0, 2.0], device=DEVICE)
        there.cpu()
        with pytest.raises(FakeTensorDeviceMismatchError):
            there + here
    assert found == {"read": 1, "aten.index.Tensor": 1, "aten._to_copy.default": 2}


def choices(*arguments: str) -> tuple[bool, ...]:
    session.join(load(PretrainConfig, [*TINY, *arguments]))
    return (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ([], (False, False, False, True)),
        (["precision=tf32"], (True, True, False, True)),
        (["precision=bf16", "runtime.deterministic=false"], (False, False, True, False)),
    ],
)
def test_kernels_are_those_that_precision_and_deterministic_say(
    arguments: list[str], chosen: tuple[bool, ...]
) -> None:
    assert processes.run(choices, 1, *arguments) == [chosen]
