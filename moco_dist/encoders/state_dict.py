"""Files of tensors, read without running code in them, and backbones filled with tensors."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from moco_dist.config.encoder import EncoderConfig
from moco_dist.errors import ConfigError, DataError, MissingError, shown
from moco_dist.method.encoder import build_encoder
from moco_dist.runs import checkpoint

SUFFIXES = (".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin")
_MOST = 2**34  # bytes of a file, fifty times the largest ResNet
_COUNTER = "num_batches_tracked"


def read(path: Path) -> tuple[Mapping[Any, Any], str]:
    """Return the content of a file of tensors, and its SHA-256; MissingError or DataError."""
    if not path.is_file():
        raise MissingError(f"{path}: no such file; give a state dict, or the run that it is of")
    if not path.name.endswith(SUFFIXES):
        raise DataError(
            f"{path}: encoders are not read from such files, but from {', '.join(SUFFIXES)}; give "
            "one of these, a run directory, or one of its checkpoints/step_... folders"
        )
    if path.stat().st_size > _MOST:
        raise DataError(
            f"{path}: {path.stat().st_size:,} bytes are more than any encoder has; use another file"
        )
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.load_file(path)
        else:
            with safe_globals([argparse.Namespace]):  # the arguments of a script, plain values
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds for bytes that are no tensors
        raise DataError(
            f"{path}: can't be read as tensors alone ({_reason(path, error)}); save the encoder's "
            "state_dict() as a .safetensors file"
        ) from error
    return (content if isinstance(content, Mapping) else {"state_dict": content}), sha256


def _reason(path: Path, error: Exception) -> str:
    """Return why a file can't be read, without PyTorch's advice and its control characters."""
    try:
        objects = set(get_unsafe_globals_in_checkpoint(path)) - {"argparse.Namespace"}
    except Exception:  # it reads only whole files of the newer format
        objects = set()
    if objects:
        return f"it also holds {shown(', '.join(sorted(objects)[:3]), 200)}, which may run code"
    text = str(error).rpartition("WeightsUnpickler error: ")[2]
    text = re.sub(r"\x1b\[[\d;]*m", "", text).strip() or repr(error)
    return shown(text.splitlines()[0], 200)


def shapes(config: EncoderConfig, path: Path) -> dict[str, Tensor]:
    """Return an encoder's tensors without content; DataError if it can't be built."""
    try:
        with torch.device("meta"):  # needs no memory, whatever sizes a stranger wrote
            return build_encoder(config, seed=0).state_dict()
    except (ConfigError, RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise DataError(f"{path}: not readable by this version ({reason})") from error


def backbone_shapes(config: EncoderConfig, path: Path) -> dict[str, Tensor]:
    """Return `shapes` of the backbone alone, under its own names."""
    prefix = "backbone."
    return {k.removeprefix(prefix): v for k, v in shapes(config, path).items() if prefix in k}


def filled(config: EncoderConfig, tensors: Mapping[str, Tensor], path: Path) -> Any:
    """Return a backbone with these tensors, frozen, float32, on the CPU, in evaluation mode.

    Raises DataError unless they are exactly the backbone's; all num_batches_tracked may be missing,
    as evaluation doesn't use them and old versions didn't write them.
    """
    own = backbone_shapes(config, path)
    zero = torch.zeros((), dtype=torch.int64)
    counters = {name: zero for name in own if name.endswith(_COUNTER)}
    if not counters.keys() & tensors.keys():
        tensors = {**tensors, **counters}
    if faults := checkpoint.differences(own, tensors):
        raise DataError(
            f"{path}: is nearest to {described(config)}, but has not exactly its tensors ({faults})"
            "; use another file, or name another architecture with backbone= (in a pretraining "
            "encoder.backbone=, in an export --backbone)"
        )
    found = build_encoder(config, seed=0).backbone
    checkpoint.load_tensors(found, tensors, path)
    return found.requires_grad_(False).eval()


def described(architecture: EncoderConfig) -> str:
    """Return the architecture in words."""
    gray = ", gray images" if architecture.channels == 1 else ""
    return architecture.described + gray


def require_trained(backbone: nn.Module, source: object) -> None:
    """Raise DataError if a backbone is as initialised, or holds what is not finite.

    Normalisation layers start with weights of 1 (or 0) and biases of 0, and the first step changes
    them all. Without such layers an untrained backbone is not recognised.
    """
    kinds = nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm
    norms = {
        name: each
        for name, each in backbone.named_modules()
        if isinstance(each, kinds) and each.weight is not None and each.bias is not None
    }
    for name, tensor in backbone.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DataError(f"{source}: {name} is not finite; use another checkpoint")
    alike = ((n.weight == 1).all() or (n.weight == 0).all() for n in norms.values())
    if norms and all(alike) and not any(norm.bias.any() for norm in norms.values()):
        raise DataError(
            f"{source}: is a random encoder and no trained one: the weights of all its "
            f"{len(norms)} normalisation layers ({next(iter(norms))}.weight and so on) are 1 and "
            "the biases 0, as before the first step; give the trained one (control=true probes a "
            "random one)"
        )
