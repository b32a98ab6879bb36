"""torchvision's colour operations on float images, for batches with a strength per image."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
# Shares of red, green and blue: BT.601 as torchvision rounds it.
LUMA = 0.2989, 0.587, 0.114


def filled(values: Iterable[float], like: Tensor) -> Tensor:
    """Return the vector of `values` on the device of `like`, filled there, without a copy."""
    return torch.cat([like.new_full((1,), value) for value in values])


def select(condition: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """Return where(condition, chosen, other) for finite images (n, c, H, W), condition bool (n,).

    `lerp` returns its end points exactly; on a CPU `where` takes 4 to 30 times as long.
    """
    return torch.lerp(other, chosen, condition.reshape(-1, 1, 1, 1).to(other.dtype))


def change_some(
    images: Tensor, which: Tensor, change: Callable[[Tensor, Tensor | slice], Tensor]
) -> Tensor:
    """Return images (n, c, H, W) with those of `which`, bool (n,), replaced by `change` of them.

    `change` is called with images and their rows. A CPU changes those rows only, in place; a GPU
    would have to wait for `which`, so it computes all and selects.
    """
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        return select(which, change(images, slice(None)), images)
    rows = which.nonzero().squeeze(1)
    return images.index_copy_(0, rows, change(images.index_select(0, rows), rows))


def to_grayscale(images: Tensor) -> Tensor:
    """Return the luma (n, 1, H, W) of images (n, 1 or 3, H, W)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.chunk(3, dim=1)
    return torch.add(torch.add(LUMA[0] * red, green, alpha=LUMA[1]), blue, alpha=LUMA[2])


def make_gray(images: Tensor, which: Tensor) -> Tensor:
    """Return images (n, c, H, W) with those of `which`, bool (n,), gray; on a CPU in place."""
    return change_some(images, which, lambda some, _: to_grayscale(some).expand_as(some))


def solarize(images: Tensor) -> Tensor:
    """Return images in [0, 1] with each value x of 0.5 or more replaced by 1 - x."""
    return torch.minimum(images, 1 - images)


def tones(operation: Tensor, factor: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `adjust_tone` needs: matrices (..., n, c, c) and weights of means (..., n, c).

    `operation`, int64 (..., n), is BRIGHTNESS, CONTRAST or SATURATION; `factor`, float64 (..., n).
    `images` give the number of channels, 1 or 3, and the dtype.
    """
    rest = 1 - factor
    channels = images.shape[1]
    luma = filled(LUMA if channels == 3 else (1.0,), factor)
    of_gray, of_mean = (
        (rest * (operation == which))[..., None] * luma for which in (SATURATION, CONTRAST)
    )
    own = factor[..., None, None] * torch.eye(channels, dtype=factor.dtype, device=factor.device)
    return (own + of_gray[..., None, :]).to(images.dtype), of_mean.to(images.dtype)


def adjust_tone(images: Tensor, matrix: Tensor, of_mean: Tensor) -> Tensor:
    """Return images (n, 1 or 3, H, W) after one operation each, given by `tones`.

    factor * image + (1 - factor) * reference, clamped to [0, 1]: BRIGHTNESS blends with black,
    CONTRAST with the mean of the gray image, SATURATION with the gray image. Each is a matrix
    (c, c) on colours and one number to add. A factor of 1 changes no bit of images in [0, 1].
    """
    # Summing an image in one step would depend on the number of threads, and the bits of baddbmm
    # depend on the number of images.
    offset = (images.mean(3).mean(2) * of_mean).sum(1).reshape(-1, 1, 1)
    if torch.compiler.is_compiling():  # it fuses short sums, but not products of matrices
        own = images.unbind(1)
        rows = [row.reshape(-1, len(own), 1, 1).unbind(1) for row in matrix.unbind(1)]
        mixed = [sum(map(torch.mul, row, own), offset) for row in rows]
        return torch.stack(mixed, 1).clamp(0, 1)
    return torch.bmm(matrix, images.flatten(2)).add_(offset).clamp_(0, 1).view_as(images)


def adjust_hue_(images: Tensor, hue: Tensor) -> Tensor:
    """Turn the hue of images (n, 3, H, W) in [0, 1], in place, by `hue` (n,), in turns.

    HSV after Smith, Color gamut transform pairs, SIGGRAPH 1978. The largest and smallest channel
    stay, so value and saturation are never computed. With channels scaled to smallest 0 and largest
    1, the hue in sixths of a turn is 1 + green + blue - red where green exceeds blue, and the
    negative of that elsewhere, which covers all six cases. One channel has no hue and stays.
    """
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    smallest, largest = torch.minimum(green, blue), torch.maximum(green, blue)
    torch.minimum(smallest, red, out=smallest)
    chroma = torch.maximum(largest, red, out=largest).sub_(smallest)
    sector = (green + blue).sub_(red).sub_(smallest)
    # One tensor for all intermediate values, because a core's cache holds few.
    spare = chroma.clamp(min=torch.finfo(images.dtype).tiny)
    sector.div_(spare).add_(1).copysign_(torch.sub(green, blue, out=spare))
    sector.add_((6 * hue).to(images.dtype)[:, None, None])
    sector.sub_(torch.div(sector, 6, out=spare).floor_().mul_(6))
    for channel, at, slope, offset in ((red, 3, 1, -1), (green, 2, -1, 2), (blue, 4, -1, 2)):
        share = torch.sub(sector, at, out=spare).abs_().mul_(slope).add_(offset)
        share.clamp_(0, 1)
        if torch.compiler.is_compiling():  # it can't write into a part of a tensor
            channel.copy_(torch.addcmul(smallest, chroma, share))
        else:
            torch.addcmul(smallest, chroma, share, out=channel)
    return images
