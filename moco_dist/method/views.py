"""The random views of a batch of images, computed on their device, drawn for each sample.

`draw` returns the parameters as a pure function of (seed, epoch, sample index, view); `apply` makes
the views. The recipe is MoCo v2's (Chen et al. 2020, arXiv:2003.04297, footnote 1: SimCLR's views
with a weaker jitter); `grayscale_before_jitter` gives MoCo v1's (He et al. 2020, arXiv:1911.05722,
section 3.3), and solarisation follows BYOL's (Grill et al. 2020, arXiv:2006.07733, appendix B).
Distributions and arithmetic are those of torchvision's transforms on float tensors.
On a GPU no shape depends on a value and the host never waits, so that a step can be a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from moco_dist.config.recipe import ViewsConfig
from moco_dist.method.slots import SLOTS, Slot
from moco_dist.method.view_blur import blur_taps, gaussian_blur
from moco_dist.method.view_colors import (
    HUE,
    adjust_hue_,
    adjust_tone,
    change_some,
    filled,
    make_gray,
    select,
    solarize,
    tones,
)
from moco_dist.randomness import Key, Purpose, uniform

# Pixel values that an operation can keep in a core's cache with all that it needs.
_IN_CACHE = 2**18


def recipe(recipes: Sequence[ViewsConfig], view: int) -> ViewsConfig:
    """Return the recipe of view number `view`, of one recipe for all or one for each."""
    return recipes[min(view, len(recipes) - 1)]


@dataclass(frozen=True)
class Draws:
    """The parameters of n views: each field has one row per sample."""

    # The crop, in pixels of the source image: int64.
    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor
    flip: Tensor  # bool
    jitter: Tensor  # bool
    # Factors of brightness, contrast and saturation, and shift of the hue in turns: float64.
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    order: Tensor  # int64 (n, 4): the operation at each place, BRIGHTNESS to HUE
    grayscale: Tensor  # bool
    blur: Tensor  # bool
    sigma: Tensor  # float64, pixels of the view
    solarize: Tensor  # bool

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the jitter's numbers in order, float64 (4, n), and the hue's place, int64 (n,)."""
        factors = torch.stack([self.brightness, self.contrast, self.saturation, self.hue])
        return factors.gather(0, self.order.T), (self.order == HUE).long().argmax(dim=1)


def _between(number: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * number


def _factor(number: Tensor, strength: float) -> Tensor:
    return _between(number, max(0.0, 1.0 - strength), 1.0 + strength)


def _crop_sides(
    config: ViewsConfig, numbers: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return height and width of the first attempt that fits, and whether one does."""
    shares, ratio = _attempts(config, numbers)
    area = height * width * shares
    heights = (area / ratio).sqrt().round().long()
    widths = (area * ratio).sqrt().round().long()
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    first = fits.long().argmax(dim=1, keepdim=True)
    # If none fits: the largest crop with the image's ratio, clamped to the range.
    largest_height = min(height, round(width / config.ratio_min))
    largest_width = min(width, round(height * config.ratio_max))
    heights = torch.where(fits, heights, largest_height).gather(1, first)
    widths = torch.where(fits, widths, largest_width).gather(1, first)
    return heights.squeeze(1), widths.squeeze(1), fits.gather(1, first).squeeze(1)


def _attempts(config: ViewsConfig, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return each attempt's share of the area and ratio, (n, CROP_ATTEMPTS)."""
    shares, ratios = numbers.chunk(2, dim=1)
    ratio = _between(ratios, math.log(config.ratio_min), math.log(config.ratio_max)).exp()
    return _between(shares, config.scale_min, config.scale_max), ratio


def crop_numbers(config: ViewsConfig, seed: int, epoch: Key, index: Tensor, view: int) -> Tensor:
    """Return what a crop is made from, for any image size: float64 (n, CROP_NUMBERS).

    These are the attempts' shares and ratios, then the crop's place in [0, 1), down and across.
    """
    slots = torch.arange(Slot.LEFT + 1, device=index.device)
    numbers = uniform(seed, Purpose.VIEW, epoch, view, index[:, None], slots)
    attempts = _attempts(config, numbers[:, : Slot.ORDER])
    return torch.cat([*attempts, numbers[:, Slot.TOP :]], dim=1)


def draw(
    config: ViewsConfig,
    seed: int,
    epoch: Key,
    index: Tensor,
    view: Key,
    image_height: int,
    image_width: int,
) -> Draws:
    """Return the parameters of view number `view` of the samples `index`, int64 (n,).

    `view` is an int or int64 (n,); `epoch` an int or a scalar int64 tensor. The crop is Inception's
    (Szegedy et al. 2015, arXiv:1409.4842, section 6) with torchvision's ten attempts; the rest
    follows SimCLR's appendix A (Chen et al. 2020, arXiv:2002.05709) as in torchvision.
    """
    slots = torch.arange(SLOTS, device=index.device)
    view = view[:, None] if isinstance(view, Tensor) else view
    numbers = uniform(seed, Purpose.VIEW, epoch, view, index[:, None], slots)
    order, by_slot = numbers[:, Slot.ORDER : Slot.TOP], numbers.unbind(1)
    height, width, fits = _crop_sides(config, numbers[:, : Slot.ORDER], image_height, image_width)
    spare_height, spare_width = image_height - height, image_width - width
    return Draws(
        top=torch.where(fits, (by_slot[Slot.TOP] * (spare_height + 1)).long(), spare_height // 2),
        left=torch.where(fits, (by_slot[Slot.LEFT] * (spare_width + 1)).long(), spare_width // 2),
        height=height,
        width=width,
        flip=by_slot[Slot.FLIP] < config.flip,
        jitter=by_slot[Slot.JITTER] < config.jitter,
        brightness=_factor(by_slot[Slot.BRIGHTNESS], config.brightness),
        contrast=_factor(by_slot[Slot.CONTRAST], config.contrast),
        saturation=_factor(by_slot[Slot.SATURATION], config.saturation),
        hue=_between(by_slot[Slot.HUE], -config.hue, config.hue),
        order=order.argsort(dim=1),
        grayscale=by_slot[Slot.GRAYSCALE] < config.grayscale,
        blur=by_slot[Slot.BLUR] < config.blur,
        sigma=_between(by_slot[Slot.SIGMA], config.blur_sigma_min, config.blur_sigma_max),
        solarize=by_slot[Slot.SOLARIZE] < config.solarize,
    )


def _resize_weights(
    start: Tensor, length: Tensor, flip: Tensor, source: int, size: int, dtype: torch.dtype
) -> Tensor:
    """Return matrices (n, size, source) that cut out [start, start + length), resize and flip it.

    The antialiased bilinear filter is a triangle as wide as the larger of the two pixels.
    """
    target = torch.arange(size, dtype=torch.float64, device=start.device)
    target = torch.where(flip[:, None], size - 1 - target, target)
    scale = length[:, None].to(torch.float64) / size
    center = start[:, None] + scale * (target + 0.5) - 0.5
    # The whole part is subtracted first, because float32 lacks the bits for the sum.
    whole = center.floor()
    pixel = torch.arange(source, dtype=dtype, device=start.device)
    offset = pixel - whole[:, :, None].to(dtype)
    offset -= (center - whole)[:, :, None].to(dtype)
    support = scale.clamp(min=1.0)[:, :, None].to(dtype)
    weights = (1 - offset.abs_().div_(support)).clamp_(min=0)
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    weights *= inside[:, None, :].to(dtype)
    return weights.div_(weights.sum(dim=2, keepdim=True))


def crop_and_resize(images: Tensor, draws: Draws, size: int) -> Tensor:
    """Return the crops of images (n, c, H, W), resized to (n, c, size, size) and flipped.

    Agrees with interpolate(antialias=True) of the cut-out window: nothing beyond its edge is read.
    """
    channels, height, width = images.shape[1:]
    upright = torch.zeros_like(draws.flip)
    rows = _resize_weights(draws.top, draws.height, upright, height, size, images.dtype)
    columns = _resize_weights(draws.left, draws.width, draws.flip, width, size, images.dtype)
    narrow = torch.bmm(images.flatten(1, 2), columns.mT)
    return rows[:, None] @ narrow.reshape(-1, channels, height, size)


def color_jitter(images: Tensor, draws: Draws) -> Tensor:
    """Return images (n, 1 or 3, H, W) after each one's four operations in order, in [0, 1].

    A CPU works in place on samples with equal places of the hue. A GPU would have to wait for those
    places, so it treats all samples alike; the bits are the same.
    """
    by_place = images.device.type == "cpu" and not torch.compiler.is_compiling()
    return (_jitter_by_place if by_place else _jitter_alike)(images, draws)


def _jitter_alike(images: Tensor, draws: Draws) -> Tensor:
    """Jitter by three blends, one turn of the hue and three blends, which cover all 24 orders.

    A blend is made on one side of the hue and has the factor 1, the exact identity, on the other.
    """
    factors, place_of_hue = draws.factors()
    place = torch.arange(4, device=images.device)[:, None]
    before, after = place < place_of_hue, place > place_of_hue
    images = images.clamp(0, 1)
    early, late = (
        tones(draws.order.T, torch.where(draws.jitter & when, factors, 1.0), images)
        for when in (before, after)
    )
    for slot in (0, 1, 2):
        images = adjust_tone(images, early[0][slot], early[1][slot])
    images = select(draws.jitter, adjust_hue_(images.clone(), draws.hue), images)
    for slot in (1, 2, 3):
        images = adjust_tone(images, late[0][slot], late[1][slot])
    return images


def _jitter_by_place(images: Tensor, draws: Draws) -> Tensor:
    """Jitter in place, by the place of the hue, as many samples at a time as fit in the caches.

    It clamps where `_jitter_alike` has blends of factor 1.
    """
    factors, place_of_hue = draws.factors()
    matrices, of_mean = tones(draws.order.T, factors, images)
    images.clamp_(0, 1)
    at_once = max(1, _IN_CACHE * torch.get_num_threads() // images[0].numel())
    for place in range(4):
        rows = (draws.jitter & (place_of_hue == place)).nonzero().squeeze(1)
        for some in rows.split(at_once):
            part = images.index_select(0, some)
            tone = matrices.index_select(1, some), of_mean.index_select(1, some)
            for slot in range(place):
                part = adjust_tone(part, tone[0][slot], tone[1][slot])
            part = adjust_hue_(part, draws.hue[some])
            if place:
                part.clamp_(0, 1)
            for slot in range(place + 1, 4):
                part = adjust_tone(part, tone[0][slot], tone[1][slot])
            images.index_copy_(0, some, part)
    return images


def normalize_(images: Tensor, config: ViewsConfig) -> Tensor:
    """Subtract the channel means from images (n, c, H, W), in place, and divide by the std."""
    assert images.shape[1] == len(config.mean), (
        f"images have {images.shape[1]} channels, and mean and std are of {len(config.mean)}"
    )
    mean, std = (filled(each, images)[:, None, None] for each in (config.mean, config.std))
    return images.sub_(mean).div_(std)


def apply(
    images: Tensor, draws: Draws, config: ViewsConfig, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the normalised views (n, c, size, size) of uint8 images (n, c, H, W).

    All arithmetic is in `dtype`, float32 or float64, even under autocast. The flip is part of the
    crop, because it commutes with the rest.
    """
    assert images.dtype == torch.uint8, f"images are uint8, got {images.dtype}"
    with torch.autocast(images.device.type, enabled=False):
        views = crop_and_resize(images.to(dtype).div_(255), draws, config.size)
        if config.grayscale_before_jitter and config.grayscale > 0:
            views = make_gray(views, draws.grayscale)
        if config.jitter > 0:
            views = color_jitter(views, draws)
        if not config.grayscale_before_jitter and config.grayscale > 0:
            views = make_gray(views, draws.grayscale)
        if config.blur > 0:

            def blurred(some: Tensor, rows: Tensor | slice) -> Tensor:
                return gaussian_blur(some, draws.sigma[rows], blur_taps(config))

            views = change_some(views, draws.blur, blurred)
        if config.solarize > 0:
            views = change_some(views, draws.solarize, lambda some, _: solarize(some))
        return normalize_(views, config)


def center(images: Tensor, config: ViewsConfig, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the evaluation view: the normalised centre (n, c, size, size) of uint8 images.

    Smaller images are first enlarged until the shorter side is `config.size`.
    """
    size = config.size
    pixels = images.to(dtype).div_(255)
    height, width = images.shape[2:]
    shorter = min(height, width)
    if shorter < size:
        height, width = size * height // shorter, size * width // shorter
        pixels = functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return normalize_(pixels[:, :, top : top + size, left : left + size], config)


def make(
    images: Tensor,
    config: ViewsConfig,
    seed: int,
    epoch: Key,
    index: Tensor,
    view: Key,
    dtype: torch.dtype = torch.float32,
    cut: bool = False,
) -> Tensor:
    """Return view number `view` of uint8 images (n, c, H, W): `apply` of `draw`.

    With `cut` the images are crops that are cut and resized, (n, c, size, size).
    """
    draws = draw(config, seed, epoch, index, view, *images.shape[2:])
    if cut:
        # The window is the whole crop, so that only the flip is left of that stage.
        zero, whole = torch.zeros_like(draws.top), torch.full_like(draws.top, config.size)
        draws = replace(draws, top=zero, left=zero, height=whole, width=whole)
    return apply(images, draws, config, dtype)
