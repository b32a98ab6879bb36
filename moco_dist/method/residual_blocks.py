"""torchvision's residual blocks, whose BatchNorm takes in ReLU and shortcut where that is faster.

Names of their tensors are torchvision's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision.models import resnet

from moco_dist.method.batch_norm import GroupedBatchNorm


def fuses(norm: Any, x: Tensor) -> bool:
    """Return whether `norm` applies a ReLU to `x` itself."""
    return isinstance(norm, GroupedBatchNorm) and norm.fuses(x)


class BasicBlock(resnet.BasicBlock):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 5, left)."""

    bn1: Any
    bn2: Any

    def forward(self, x: Tensor) -> Tensor:
        """Return the block of `x` (rows, channels, height, width)."""
        if not fuses(self.bn1, x):
            return super().forward(x)
        out = self.conv2(self.bn1.rectified(self.conv1(x)))
        shortcut = x if self.downsample is None else self.downsample(x)
        summed: Tensor = self.bn2.rectified(out, shortcut)
        return summed


class Bottleneck(resnet.Bottleneck):
    """A 3x3 convolution between two of 1x1, and a shortcut (figure 5, right)."""

    bn1: Any
    bn2: Any
    bn3: Any

    def forward(self, x: Tensor) -> Tensor:
        """Return the block of `x` (rows, channels, height, width)."""
        if not fuses(self.bn1, x):
            return super().forward(x)
        out = self.conv2(self.bn1.rectified(self.conv1(x)))
        out = self.conv3(self.bn2.rectified(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        summed: Tensor = self.bn3.rectified(out, shortcut)
        return summed
