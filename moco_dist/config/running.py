"""How a run is evaluated, saved, watched and executed: it may all change when a run is resumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moco_dist.config.rules import LONGEST, OWN, check, check_positive


@dataclass(frozen=True)
class KnnConfig:
    """The weighted nearest-neighbour classifier on features (Wu et al. 2018, section 3.4)."""

    # Epochs between evaluations, including one after the last epoch; 0 means never.
    every_epochs: int = 10
    # Also evaluate the untrained encoder, as a control.
    at_start: bool = False
    k: int = 200
    temperature: float = 0.1
    # backbone: the features that a probe learns from; head: the vectors behind the projection head,
    # as in the CIFAR notebook of MoCo's authors (pretraining only).
    features: Literal["backbone", "head"] = "backbone"

    def __post_init__(self) -> None:
        check("knn.", self, k=(1, None), temperature=OWN)
        check_positive("knn.", self, temperature="0.1 is usual")


@dataclass(frozen=True)
class MonitorConfig:
    """What watches an encoder while it learns, besides the nearest-neighbour classifier."""

    # With each kNN evaluation, also fit a linear classifier to the backbone's features of the
    # training images, and log its accuracy on the validation images (online/top1).
    linear: bool = False


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which ones are kept."""

    # Epochs, steps and minutes between checkpoints; 0 means never. The end always writes one.
    every_epochs: int = 1
    every_steps: int = 0
    every_minutes: float = 0.0
    # Number of newest checkpoints to keep.
    keep_last: int = 2
    # Also keep checkpoints at multiples of this many steps; 0 means none.
    keep_every: int = 0
    # Write and keep the checkpoint with the best kNN accuracy.
    keep_best: bool = True

    def __post_init__(self) -> None:
        # A second one must exist, because the newest may be damaged or incomplete.
        check("checkpoint.", self, keep_last=(2, None))


@dataclass(frozen=True)
class TrackingConfig:
    """How often metrics are written, and to where besides metrics.jsonl and the console."""

    # Steps between lines of metrics.
    every_steps: int = 10
    # Epochs between sets of pictures, including one after the last epoch; 0 means never.
    media_every_epochs: int = 10
    # Steps between measurements of the run's health (health/...); 0 means never.
    health_every_steps: int = 50
    # auto: WANDB_MODE if set, else online if you are logged in, else offline.
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    # Empty: WANDB_PROJECT, or moco_dist; WANDB_ENTITY, or your own.
    project: str = ""
    entity: str = ""
    # Upload the trained query encoder as a checkpoint that the probe can read.
    upload_encoder: bool = False
    # Also write runs/NAME/tensorboard; needs the package's extra "tensorboard".
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check("tracking.", self, every_steps=(1, None))


@dataclass(frozen=True)
class RuntimeConfig:
    """The machine: nothing here changes the result beyond the order of floating-point sums.

    The exception is gradients=bf16.
    """

    # auto uses a GPU if there is one; cuda requires one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Pieces into which each process splits its share of the batch, to save memory.
    micro_batches: int = 1
    # Required number of processes; 0 accepts any.
    processes: int = 0
    # Compile the views and encoders of pretraining with torch.compile before the first step, which
    # takes a minute, or seconds from PyTorch's cache. Needs a C++ compiler, and Triton on a GPU.
    compile: bool = False
    # Let a GPU repeat the step as CUDA graphs once the queue is full: one process the whole step,
    # several what they compute between collectives.
    cuda_graph: bool = True
    # What gradients are summed in between processes. bf16 halves the bytes, but each process rounds
    # its own sum, so that the result depends on how many there are.
    gradients: Literal["full", "bf16"] = "full"
    # Choose deterministic kernels, so that the same machine gives the same bits. Without it, cuDNN
    # measures which kernels are fastest.
    deterministic: bool = True
    # Save and stop within this time; 0 means no limit. Slurm's time limit counts too.
    max_hours: float = 0.0
    # Seconds that a process may keep the others waiting in a collective before the run ends.
    timeout_seconds: float = 300.0
    # Seconds from a signal until a stuck process is ended; an unfinished save may take longer.
    grace_seconds: float = 25.0

    def __post_init__(self) -> None:
        wait = (1, LONGEST)
        check("runtime.", self, micro_batches=(1, None), timeout_seconds=wait, grace_seconds=wait)
