"""Operations on the colours of a batch of images, each image with its own strength.

Formulas are those of torchvision's transforms on float tensors, written for whole batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


def select(condition: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """Return where(condition, chosen, other), exactly, for finite numbers.

    `lerp` returns its end points as they are; on a CPU `where` takes 4 to 30 times as long.
    """
    return torch.lerp(other, chosen, condition.to(other.dtype))


def to_grayscale(images: Tensor) -> Tensor:
    """Return the luma (n, 1, H, W) of images (n, 3, H, W), with torchvision's digits of BT.601.

    Images of one channel are gray, and returned as they are.
    """
    if images.shape[1] == 1:
        return images
    red, green, blue = images.chunk(3, dim=1)
    return torch.add(torch.add(0.2989 * red, green, alpha=0.587), blue, alpha=0.114)


def blend(images: Tensor, reference: Tensor, factor: Tensor, out: Tensor | None = None) -> Tensor:
    """Return factor * images + (1 - factor) * reference, clamped to [0, 1]; `factor` is (n,).

    A factor of 1 changes no bit of images in [0, 1]. `out` may be `images`.
    """
    share = column(factor).to(images.dtype)
    return torch.lerp(reference, images, share, out=out).clamp_(0, 1)


def adjust_tone(
    images: Tensor, operation: Tensor, factor: Tensor, out: Tensor | None = None
) -> Tensor:
    """Return images (n, 1 or 3, H, W) in [0, 1] with one of three operations for each sample.

    BRIGHTNESS blends with black, CONTRAST with the mean of the gray image, SATURATION with the
    gray image, which leaves one channel as it is; `operation` is int64 (n,), `factor` float (n,).
    Formulas: torchvision's.
    """
    gray = to_grayscale(images)
    saturates, contrasts = (
        column(operation == which).to(images.dtype) for which in (SATURATION, CONTRAST)
    )
    mean = gray.mean(dim=(1, 2, 3), keepdim=True).mul_(contrasts)
    return blend(images, torch.addcmul(mean, gray, saturates), factor, out)


def adjust_hue(images: Tensor, hue: Tensor) -> Tensor:
    """Return images (n, 3, H, W) in [0, 1] with their hue turned by `hue` (n,), in turns.

    HSV after Smith, Color gamut transform pairs, SIGGRAPH 1978. Turning leaves the largest and the
    smallest channel values as they are, so value and saturation are never computed. With channels
    scaled to smallest 0 and largest 1 the hue, in sixths of a turn, is 1 + green + blue - red where
    green is more than blue, and the negative of that where it is less: the six cases as one.
    One channel has no hue: it is returned as it is.
    """
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    largest = torch.maximum(torch.maximum(red, green), blue)
    smallest = torch.minimum(torch.minimum(red, green), blue)
    chroma = largest.sub_(smallest)
    sector = (green + blue).sub_(red).sub_(smallest)
    sector.div_(chroma.clamp(min=torch.finfo(images.dtype).tiny)).add_(1)
    sector.copysign_(green - blue).add_((6 * hue).to(images.dtype)[:, None, None])
    sector -= (sector / 6).floor_().mul_(6)
    red, green, blue = (sector - 3).abs_() - 1, 2 - (sector - 2).abs_(), 2 - (sector - 4).abs_()
    turned = torch.empty_like(images)
    for channel, x in zip(turned.unbind(1), (red, green, blue), strict=True):
        torch.addcmul(smallest, chroma, x.clamp_(0, 1), out=channel)
    return turned
