"""The configuration of a probe."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from moco_dist.config.optim import OptimConfig
from moco_dist.config.recipe import DataConfig, Precision, ViewsConfig
from moco_dist.config.rules import ANY, OWN, check, check_name, check_positive, of_sweep, require
from moco_dist.config.running import CheckpointConfig, KnnConfig, RuntimeConfig, TrackingConfig

# Files that hold an encoder.
FOREIGN = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


@dataclass(frozen=True)
class GridConfig:
    """Learning rates and weight decays to try in parallel; empty means that of optim."""

    lr: list[float] = field(default_factory=list)
    # Multiples of optim.lr to try if grid.lr is empty and there are validation images to choose by.
    around: list[float] = field(default_factory=list)
    weight_decay: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        check("grid.", self, lr=OWN)
        require(
            all(lr > 0 for lr in self.lr),
            f"grid.lr={self.lr} has a rate that is not above 0; give positive learning rates",
        )
        require(
            all(factor > 0 for factor in self.around),
            f"grid.around={self.around} has a multiple that is not above 0; give positive numbers",
        )


@dataclass(frozen=True)
class ProbeConfig:
    """Everything that defines a probe of an encoder."""

    # Empty means NAME-probe, where NAME is the encoder's run.
    name: str = ""
    output: str = "runs"
    # A run directory (its newest checkpoint), a checkpoint folder, an exported folder, a folder of
    # timm or transformers, or a file with a state dict as libraries and training scripts save it
    # (.safetensors, .pth, .pt, .pth.tar, .ckpt, .bin); docs/export.md lists them.
    encoder: str = ""
    # The architecture of that file, such as timm/regnety_002; empty if it is a ResNet or says it.
    backbone: str = ""
    # linear: the encoder is frozen; finetune: it is trained too, with encoder_lr.
    protocol: Literal["linear", "finetune"] = "linear"
    # Draws the labelled images, the heads' initial weights, the order of images and their views.
    seed: int = 0
    # Number of probes in parallel, with seeds seed, seed + 1 and so on.
    seeds: int = 1
    # Share of the training images whose labels are used, equally many of each class.
    label_fraction: float = 1.0
    # Learning rate of the encoder with protocol=finetune, on the schedule of optim.
    encoder_lr: float = 0.01
    epochs: int = 100
    batch_size: int = 256
    precision: Precision = "fp32"
    stop_at_step: int = 0
    # true: new random views and an encoder pass in each epoch; false: features are computed once.
    augment: bool = True
    # Also probe a randomly initialised encoder.
    control: bool = True
    # probe/topK counts an image as correct if its class is among the K most likely.
    top_k: int = 5
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(
        default_factory=lambda: ViewsConfig(scale_min=0.08, jitter=0.0, grayscale=0.0)
    )
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=30.0, weight_decay=0.0))
    grid: GridConfig = field(default_factory=GridConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        check_name(self.name or "probe")
        check(
            "",
            self,
            seed=ANY,
            encoder_lr=OWN,
            seeds=(1, None),
            label_fraction=(0, 1),
            epochs=(1, None),
            batch_size=(1, None),
            top_k=(1, None),
        )
        require(
            self.seed + self.seeds < 2**63,
            f"seed={self.seed} with seeds={self.seeds} does not fit into 64 bits; give less",
        )
        require(
            not self.runtime.compile,
            "runtime.compile=true is for pretraining only; leave it out for a probe",
        )
        require(
            self.runtime.micro_batches == 1,
            f"runtime.micro_batches={self.runtime.micro_batches} is for pretraining only; leave it "
            "out for a probe, or give a smaller batch_size",
        )
        require(
            self.knn.features == "backbone",
            "knn.features=head is for pretraining only, because a probe reads the backbone alone; "
            "leave it out",
        )
        require(
            self.optim.name == "sgd" and not self.optim.nesterov,
            f"optim.name={self.optim.name} with optim.nesterov={self.optim.nesterov} is for "
            "pretraining only, and a probe is trained by plain SGD; leave both out",
        )
        check_positive("", self, encoder_lr="0.01 is usual")
        chosen = len(self.grid.lr) > 1 or len(self.grid.weight_decay) > 1
        require(
            self.protocol == "linear" or (self.seeds == 1 and not chosen),
            "protocol=finetune trains one encoder per launch; give seeds=1 and no grid, and launch "
            "it once for each setting and seed",
        )
        require(
            self.data.validation > 0 or not chosen,
            "data.validation=0 leaves no images for choosing from the grid, and the test images "
            "must not be used for that; give data.validation=0.1",
        )

    @property
    def unused(self) -> list[str]:
        """Those given keys that have no effect with the others, KEY=VALUE."""
        return [*self.data.unused, *self.optim.unused(self.epochs)]

    def rates(self) -> list[float]:
        """Return the learning rates to try, in order."""
        near = self.grid.around if self.protocol == "linear" and self.data.validation else []
        return self.grid.lr or [self.optim.lr * factor for factor in near] or [self.optim.lr]

    def pretraining(self) -> str:
        """Return the name of the encoder's run or file."""
        # Absolute, because the folder of a checkpoint has its run's name in the path only.
        source = Path(os.path.abspath(Path(self.encoder).expanduser()))
        if source.suffix in FOREIGN:
            return source.stem
        in_run = source.match("checkpoints/step_*")
        return source.parent.parent.name if in_run else source.resolve().name

    def run_name(self) -> str:
        """Return the name of this run."""
        return self.name or f"{self.pretraining()}-probe{of_sweep()}"
