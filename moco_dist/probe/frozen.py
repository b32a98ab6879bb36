"""The encoders of a probe, and the check that it leaves them unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from moco_dist.config.probe import ProbeConfig
from moco_dist.distributed import fingerprint
from moco_dist.encoders.load import Found
from moco_dist.errors import UserError
from moco_dist.method.encoder import Backbone, build_encoder
from moco_dist.runs.record import CONTROL, TRAINED


class Frozen:
    """Fingerprints of the encoders' buffers and, with `parameters`, of their parameters.

    BatchNorm statistics are buffers: they belong to the encoder and never change in a probe.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], parameters: bool) -> None:
        self._encoders, self._parameters = encoders, parameters
        self._before = dict(self._fingerprints())

    def check(self) -> None:
        """Raise UserError, naming the tensor, if one has changed or is about to."""
        self.check_modes()
        for name, now in self._fingerprints():
            if now != self._before[name]:
                raise UserError(
                    f"{name} changed during the probe ({self._before[name]} -> {now}), but the "
                    "encoder must not change; no result is written: look for what writes to it"
                )

    def check_modes(self) -> None:
        """Raise UserError if a BatchNorm is in training mode."""
        for name, encoder in self._encoders.items():
            for key, module in encoder.named_modules():
                if module.training and getattr(module, "running_mean", None) is not None:
                    raise UserError(
                        f"the {name} encoder's {key} is in training mode, so its running_mean and "
                        "running_var would follow the probe's batches; no result is written: call "
                        "eval() on the encoder"
                    )

    def _fingerprints(self) -> Iterator[tuple[str, str]]:
        for name, encoder in self._encoders.items():
            tensors = [*encoder.named_buffers()]  # also those that no state dict holds
            tensors += encoder.named_parameters() if self._parameters else ()
            for key, tensor in tensors:
                yield f"the {name} encoder's {key}", fingerprint.of_tensors(tensor)


def both(
    source: Found, config: ProbeConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Backbone]:
    """Return the trained encoder and, if the probe compares with one, a random one, both frozen."""
    found = {TRAINED: source.backbone}
    if config.control:
        control = build_encoder(source.architecture, config.seed + 1)
        control.expect(source.fed.mean, source.fed.std)
        found[CONTROL] = control.backbone
    for each in found.values():
        each.requires_grad_(False).eval().to(device, dtype)
    return found
