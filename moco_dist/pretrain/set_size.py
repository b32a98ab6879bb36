"""What to expect of few training images."""

from __future__ import annotations

from moco_dist.config.recipe import PretrainConfig
from moco_dist.errors import counted

# Sets below this number of images are few.
FEW = 1000


def few_images(config: PretrainConfig, images: int) -> str:
    """Return what to expect of a set of few images, empty for a larger one."""
    if images >= FEW:
        return ""
    steps = counted(max(1, images // config.batch_size), "step")
    return (
        f"{images} training images are few: with {steps} an epoch, give "
        "many epochs, and compare with the probe's random encoder; 500 images of CIFAR-10 took a "
        "narrow ResNet-18 from 23.7% to 37.0% in 1,400 steps, as 45,000 did (docs/own_data.md)"
    )
