"""The place of each random number of a view; without torch, because data workers read it too."""

from __future__ import annotations

# Crops that are tried until one fits, as torchvision does.
CROP_ATTEMPTS = 10


class Slot:
    """The index of each random number of a view; for a range of numbers, of its first.

    Not an enumeration, because some versions of PyTorch can't compile an index from one.
    """

    SHARE = 0  # CROP_ATTEMPTS numbers: the crop's share of the image's area
    RATIO = SHARE + CROP_ATTEMPTS  # CROP_ATTEMPTS numbers: its width over its height
    ORDER = RATIO + CROP_ATTEMPTS  # four numbers, whose ranks order the operations of the jitter
    TOP, LEFT, FLIP, JITTER = range(ORDER + 4, ORDER + 8)
    BRIGHTNESS, CONTRAST, SATURATION, HUE = range(ORDER + 8, ORDER + 12)
    GRAYSCALE, BLUR, SIGMA, SOLARIZE = range(ORDER + 12, ORDER + 16)


# Numbers of a view.
SLOTS = Slot.SOLARIZE + 1
# Numbers of a crop: CROP_ATTEMPTS shares and ratios, and the place of the attempt that fits.
CROP_NUMBERS = 2 * CROP_ATTEMPTS + 2
