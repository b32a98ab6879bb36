"""Check that a GPU trains as the CPU does, and measure its speed; launch/gpu_check.sh runs this.

  python launch/gpu_check.py FILE      writes all figures to FILE

It compares

- losses on the GPU with those on the CPU, in float64 and in float32;
- the training step as a CUDA graph ("captured") with the ordinary ("eager") step;
- a run that was stopped and resumed with one that was not;
- the errors of the captured and of the eager step when numbers overflow;
- two processes with one, if there are two GPUs.

Then it measures the speed of paper.yaml and cifar10.yaml. It exits with status 1 if anything fails.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState

from moco_dist.config import yaml_files
from moco_dist.config.recipe import PretrainConfig
from moco_dist.data import datasets
from moco_dist.errors import NumbersError
from moco_dist.pretrain import run
from moco_dist.pretrain.hooks import RunHooks
from moco_dist.pretrain.step_graph import Stepper
from moco_dist.pretrain.trainer import Trainer
from moco_dist.runs.session import join

ROOT = Path(__file__).resolve().parent.parent
DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda")
SMALL = [
    *("data.name=shapes", "data.shapes_train=512", "data.shapes_test=50", "encoder.width=16"),
    *("batch_size=32", "bn_groups=4", "moco.queue_size=64", "views.blur=0.5", "epochs=2"),
    *("tracking.wandb=disabled", "knn.every_epochs=0", "moco.mask_own_keys=true"),
]
STEPS = 20


def load(*words: str) -> PretrainConfig:
    """Return the small configuration with `words`, on this check's device unless they say so."""
    AcceleratorState._reset_state(True)
    paper = str(ROOT / "configs/pretrain/paper.yaml")
    return yaml_files.load(PretrainConfig, [paper, *SMALL, f"runtime.device={DEVICE}", *words])


def losses(*words: str) -> tuple[list[float], str, bool]:
    """Return STEPS losses, the SHA-256 of all weights and keys, and whether steps were captured."""
    config = load(*words)
    PartialState._reset_state()
    trainer = Trainer(config, join(config), datasets.load(config.data, config.encoder.channels))
    take = Stepper(trainer, RunHooks(trainer))
    found = [take().figures()["train/loss"] for _ in range(STEPS)]
    digest = hashlib.sha256()
    for _, tensor in sorted(trainer.moco.state_dict().items()):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return found, digest.hexdigest(), take.captured or take.parts is not None


def apart(mine: list[float], other: list[float]) -> float:
    """Return the largest difference of two lists of losses."""
    return max(abs(a - b) for a, b in zip(mine, other, strict=True))


def gpu_against_cpu(precision: str, allowed: float) -> dict[str, Any]:
    """Compare the losses on both devices; float32 drifts apart as under any order of sums."""
    mine, other = (
        losses(f"precision={precision}", *words) for words in ((), ("runtime.device=cpu",))
    )
    found = apart(mine[0], other[0])
    return {"difference": found, "allowed": allowed, "ok": found <= allowed, "last": mine[0][-1]}


def graph_against_eager(*words: str) -> dict[str, Any]:
    """Compare the captured step with the eager one, and each with itself."""
    graph, again = losses(*words), losses(*words)
    eager = losses("runtime.cuda_graph=false", *words)
    found = apart(graph[0], eager[0])
    return {
        "difference": found,
        "same bits": graph[1] == eager[1],
        "same bits twice": graph[1] == again[1],
        "captured": graph[2],
        "ok": graph[2] and not eager[2] and found <= 1e-3 and graph[1] == again[1],
    }


def resumed(*words: str) -> dict[str, Any]:
    """Compare a run that was stopped and resumed with one that was not."""
    with tempfile.TemporaryDirectory() as folder:
        for name, stops in (("whole", [0]), ("cut", [10, 0])):
            for stop in stops:
                PartialState._reset_state()
                run.run(load(f"output={folder}", f"name={name}", f"stop_at_step={stop}", *words))
        files = [
            sorted(Path(folder, name).rglob("model.safetensors"))[-1] for name in ("whole", "cut")
        ]
        same = files[0].read_bytes() == files[1].read_bytes()
    return {"same bits": same, "ok": same}


def refused(*words: str) -> dict[str, Any]:
    """Compare the errors of the captured and the eager step when a learning rate is too high."""
    said = []
    for graph in ("true", "false"):
        config = load("optim.lr=0.01", f"runtime.cuda_graph={graph}", *words)
        PartialState._reset_state()
        trainer = Trainer(config, join(config), datasets.load(config.data, config.encoder.channels))
        hooks = RunHooks(trainer)
        take = Stepper(trainer, hooks)
        try:
            for step in range(STEPS):
                if step == 3:  # the one that is captured
                    high = dataclasses.replace(
                        config, optim=dataclasses.replace(config.optim, lr=1e19)
                    )
                    trainer.config = high
                take()
            take.settle()
            said.append("nothing was refused")
        except NumbersError as error:
            whole = all(t.isfinite().all() for t in trainer.moco.state_dict().values())
            said.append(f"{error} | finite {whole} | {trainer.step} {trainer.moco.queue.enqueued}")
    return {"said": said, "ok": said[0] == said[1] and "finite True" in said[0]}


def bench(config: str, *words: str) -> dict[str, Any]:
    """Return the figures of moco_dist.bench."""
    command = [sys.executable, "-m", "moco_dist.bench", str(ROOT / "configs/pretrain" / config)]
    command += ["data.name=shapes", "data.shapes_train=5000", "runtime.deterministic=false"]
    command += [f"runtime.device={DEVICE}", "--repeats", "3", "--steps", "40", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return {"ok": False, "said": done.stderr[-500:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"ok": True}


def two_gpus() -> dict[str, Any]:
    """Compare two processes with one, and their step as graphs with the eager one."""
    if torch.cuda.device_count() < 2:
        return {"ok": True, "not run": "there is one GPU"}

    def of_two(*words: str) -> tuple[list[float], str, bool]:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        command += ["--num_processes", "2", __file__, "--losses", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        found, digest, captured = json.loads(done.stdout.splitlines()[-1])
        return found, digest, captured

    found = apart(of_two("precision=fp64")[0], losses("precision=fp64")[0])
    graph, eager = of_two(), of_two("runtime.cuda_graph=false")
    drift = apart(graph[0], eager[0])
    return {
        "difference": found,
        "graph against eager": drift,
        "same bits": graph[1] == eager[1],
        "captured": graph[2],
        "ok": found <= 1e-8 and drift <= 1e-3 and graph[2] and not eager[2],
    }


def main() -> None:
    """Run all checks and print what they found."""
    if sys.argv[1] == "--losses":
        print(json.dumps(losses(*sys.argv[2:])))
        return
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "GPU against CPU, fp64": lambda: gpu_against_cpu("fp64", 1e-8),
        "GPU against CPU, fp32": lambda: gpu_against_cpu("fp32", 0.05),
        "graph against eager, fp32": graph_against_eager,
        "graph against eager, bf16, symmetric": lambda: graph_against_eager(
            "precision=bf16", "moco.symmetric=true", "runtime.micro_batches=2"
        ),
        "resumed against straight": resumed,
        "numbers that are not finite": refused,
        "two GPUs against one": two_gpus,
        "bench paper.yaml": lambda: bench("paper.yaml", "precision=bf16"),
        "bench cifar10.yaml": lambda: bench("cifar10.yaml", "precision=bf16"),
    }
    only = os.environ.get("GPU_CHECK_ONLY", "")
    if not any(only in name for name in checks):
        names = ", ".join(checks)
        print(f"error: GPU_CHECK_ONLY={only} is in no name of a check: {names}", file=sys.stderr)
        sys.exit(78)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else DEVICE,
        "torch": torch.__version__,
    }
    for name, check in checks.items():
        if only not in name:
            continue
        began = time.monotonic()
        try:
            result = check()
        except Exception as error:
            result = {"ok": False, "said": repr(error)[:500]}
        found[name] = result | {"seconds": round(time.monotonic() - began, 1)}
        shown = {k: v for k, v in found[name].items() if k in _SHOWN}
        print(f"{name:40} {'ok' if result['ok'] else 'FAILED'}  {shown}", flush=True)
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(not all(each["ok"] for each in found.values() if isinstance(each, dict)))


_SHOWN = {
    *(
        "difference",
        "same bits",
        "same bits twice",
        "captured",
        "said",
        "seconds",
        "not run",
        "last",
    ),
    *("images_per_second", "step_seconds", "cpu_seconds", "memory_gb"),
}

if __name__ == "__main__":
    main()
