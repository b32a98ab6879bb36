"""A backbone of two halves, one for the lightness and one for the colours of an image.

Contrastive Multiview Coding (Tian, Krishnan and Isola 2019, arXiv:1906.05849): L, and a and b, are
two views of an image, and each half of the backbone sees one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Channels of L, and of a and b.
CHANNELS = 1, 2
# Linear sRGB to CIE XYZ (IEC 61966-2-1), and the white point D65 for the observer of 2 degrees.
_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = 0.95047, 1.0, 1.08883
# The least and largest L, a and b of sRGB colours, as in train_CMC.py of HobbitLong/CMC.
_RANGES = (0.0, 100.0), (-86.183, 98.233), (-107.857, 94.478)


def rgb_to_lab(images: Tensor) -> Tensor:
    """Return sRGB `images` (n, 3, height, width) in [0, 1] as CIE L, a and b, of that shape.

    L is in [0, 100]. A channel is computed from the others by sums and products alone, which
    autocast leaves in their dtype.
    """
    linear = torch.where(images <= 0.04045, images / 12.92, ((images + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear.unbind(1)
    xyz = [
        (r * red + g * green + b * blue) / white
        for (r, g, b), white in zip(_TO_XYZ, _WHITE, strict=True)
    ]
    bent = ((6 / 29) ** 3, (29 / 6) ** 2 / 3, 4 / 29)
    x, y, z = (torch.where(t > bent[0], t ** (1 / 3), bent[1] * t + bent[2]) for t in xyz)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


class Halves(nn.Module):
    """Two backbones with nothing in common; their features are joined, those of L first.

    Images come in RGB, less `mean` and divided by `std` as those of any backbone, and are converted
    here, so that training, evaluation and exports all see the same. L, a and b are scaled to
    [-1, 1], the range that they have in sRGB.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, lightness: nn.Module, colours: nn.Module, num_features: int) -> None:
        super().__init__()
        self.l, self.ab = lightness, colours
        self.num_features = num_features
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.register_buffer("std", torch.ones(3, 1, 1))

    @torch.no_grad()
    def expect(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take these as what images are normalised by."""
        for own, given in ((self.mean, mean), (self.std, std)):
            own.copy_(torch.tensor(given, dtype=own.dtype)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """Return the features (rows, num_features) of normalised images (rows, 3, h, w)."""
        # Rounding takes black and white a little out of [0, 1].
        lab = rgb_to_lab((x * self.std + self.mean).clamp(0, 1))
        scaled = [
            (channel - (low + high) / 2) / ((high - low) / 2)
            for channel, (low, high) in zip(lab.unbind(1), _RANGES, strict=True)
        ]
        lightness, colours = torch.stack(scaled, 1).split(CHANNELS, 1)
        return torch.cat([self.l(lightness), self.ab(colours)], 1)
