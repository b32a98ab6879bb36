"""The proof that a probe leaves its encoder as it was, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from moco_dist.distributed import fingerprint
from moco_dist.errors import UserError


class Frozen:
    """What tensors of encoders were; `parameters` is whether these may not move either.

    The statistics of BatchNorm never may: they belong to the encoder, not to the data of the probe.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], parameters: bool) -> None:
        self._encoders, self._parameters = encoders, parameters
        self._before = dict(self._fingerprints())

    def check(self) -> None:
        """Raise UserError, naming a tensor, if one has moved or is about to."""
        self.check_modes()
        for name, now in self._fingerprints():
            if now != self._before[name]:
                raise UserError(
                    f"{name} moved during the probe ({self._before[name]} -> {now}), and the "
                    "encoder must stay as it was; no result is written: look for what writes to it"
                )

    def check_modes(self) -> None:
        """Raise UserError, naming its tensors, if a BatchNorm is in training mode."""
        for name, encoder in self._encoders.items():
            for key, module in encoder.named_modules():
                if module.training and getattr(module, "running_mean", None) is not None:
                    raise UserError(
                        f"the {name} encoder's {key}.running_mean and {key}.running_var: this "
                        "BatchNorm is in training mode, and would measure the probe's batches and "
                        "not the encoder; no result is written: call eval() on the encoder"
                    )

    def _fingerprints(self) -> Iterator[tuple[str, str]]:
        for name, encoder in self._encoders.items():
            # Buffers that no state dict holds are among them.
            tensors = [*encoder.named_buffers()]
            tensors += encoder.named_parameters() if self._parameters else ()
            for key, tensor in tensors:
                yield f"the {name} encoder's {key}", fingerprint.of_tensors(tensor)
