"""Blur by Gaussians with a width for each image, as products of matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moco_dist.config.recipe import ViewsConfig


def blur_taps(config: ViewsConfig) -> int:
    """Return the number of taps that hold the widest Gaussian of the views.

    They reach to four standard deviations, so that at any size a view is blurred as by Pillow and
    scipy, and at least to a twentieth of the side: 23 taps for 224 pixels as in SimCLR, appendix A.
    They can't reach beyond the view's own pixels, reflected once.
    """
    radius = max(config.size // 20, math.ceil(4 * config.blur_sigma_max))
    return 2 * min(radius, config.size - 1) + 1


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Return images (n, c, H, W) blurred by Gaussians of `sigma` (n,) pixels, edges reflected.

    The kernel has `kernel_size` taps, an odd number, and is normalised.
    """
    radius = kernel_size // 2
    assert radius < min(images.shape[2:]), f"{kernel_size} taps can't be reflected in the image"
    tap = torch.arange(-radius, radius + 1, device=images.device)
    taps = (-0.5 * (tap / sigma[:, None]) ** 2).softmax(dim=1).to(images.dtype)

    def weights(size: int) -> Tensor:
        pixel = torch.arange(size, device=images.device)
        last = size - 1
        read = last - (last - (pixel[:, None] + tap[:, None, None]).abs()).abs()
        places = (read == pixel).to(images.dtype)  # (taps, size, size), the same for all samples
        return (taps @ places.flatten(1)).reshape(-1, 1, size, size)

    height, width = images.shape[2:]
    return weights(height) @ images @ weights(width).mT
