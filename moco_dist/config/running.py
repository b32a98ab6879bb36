"""The configuration of how a run is evaluated, saved, watched and carried out.

Nothing in it changes the numbers of a run, and all of it may differ when one is resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moco_dist.config.rules import check, require


@dataclass(frozen=True)
class KnnConfig:
    """The weighted nearest-neighbour classifier on features (Wu et al. 2018, section 3.4)."""

    # Epochs between evaluations, and the last epoch is always evaluated; 0 is never.
    every_epochs: int = 10
    # Also evaluate the encoder before its first step, as a control.
    at_start: bool = False
    k: int = 200
    temperature: float = 0.1

    def __post_init__(self) -> None:
        check("knn.", self, every_epochs=(0, None), k=(1, None))
        require(
            self.temperature > 0, f"knn.temperature={self.temperature} is not above 0; 0.1 is usual"
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which ones stay."""

    # Epochs, steps, and minutes between checkpoints; 0 is never. The end always writes one.
    every_epochs: int = 1
    every_steps: int = 0
    every_minutes: float = 0.0
    # Newest checkpoints that stay.
    keep_last: int = 2
    # Checkpoints at multiples of so many steps stay for good; 0 is none.
    keep_every: int = 0
    # The one with the best kNN accuracy stays, and is written when it is found.
    keep_best: bool = True

    def __post_init__(self) -> None:
        check("checkpoint.", self, every_epochs=(0, None), every_steps=(0, None))
        check("checkpoint.", self, every_minutes=(0, None), keep_every=(0, None))
        # One may be damaged, or in the writing: there must be another one.
        check("checkpoint.", self, keep_last=(2, None))


@dataclass(frozen=True)
class TrackingConfig:
    """How often metrics are written, and where else than in metrics.jsonl and the console."""

    # Steps from one line of metrics to the next.
    every_steps: int = 10
    # Epochs from one set of pictures to the next, and the last epoch has one; 0 is never.
    media_every_epochs: int = 10
    # Steps between measurements of the run's health (health/...), which have lines too; 0 is never.
    health_every_steps: int = 50
    # auto: what WANDB_MODE says; else online for those who are logged in, offline for others.
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    # Empty: WANDB_PROJECT, or else moco_dist; WANDB_ENTITY, or else your own.
    project: str = ""
    entity: str = ""
    # Upload the trained query encoder as a checkpoint that the probe can read.
    upload_encoder: bool = False
    # Also write runs/NAME/tensorboard; needs the package's extra "tensorboard".
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check("tracking.", self, every_steps=(1, None), media_every_epochs=(0, None))
        check("tracking.", self, health_every_steps=(0, None))


@dataclass(frozen=True)
class RuntimeConfig:
    """The machine: nothing here changes the result beyond the order of floating-point sums."""

    # auto takes a GPU if there is one; cuda refuses to start without.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Pieces that each process cuts its share of the batch into, to save memory.
    micro_batches: int = 1
    # Processes that must take part; 0 accepts any number.
    processes: int = 0
    # Compile views and encoders of a pretraining by torch.compile, before its first step: minutes
    # at the first start, seconds from PyTorch's cache. Takes a C++ compiler, and Triton on a GPU.
    compile: bool = False
    # Choose deterministic kernels, so that the same machine gives the same bits.
    deterministic: bool = True
    # Save and stop before the run has taken so long; 0 is no limit. Slurm's end counts too.
    max_hours: float = 0.0
    # Seconds that a process may keep the others waiting in a collective before the run ends.
    timeout_seconds: float = 300.0
    # Seconds from a signal to the end, if the process is stuck; an unfinished save may last longer.
    grace_seconds: float = 25.0

    def __post_init__(self) -> None:
        check("runtime.", self, micro_batches=(1, None), processes=(0, None), max_hours=(0, None))
        check("runtime.", self, timeout_seconds=(1, None), grace_seconds=(1, None))
