"""Convolutions for CPUs that are faster than the library's, or avoid a fault in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Single-precision channels in a CPU's widest register.
_REGISTER = 16
# From so many channels the weights outgrow a core's cache; up to so many pixels a map is small.
_MANY_CHANNELS, _FEW_PIXELS = 256, 16


def suit(model: nn.Module) -> None:
    """Replace convolutions of `model` by those below where they apply; names and weights stay."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.Conv2d and (kind := _kind(module)):
            sizes = module.in_channels, module.out_channels, module.kernel_size, module.stride
            # Initialising would draw random numbers and change all later weights.
            other = nn.utils.skip_init(kind, *sizes, module.padding, bias=False)
            other.weight = module.weight
            other.training = module.training
            model.set_submodule(path, other)


def _kind(conv: nn.Conv2d) -> type[nn.Conv2d] | None:
    plain = conv.dilation == (1, 1) and conv.bias is None and conv.padding_mode == "zeros"
    if conv.groups > 1 or not plain:
        return None
    channels, stride = (conv.in_channels, conv.out_channels), conv.stride
    pointwise = conv.kernel_size == (1, 1) and conv.padding == (0, 0)
    if pointwise and stride != (1, 1) and conv.in_channels < _REGISTER:
        return PointwiseShortcut
    keeps_size = (conv.kernel_size, stride, conv.padding) == ((3, 3), (1, 1), (1, 1))
    return SmallMapConv if keeps_size and min(channels) >= _MANY_CHANNELS else None


class PointwiseShortcut(nn.Conv2d):
    """A strided 1x1 convolution, computed without stride on the pixels that the stride selects.

    With fewer channels than a register holds, oneDNN's channels_last weight gradient writes beyond
    its memory (github.com/uxlfoundation/oneDNN/issues/6035, seen with PyTorch 2.15).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of `input` (rows, c, height, width)."""
        if input.device.type != "cpu":
            return super().forward(input)
        down, across = self.stride
        return functional.conv2d(input[:, :, ::down, ::across], self.weight)


class SmallMapConv(nn.Conv2d):
    """A 3x3 convolution of many channels: in training, on small maps, a sum of matrix products.

    It omits products with padding, 44 of 144 on a 4 x 4 map, where the library runs at half speed.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of `input` (rows, c, height, width)."""
        on_cpu = input.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if self.training and on_cpu and input.shape[2:].numel() <= _FEW_PIXELS:
            summed: Tensor = sum_of_products(input, self.weight)
            return summed
        return super().forward(input)


def _products(height: int, width: int) -> Iterator[tuple[int, int, Any, Any]]:
    """Yield row and column of each of the 3 x 3 weights, and the output and input pixels it links.

    Pixels are (row, columns). Pairs that reach into the padding are omitted.
    """
    for down in range(3):
        for across in range(3):
            left, right = max(0, 1 - across), min(width, width + 1 - across)
            for row in range(max(0, 1 - down), min(height, height + 1 - down)):
                columns = slice(left + across - 1, right + across - 1)
                if left < right:
                    yield down, across, (row, slice(left, right)), (row + down - 1, columns)


# A custom operator, because torch.compile would make it slower by taking it apart.
@torch.library.custom_op("moco_dist::sum_of_products", mutates_args=(), device_types="cpu")
def sum_of_products(x: Tensor, weight: Tensor) -> Tensor:
    """Return the padded convolution of `x` (rows, c, height, width) by `weight` (out, c, 3, 3)."""
    # With pixels first, (height, width, rows, c), a run of pixels is one matrix.
    pixels = x.permute(2, 3, 0, 1).contiguous()
    out = x.new_zeros(*pixels.shape[:3], len(weight))
    for down, across, here, there in _products(*pixels.shape[:2]):
        factor = weight[:, :, down, across].T
        out[here].flatten(0, 1).addmm_(pixels[there].flatten(0, 1), factor)
    return out.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("moco_dist::sum_of_products_backward", mutates_args=(), device_types="cpu")
def _gradients(of_out: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `x` and `weight`."""
    pixels = x.permute(2, 3, 0, 1).contiguous()
    of_out = of_out.permute(2, 3, 0, 1).contiguous()
    of_pixels, of_weight = torch.zeros_like(pixels), torch.zeros_like(weight)
    for down, across, here, there in _products(*pixels.shape[:2]):
        mine = of_out[here].flatten(0, 1)
        of_pixels[there].flatten(0, 1).addmm_(mine, weight[:, :, down, across])
        of_weight[:, :, down, across].addmm_(mine.T, pixels[there].flatten(0, 1))
    of_x = of_pixels.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)
    return of_x, of_weight


@sum_of_products.register_fake
def _shape(x: Tensor, weight: Tensor) -> Tensor:
    rows, _, height, width = x.shape
    like = x.new_empty(rows, len(weight), height, width)
    return like.contiguous(memory_format=torch.channels_last)


@_gradients.register_fake
def _shapes(of_out: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    of_x = torch.empty_like(x).contiguous(memory_format=torch.channels_last)
    return of_x, torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, of_out: Tensor) -> tuple[Tensor, Tensor]:
    of_x, of_weight = _gradients(of_out, *ctx.saved_tensors)
    return of_x, of_weight


sum_of_products.register_autograd(_backward, setup_context=_keep)
