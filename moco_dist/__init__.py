"""Momentum Contrast pretraining and linear probing: one run, any machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moco_dist.encoders.load import load_encoder as load_encoder

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load PyTorch when `load_encoder` is asked for, and not before."""
    if name == "load_encoder":
        from moco_dist.encoders.load import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
