"""What fits the number of training images: the length of the queue, and what to expect of few."""

from __future__ import annotations

import math

from moco_dist.config.recipe import PretrainConfig

# The queue that MoCo uses for the 1.28 million images of ImageNet.
LONGEST = 65_536
# Share of the images whose keys are in the queue. With a quarter, an image meets its own key of the
# epoch before in one step of 32: two places in orders of n images lie less than n / 4 apart with a
# probability of (1 / 4)^2 / 2. With as many keys as images it is one step of two.
SHARE = 0.25
# Sets below this number of images are few.
FEW = 1000


def fitting_queue(config: PretrainConfig, images: int) -> int:
    """Return the power of two nearest to a quarter of the images, if a step's keys fit into it.

    It is 2,048 for 10,000 images and 16,384 for 60,000, and never more than MoCo's 65,536.
    """
    keys = config.batch_size * len(config.moco.passes)
    return max(keys, min(LONGEST, 1 << round(math.log2(max(1, SHARE * images)))))


def few_images(config: PretrainConfig, images: int) -> str:
    """Return what to expect of a set of few images, empty for a larger one."""
    if images >= FEW:
        return ""
    steps = max(1, images // config.batch_size)
    return (
        f"{images} training images are few: with {steps} step{'s' * (steps > 1)} an epoch, give "
        "many epochs, and compare with the probe's random encoder; 500 images of CIFAR-10 took a "
        "narrow ResNet-18 from 23.7% to 37.0% in 1,400 steps, as 45,000 did (docs/own_data.md)"
    )
