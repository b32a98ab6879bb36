"""What is compiled gives what it gives as it is written, in float64 to the last digits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from moco_dist.config.encoder import EncoderConfig
from moco_dist.config.recipe import PretrainConfig, ViewsConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets, view_source
from moco_dist.data.view_source import Maker
from moco_dist.distributed.stopping import StopRequests
from moco_dist.errors import ConfigError, StoppedError
from moco_dist.method.batch_norm import GroupedBatchNorm, batch_norms, take_in
from moco_dist.method.compilation import compiled
from moco_dist.method.encoder import Encoder, build_encoder
from moco_dist.pretrain import loop, run
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import session as runs_session
from tests import processes

RUN = [
    *("data.name=shapes", "data.shapes_train=64", "data.shapes_test=10", "runtime.device=cpu"),
    *("precision=fp64", "batch_size=16", "bn_groups=4", "views.size=16", "encoder.width=2"),
    *("encoder.dim=8", "moco.queue_size=48", "tracking.wandb=disabled", "epochs=4"),
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_formula_is_a_norm_for_each_group(memory_format: torch.memory_format) -> None:
    torch.manual_seed(0)
    groups, rows, channels = 4, 3, 5
    grouped = GroupedBatchNorm(channels, rows, groups).double()
    separate = [nn.BatchNorm2d(channels).double() for _ in range(groups)]
    for norm in (grouped, *separate):
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))
    found, expected = list[Tensor](), list[Tensor]()
    for turn in range(3):  # half of the groups at a time: micro-batches
        mine = separate[:2] if turn % 2 == 0 else separate[2:]
        x = torch.randn(2 * rows, channels, 4, 3, dtype=torch.float64) * 2 + 1
        x = x.to(memory_format=memory_format)
        of_y = torch.randn_like(x)
        here, there = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = grouped._by_formula(here)
        take_in([grouped])
        parts = zip(mine, there.split(rows), strict=True)
        y_there = torch.cat([norm(part) for norm, part in parts])
        found += y, *torch.autograd.grad(y, (here, grouped.weight, grouped.bias), of_y)
        theirs = [p for norm in mine for p in (norm.weight, norm.bias)]
        of_there, *of_theirs = torch.autograd.grad(y_there, (there, *theirs), of_y)
        expected += [y_there, of_there, of_theirs[0] + of_theirs[2], of_theirs[1] + of_theirs[3]]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for norm, mean, var in zip(separate, grouped.group_mean, grouped.group_var, strict=True):
        torch.testing.assert_close((mean, var), (norm.running_mean, norm.running_var))
    assert grouped.next_group == 2
    before = grouped.group_mean.clone()
    take_in([grouped])  # what was seen once is taken in once
    assert torch.equal(grouped.group_mean, before)


@pytest.mark.parametrize("part", ["block", "head"])
def test_a_compiled_block_has_the_gradients_of_the_block(part: str) -> None:
    def block() -> nn.Module:
        config = EncoderConfig(width=2, head="mlp_bn", dim=5)
        encoder = build_encoder(config, 0, rows_per_group=4, groups=2).double()
        return encoder.head if part == "head" else encoder.backbone.layer2[0]

    plain, other = block(), block()
    for norm in batch_norms(other):
        norm.leaves_seen = True
    fast = compiled(other)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        shape = (8, 16) if part == "head" else (8, 2, 6, 6)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = x if part == "head" else x.to(memory_format=torch.channels_last)
        outs = plain(x), fast(x)
        take_in(batch_norms(other))
        of_out = torch.randn(outs[0].shape, generator=generator, dtype=torch.float64)
        for out in outs:
            out.backward(of_out)
        torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-12)
    for ours, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
    buffers = list(other.buffers()), list(plain.buffers())
    torch.testing.assert_close(*buffers, rtol=0, atol=1e-12)


def test_statistics_move_where_someone_else_compiles() -> None:
    norms = [GroupedBatchNorm(5, 3, 4) for _ in range(2)]
    fast = torch.compile(norms[1], backend="eager")
    for _ in range(3):
        x = torch.randn(6, 5, 4, 4)
        torch.testing.assert_close(fast(x), norms[0](x))
    torch.testing.assert_close(norms[1].group_mean, norms[0].group_mean, rtol=0, atol=0)
    assert norms[1].group_mean.abs().sum(1).all()


@pytest.mark.parametrize(("cut", "sides"), [(False, (20, 24)), (True, (16, 16))])
def test_compiled_views_are_the_views_of_any_epoch(cut: bool, sides: tuple[int, int]) -> None:
    plain = ViewsConfig(size=16, jitter=0, grayscale=0, solarize=0.5)
    maker = Maker([ViewsConfig(size=16, blur=0.5), plain], 3, torch.float64, cut)
    maker.compile_step()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, *sides), generator=generator, dtype=torch.uint8)
    wanted = [(torch.arange(30), 0), (torch.arange(7, 17), 1)]
    for epoch in (0, 5):
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        ours, theirs = (make(images, wanted, epoch) for make in (maker.of_step, maker.of_any))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_without_a_compiler_there_is_a_sentence(tmp_path: Path) -> None:
    words = ["runtime.compile=true", f"output={tmp_path}", *RUN]
    environment = {"CXX": "/no/compiler", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    ended = subprocess.run(
        [sys.executable, "-m", "moco_dist.pretrain", *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 78
    assert "can't compile here (No working C++ compiler found" in ended.stderr
    assert "use runtime.compile=false" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_signal_while_it_compiles_is_no_fault_of_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequests()

    def failing(_: Any) -> Any:
        def fail(*_: Any) -> Any:
            try:
                stop.request = signal.SIGTERM
                stop.raise_at_once()
            except StoppedError as error:  # as of torch._dynamo, of any exception
                raise BackendCompilerFailed(fail, error, None) from error

        return fail

    monkeypatch.setattr(view_source, "compiled", failing)
    config = load(PretrainConfig, [*RUN, f"output={tmp_path}", "runtime.compile=true"])
    session = runs_session.start(config, stop)
    with pytest.raises(StoppedError, match=r"stopped by SIGTERM before the first step$") as caught:
        run.build(config, session)
    assert caught.value.exit_status == 75
    session.close()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that takes no time: what is compiled runs as it is written."""
    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", partial(compiling, backend="eager"))


@pytest.mark.usefixtures("pretended")
@torch._dynamo.config.patch(recompile_limit=1)  # type: ignore[untyped-decorator]
def test_a_process_has_as_many_compiled_runs_as_it_likes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Encoder, "compile_training", lambda _: None)  # views alone take less time
    for seed in range(2):
        words = [*RUN, f"output={tmp_path}", "runtime.compile=true", f"seed={seed}"]
        config = load(PretrainConfig, [*words, f"name={seed}"])
        trainer = Trainer(config, runs_session.join(config), datasets.load(config.data))
        trainer.train_step()


def test_a_run_that_is_done_is_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*RUN, f"output={tmp_path}", "epochs=1", "knn.every_epochs=0"]
    run.run(load(PretrainConfig, words))
    monkeypatch.setattr(Trainer, "_compile", None)
    run.run(load(PretrainConfig, [*words, "runtime.compile=true"]))
    assert "nothing is left to do" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_compiling_that_the_environment_switches_off_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=f"{name}=1, which switches compiling off"):
        compiled(torch.neg)


def test_a_python_that_can_not_compile_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("Python 3.99+ not yet supported for torch.compile")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(ConfigError, match=r"can't compile here \(Python 3.99\+ not yet supported"):
        compiled(torch.neg)


def state(output: str, until: int, overrides: list[str]) -> tuple[dict[str, Tensor], list[Any]]:
    """Train to a step and save; return the model and the BatchNorm groups' turns."""
    config = load(PretrainConfig, [*RUN, f"output={output}", *overrides])
    session = runs_session.start(config)
    trainer = run.build(config, session)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    while trainer.step < until:
        trainer.train_step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # all were compiled
    loop.save(trainer, session, wait=True)
    session.close()
    model = {name: value.clone() for name, value in trainer.moco.state_dict().items()}
    return model, [norm.next_group for norm in batch_norms(trainer.moco)]


@pytest.mark.slow
def test_a_compiled_run_on_two_processes_resumed_on_one_is_the_run(tmp_path: Path) -> None:
    straight, turns = state(str(tmp_path / "straight"), 6, [])
    fast, cut = ["runtime.compile=true"], str(tmp_path / "cut")
    begun = processes.run(state, 2, cut, 3, [*fast, "runtime.micro_batches=2"])
    torch.testing.assert_close(begun[0][0], begun[1][0], rtol=0, atol=0)
    resumed, theirs = state(cut, 6, fast)
    torch.testing.assert_close(resumed, straight, rtol=0, atol=1e-10)
    assert theirs == turns
    again, _ = state(str(tmp_path / "again"), 6, fast)
    once_more, _ = state(str(tmp_path / "once more"), 6, fast)
    torch.testing.assert_close(again, once_more, rtol=0, atol=0)
