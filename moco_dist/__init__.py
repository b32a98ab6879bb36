"""Momentum Contrast pretraining and linear probing: one run, any machine.

The names in `__all__` are the public ones. Each is loaded when it is first used, so that
`import moco_dist` alone loads no PyTorch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moco_dist.config.encoder import EncoderConfig
    from moco_dist.config.moco import MocoConfig
    from moco_dist.config.optim import OptimConfig
    from moco_dist.config.probe import GridConfig, ProbeConfig
    from moco_dist.config.recipe import DataConfig, PretrainConfig, ViewsConfig
    from moco_dist.config.running import (
        CheckpointConfig,
        KnnConfig,
        MonitorConfig,
        RuntimeConfig,
        TrackingConfig,
    )
    from moco_dist.data.shapes import draw as draw_shapes
    from moco_dist.encoders.features import predict as knn_predict
    from moco_dist.encoders.load import load_encoder
    from moco_dist.method.batch_norm import average_statistics
    from moco_dist.method.encoder import build_encoder
    from moco_dist.method.loss import info_nce
    from moco_dist.method.moco import MoCo, shuffled_keys
    from moco_dist.method.plan import Plan
    from moco_dist.method.views import center as center_view
    from moco_dist.method.views import make as make_views
    from moco_dist.notebook import run_pretrain, run_probe

# How often PyTorch's threads look for each other before they sleep. With OpenMP's own 300,000 they
# fill the time that a program next to them leaves, and keep from running what they wait for; with
# none they are slow on an idle machine. It is read when PyTorch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")

__version__ = "0.1.0"

__all__ = [
    "CheckpointConfig", "DataConfig", "EncoderConfig", "GridConfig", "KnnConfig", "MoCo",
    "MocoConfig", "MonitorConfig", "OptimConfig", "Plan", "PretrainConfig", "ProbeConfig",
    "RuntimeConfig", "TrackingConfig", "ViewsConfig", "average_statistics", "build_encoder",
    "center_view", "draw_shapes", "info_nce", "knn_predict", "load_encoder", "make_views",
    "run_pretrain", "run_probe", "shuffled_keys",
]  # fmt: skip

# Where each public name is defined, and under which name if that is another one.
_PLACES = {
    "config.encoder": "EncoderConfig",
    "config.moco": "MocoConfig",
    "config.optim": "OptimConfig",
    "config.recipe": "DataConfig PretrainConfig ViewsConfig",
    "config.running": "CheckpointConfig KnnConfig MonitorConfig RuntimeConfig TrackingConfig",
    "config.probe": "GridConfig ProbeConfig",
    "data.shapes": "draw_shapes=draw",
    "encoders.features": "knn_predict=predict",
    "encoders.load": "load_encoder",
    "method.batch_norm": "average_statistics",
    "method.encoder": "build_encoder",
    "method.loss": "info_nce",
    "method.moco": "MoCo shuffled_keys",
    "method.plan": "Plan",
    "method.views": "center_view=center make_views=make",
    "notebook": "run_pretrain run_probe",
}


def __getattr__(name: str) -> Any:
    """Return a public name, loading the module that defines it."""
    for module, names in _PLACES.items():
        for public, _, own in (each.partition("=") for each in names.split()):
            if public == name:
                return getattr(importlib.import_module(f"moco_dist.{module}"), own or public)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted([*__all__, "__version__"])
