"""What the bench says is so: bytes as the system counts them, FLOPs as formulas give them."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from moco_dist.bench import run
from moco_dist.bench import speed as bench_speed
from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.distributed import comms
from moco_dist.distributed.stopping import StopRequests
from moco_dist.errors import ConfigError
from moco_dist.method.convolutions import SmallMapConv
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs import environment
from tests import processes
from tests.test_trainer import TINY, build

LARGE = ["encoder.width=16", "encoder.dim=64", "batch_size=64", "moco.queue_size=256"]


def received() -> int:
    """Return the bytes that this process's connections have received, as the kernel counts them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        with connection:
            if connection.type == socket.SOCK_STREAM and connection.family != socket.AF_UNIX:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
                total += struct.unpack_from("Q", info, 128)[0]  # tcpi_bytes_received
    return total


def traffic(*more: str) -> tuple[float, int, int, int]:
    """Return per step: bytes received, counted for keys, and reckoned for gradients; parameters."""
    trainer = build(*LARGE, *more)
    hooks = RunHooks(trainer)
    for _ in range(3):
        trainer.train_step(hooks)
    comms.all_gather(torch.zeros(1))  # nobody is behind
    before = received()
    comms.all_gather(torch.zeros(1))  # nobody has sent of the next step before all have looked
    steps, counted = 4, comms.sent_bytes
    for _ in range(steps):
        trainer.train_step(hooks)
    counted = (comms.sent_bytes - counted) // steps
    each = (received() - before) / steps
    comms.all_gather(torch.zeros(1))  # nobody leaves, and ends its connections, before all have
    gradients = comms.all_reduce_bytes(sum(p.nbytes for p in hooks.parameters))
    return each, counted, gradients, bench_speed.parameters(trainer.moco.query_encoder)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_step_sends_keys_notes_and_gradients_and_no_images(world_size: int) -> None:
    # One batch share of float32 keys and five int64 of the note, to each other process.
    share = 64 // world_size * 64 * 4 + 5 * 8
    for got, keys, gradients, parameters in processes.run(traffic, world_size):
        assert keys == (world_size - 1) * share
        assert gradients == 2 * 4 * parameters * (world_size - 1) // world_size
        # Images would add 64 x 3 x 16 x 16 x 4 x (N - 1) / N bytes: 98 kB on two processes.
        assert got == pytest.approx(keys + gradients, rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_groups_that_span_processes_exchange_two_numbers_a_channel() -> None:
    share = 64 // 2 * 64 * 4 + 5 * 8
    # ResNet-18 has its stem and five layers of width 16, and five of each of the others.
    channels = 5 * 16 + 5 * 32 + 5 * 64 + 5 * 128
    for got, sent, gradients, _ in processes.run(traffic, 2, "bn_groups=1"):
        # Forward for keys, forward and backward for queries; float32.
        assert sent == share + 3 * 2 * channels * 4
        assert got == pytest.approx(sent + gradients, rel=0.01)


def with_gradients_of(precision: str) -> tuple[float, torch.Tensor]:
    """Return the bytes of gradients received in a step, and the first gradient that isn't 0."""
    got, keys, _, _ = traffic(f"runtime.gradients={precision}")
    trainer = build(*LARGE, f"runtime.gradients={precision}", "optim.weight_decay=0")
    hooks = RunHooks(trainer)
    for _ in range(2):  # the queue is empty in the first
        trainer.train_step(hooks)
    found = [each["momentum_buffer"].flatten() for each in trainer.optimizer.state.values()]
    return got - keys, torch.cat(found)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_gradients_in_bf16_are_half_the_bytes_and_the_same_up_to_rounding() -> None:
    whole, half = (processes.run(with_gradients_of, 2, each) for each in ("full", "bf16"))
    assert half[0][1].equal(half[1][1])  # on both processes
    assert half[0][0] == pytest.approx(whole[0][0] / 2, rel=0.02)
    rounding = float((half[0][1] - whole[0][1]).norm() / whole[0][1].norm())
    assert 2**-12 < rounding < 2**-7  # bf16 has 8 bits


@pytest.mark.parametrize("width", [16, 32])
def test_flops_of_a_step_are_those_of_its_convolutions_and_products(width: int) -> None:
    trainer = build(*LARGE, f"encoder.width={width}")
    ours = [m for m in trainer.moco.modules() if isinstance(m, SmallMapConv)]
    assert bool(ours) == (width == 32)  # whose products are counted with the padding, too
    trainer.moco.fill_up(len(trainer.splits.train))
    macs = 0

    def count(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal macs
        macs += output.numel() * module.weight[0].numel()  # type: ignore[index]

    for module in trainer.moco.key_encoder.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    found = bench_speed.step_flops(trainer, RunHooks(trainer))
    first = trainer.moco.key_encoder.backbone.conv1
    images = 64 * 16 * 16 * first.weight.numel()  # the pixels get no gradient
    loss = 2 * 64 * 256 * 64
    # Once for keys; forward, gradient of inputs and of weights for queries.
    assert found == pytest.approx(2 * (4 * macs - images + loss), rel=1e-3)


def test_parts_of_a_step_add_up_to_it_and_none_is_counted_twice() -> None:
    trainer = build(*LARGE, "tracking.health_every_steps=1")
    hooks = RunHooks(trainer)
    trainer.train_step(hooks)
    times = []

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = Trainer.train_step(trainer, *arguments)
        times.append(time.perf_counter() - began)
        return result

    trainer.train_step = timed  # type: ignore[assignment, method-assign]
    parts = bench_speed.timed_parts(trainer, hooks, 4)
    assert parts.keys() == set(bench_speed.PARTS)
    alone = {"communication": 0.0} if comms.world_size() == 1 else {}
    assert all(seconds > 0 for part, seconds in parts.items() if part not in alone)
    # The ranges were recorded within these very steps, on the same clock.
    assert sum(parts.values()) == pytest.approx(sum(times) / 4, rel=0.05)
    assert parts["backward"] > parts["momentum"]


def test_the_command_prints_a_table_and_a_line_of_json_and_leaves_no_run(tmp_path: Path) -> None:
    arguments = "batch_size=16 bn_groups=4 encoder.width=4 moco.queue_size=64 data.size=16"
    arguments += " data.shapes_train=100 data.shapes_test=20 views.size=16 runtime.device=cpu"
    arguments += " --against textbook --repeats 2 --warm-up 1"
    command = [sys.executable, "-m", "moco_dist.bench", *arguments.split()]
    package = str(Path(__file__).parent.parent)
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": package}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True
    )
    assert done.stderr == ""
    *shown, line = done.stdout.splitlines()
    assert max(map(len, shown)) <= 80
    found = json.loads(line)
    assert found["textbook"]["step"]["times_as_fast"] > 0
    assert found["parts"].keys() == set(bench_speed.PARTS)
    assert list(tmp_path.iterdir()) == []


def test_what_cant_be_measured_is_one_sentence() -> None:
    for asked, sentence in (
        ({"against": "lightly"}, "--against lightly: give one of textbook"),
        ({"sweep": "batch_size"}, "--sweep batch_size: give a key and its values"),
    ):
        options = Namespace(**{"against": "", "sweep": "", "arguments": []} | asked)
        with pytest.raises(ConfigError, match=sentence):
            run.run(PretrainConfig(), StopRequests(), options)


def test_precisions_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    AcceleratorState._reset_state()  # of other tests of this process
    words = [*TINY, "tracking.wandb=disabled"]
    earlier = bytearray(10**9)  # of an earlier configuration
    del earlier
    peak = environment.memory_gb(torch.device("cpu"))
    options = {"against": "", "sweep": "precision=fp32,bf16", "workers": "", "arguments": words}
    once = dict.fromkeys(("repeats", "steps", "warm_up"), "1")
    run.run(load(PretrainConfig, words), StopRequests(), Namespace(**options, **once))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [each["precision"] for each in found] == ["fp32", "bf16"]
    assert max(each["memory_gb"] for each in found) < peak - 0.5


def test_the_cores_of_a_machine_are_shared_by_its_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 17)
    found = []
    for processes_here in ("1", "8", "64"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes_here)
        found.append(run.cores())
    assert found == [17, 2, 1]
