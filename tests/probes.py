"""Small pretrainings and probes that the tests of the probe share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets
from moco_dist.data.shapes import CLASSES
from moco_dist.distributed import fingerprint
from moco_dist.encoders.load import find
from moco_dist.pretrain import loop
from moco_dist.pretrain.run import build
from moco_dist.probe import run as probe_run
from moco_dist.probe.linear_probe import LinearProbe
from moco_dist.runs import session

DATA = ["data.shapes_train=150", "data.shapes_test=37", "data.size=16", "views.size=16"]
PRETRAIN = [
    *("batch_size=16", "bn_groups=8", "encoder.width=4", "encoder.dim=8", "moco.queue_size=32"),
    *DATA,
    "runtime.device=cpu",
]
PROBE = [*DATA, "batch_size=32", "epochs=3", "optim.lr=1", "runtime.device=cpu", "precision=fp64"]


def pretrain(output: Path, *overrides: str) -> Path:
    """Do five steps of a pretraining; return its run directory."""
    config = load(PretrainConfig, [*PRETRAIN, f"output={output}", "name=tiny", *overrides])
    opened = session.start(config)
    trainer = build(config, opened)
    for _ in range(5):
        trainer.train_step()
    loop.save(trainer, opened, wait=True)
    opened.close()
    return output / "tiny"


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of five steps."""
    return pretrain(tmp_path_factory.mktemp("pretrained"))


def tinted(train: int, validation: int, test: int) -> datasets.Splits:
    """Return images of one colour for each class, with a shift for each image and noise."""
    generator = torch.Generator().manual_seed(5)
    colours = 60 + 130 * torch.rand(10, 3, generator=generator)

    def draw(count: int) -> datasets.Images:
        labels = torch.arange(count) % 10
        shifts = 25 * torch.randn(count, 3, generator=generator)
        noise = 25 * torch.randn(count, 3, 16, 16, generator=generator)
        pixels = (colours[labels] + shifts)[:, :, None, None] + noise
        return datasets.Images(pixels.clamp(0, 255).to(torch.uint8), labels, CLASSES)

    parts = draw(train), draw(validation), draw(test)
    content = fingerprint.of_tensors(*(part.pixels for part in parts))
    return datasets.Splits(*parts, content, "in memory")


def prepared(
    pretrained: Path, output: Path, *overrides: str, splits: datasets.Splits | None = None
) -> LinearProbe:
    """Return a probe before its first step, on `splits` if given."""
    arguments = [*PROBE, f"encoder={pretrained}", f"output={output}", "name=prepared", *overrides]
    config = load(ProbeConfig, arguments)
    source = find(pretrained, backbone=config.backbone)
    splits = splits or datasets.load(config.data)
    return LinearProbe(config, session.start(config), splits, source)


def run(pretrained: Path | str, output: Path | str, *overrides: str) -> dict[str, Any]:
    """Probe in this process and return the content of DONE."""
    arguments = [f"encoder={pretrained}", f"output={output}", *overrides]
    probe_run.run(load(ProbeConfig, [*PROBE, *arguments]))
    done: dict[str, Any] = json.loads((Path(output) / "tiny-probe" / "DONE").read_text())
    return done


def results(run: Path) -> dict[str, Any]:
    """Return the content of results.json."""
    content: dict[str, Any] = json.loads((run / "results.json").read_text())
    return content
