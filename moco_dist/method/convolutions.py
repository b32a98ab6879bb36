"""Convolutions that a CPU does faster, or without a fault, in another way than the library's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# Channels of the widest registers of a CPU, in single precision.
_REGISTER = 16
# Channels from which the weights don't fit a core's cache, and pixels of a map that is small.
_MANY_CHANNELS, _FEW_PIXELS = 256, 16


def suit(model: nn.Module) -> None:
    """Have the convolutions of `model` that have another way here go that way, with their weights.

    Only a CPU goes it. Names and weights stay as they are.
    """
    for path, module in list(model.named_modules()):
        if type(module) is nn.Conv2d and (kind := _kind(module)):
            sizes = module.in_channels, module.out_channels, module.kernel_size, module.stride
            # Not initialised: the weights drawn after it would be others.
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
    """A 1x1 convolution with a stride, of the pixels that the stride leaves.

    The same sums; but oneDNN's own way, in channels_last, writes beyond its memory for the gradient
    of the weights if there are fewer channels than a register holds
    (github.com/uxlfoundation/oneDNN/issues/6035, seen with PyTorch 2.15).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of `input` (rows, c, height, width)."""
        if input.device.type != "cpu":
            return super().forward(input)
        down, across = self.stride
        return functional.conv2d(input[:, :, ::down, ::across], self.weight)


class SmallMapConv(nn.Conv2d):
    """A 3x3 convolution of many channels, in training on small maps a sum of matrix products.

    Of the 144 products that a map of 4 x 4 pixels takes, 44 are with its padding: they are left
    out, and the library's own way has half the speed there that it has on larger maps.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of `input` (rows, c, height, width)."""
        on_cpu = input.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if self.training and on_cpu and input.shape[2:].numel() <= _FEW_PIXELS:
            summed: Tensor = sum_of_products(input, self.weight)
            return summed
        return super().forward(input)


def _products(height: int, width: int) -> Iterator[tuple[int, int, Any, Any]]:
    """Yield, of the 3 x 3 weights, row and column, and the pixels between which they stand.

    Those of the output, (row, columns), and of the input: what reaches into the padding is not
    among them.
    """
    for down in range(3):
        for across in range(3):
            left, right = max(0, 1 - across), min(width, width + 1 - across)
            for row in range(max(0, 1 - down), min(height, height + 1 - down)):
                columns = slice(left + across - 1, right + across - 1)
                if left < right:
                    yield down, across, (row, slice(left, right)), (row + down - 1, columns)


# An operator of its own, which torch.compile leaves as it is: in pieces it would be slower.
@torch.library.custom_op("moco_dist::sum_of_products", mutates_args=(), device_types="cpu")
def sum_of_products(x: Tensor, weight: Tensor) -> Tensor:
    """Return the convolution of `x` (rows, c, height, width) with `weight` (out, c, 3, 3), padded.

    With the pixels in front, (height, width, rows, c), a run of pixels is one matrix.
    """
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
