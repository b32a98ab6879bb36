"""One image file or tar member: its bytes, square and crops, without torch for small workers."""

from __future__ import annotations

import ctypes
import errno
import io
import logging
import math
import os
import re
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError, _imaging

from moco_dist.errors import counted
from moco_dist.method.slots import CROP_ATTEMPTS

Pixels = NDArray[np.uint8]

# Suffixes of the files that are read as images, in any case.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".gif", ".webp", ".avif"),
    *(".avifs", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# Suffixes of files that are images as well, and are not read: of photographs, drawings, and others.
_UNREAD = """
    heic heif hif jp2 j2k j2c jpc jpf jpx jxl jxr exr hdr dcm fits fit svs ndpi czi qoi flif bpg
    cr2 cr3 nef arw dng orf rw2 raf pef srw pcd
    svg psd psb xcf ico icns cur eps ps wmf emf xbm xpm dib
    tga icb vda vst dds blp ftc ftu pcx dcx sgi bw rgb rgba ras sun pfm pam im msp pxr palm gbr fli
    flc spider
"""
UNREAD = tuple(f".{name}" for name in _UNREAD.split())
# How the contents of images begin, and their names. Some start with the length of their first part.
KINDS = (
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG\r\n\x1a\n"),
    ("GIF", rb"GIF8[79]a"),
    ("TIFF", rb"II[*+]\0|MM\0[*+]"),
    ("WebP", rb"RIFF....WEBP"),
    ("BMP", rb"BM....\0\0\0\0"),
    ("AVIF", rb"....ftypavi[fs]"),
    ("HEIC", rb"....ftyp(hei|hev|mif|msf)"),
    ("JPEG 2000", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    ("JPEG XL", rb"\0\0\0\x0cJXL "),
    ("Photoshop", rb"8BPS"),
    ("OpenEXR", rb"\x76\x2f\x31\x01"),
    ("DDS", rb"DDS "),
    ("QOI", rb"qoif"),
    ("PostScript", rb"%!PS"),
)

# Accepted contents, whatever the name: for an EPS, PIL would call Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF")

# PIL's mode for a number of channels.
MODES = {1: "L", 3: "RGB"}

# Pillow's and libtiff's lines about odd files name no file; what can't be read is named here.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
with suppress(OSError, AttributeError):  # where libtiff is linked in, its lines stay
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)

# The colour behind transparent pixels.
WHITE = (255, 255, 255)

# Above the 151 million of the largest cameras; an image needs 3 or 4 bytes a pixel, twice.
MAX_PIXELS = 160_000_000
# PIL's default would warn from half of that on, without the path.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

# Images from this size on are decoded one at a time, to limit the threads' memory.
LARGE_PIXELS = 2**26
_one_large = threading.Lock()

# Errors of a network file system while one of its servers is replaced.
PASSING = (errno.EIO, errno.ESTALE)
ATTEMPTS = 3
PAUSE_SECONDS = 1.0

# A JPEG is decoded at 1/2, 1/4 or 1/8 scale if every crop keeps so many times the view's side.
SPARE = 2


class Place(NamedTuple):
    """The location of an image: a file, or `size` bytes from `offset` in one."""

    path: str
    name: str = ""
    offset: int = 0
    size: int = -1  # the whole file
    # Put before these bytes, in Latin-1: what makes a file of bare pixels.
    head: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.name}" if self.name else self.path


class Box(NamedTuple):
    """A window of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Recipe(NamedTuple):
    """What to cut out of each image of a request."""

    # Side in pixels.
    size: int
    # Numbers of the views; without any, the centred square.
    views: Sequence[int] = ()
    # Ratio of a crop's width to its height.
    ratio_min: float = 1.0
    ratio_max: float = 1.0
    channels: int = 3
    # RGB, composed with what is transparent.
    background: Sequence[int] = WHITE
    # The filter with which the centred square is resized.
    resize: str = "bicubic"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Views, channels, height and width of what is cut out of each image."""
        return max(1, len(self.views)), self.channels, self.size, self.size


def kind(head: bytes) -> str:
    """Return the name of the format of an image by its first 16 bytes, empty for anything else."""
    found = (name for name, start in KINDS if re.match(start, head, re.DOTALL))
    return next(found, "")


def read(place: Place) -> bytes:
    """Return the bytes of an image, after a pause if the file system recovers; OSError if not."""
    for attempt in range(1, ATTEMPTS):
        try:
            return _read(place)
        except OSError as error:
            if error.errno not in PASSING:
                raise
            time.sleep(PAUSE_SECONDS * attempt)
    return _read(place)


def _read(place: Place) -> bytes:
    with open(place.path, "rb") as file:
        size = os.fstat(file.fileno()).st_size if place.size < 0 else place.size
        file.seek(place.offset)
        content = file.read(size)
    if len(content) < size:
        raise ValueError(f"it ends {size - len(content):,} bytes too early")
    return place.head.encode("latin-1") + content


def opened(content: bytes) -> ImageFile.ImageFile:
    """Return an image with only its header read; ValueError if it is too large or not 8-bit."""
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        if image.mode[0] in "IF":  # PIL would clip them at 255, which is all white
            raise ValueError(
                f"its pixels have more than 8 bits (mode {image.mode}); scale them to 0 to 255"
            )
    except UnidentifiedImageError:
        raise ValueError(_refused(content)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"too large, {MAX_PIXELS:,} pixels are allowed; scale it down: {error}"
        ) from error
    return image


def _refused(content: bytes) -> str:
    """Return why a content is not read."""
    name = kind(content[:16])
    if not name:
        return f"its content is none of {', '.join(FORMATS)}"
    if name.upper() not in FORMATS:
        return f"its content is {name}, which is not read; save it as PNG or JPEG"
    if name != "TIFF":
        return f"its content is a damaged {name}, or of a kind that is not read"
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(content[:8])
        file = io.BytesIO(content)
        file.seek(tags.next)
        tags.load(file)
        if not tags[256] * tags[257]:  # width and height, without which it is no image
            return "its content is a damaged TIFF"
        bits, kinds = tags.get(258, (1,)), tags.get(339, (1,))
        numbers = {2: "signed numbers", 3: "floating-point numbers"}.get(kinds[0], "numbers")
        found = f"{counted(tags.get(277, 1), 'channel')} of {numbers} of {bits[0]} bits"
    except Exception:  # any kind for a damaged directory
        return "its content is a damaged TIFF"
    return f"its content is a TIFF with {found}; save 1 or 3 channels of 8 bits, from 0 to 255"


def _turn(image: Image.Image) -> Any:
    return _one_large if image.width * image.height >= LARGE_PIXELS else nullcontext()


def _load(image: ImageFile.ImageFile) -> None:
    """Decode an image; ValueError if it has 16 bits in colour of which only 12 are used."""
    # PIL keeps the upper 8 of 16 bits in colour.
    halved = any(re.search(r";16[BLN]", str(tile.args)) for tile in image.tile)
    image.load()
    if halved:
        colours = image.getbands()[: 1 if image.mode == "LA" else 3]
        if 0 < max(np.asarray(image.getchannel(band)).max() for band in colours) < 16:
            raise ValueError(
                "its 16-bit values lie below 4096, as from 12 bits, which is nearly black; scale "
                "them to 0 to 65535, or to 8 bits"
            )


def flat(image: Image.Image, recipe: Recipe) -> tuple[Image.Image, bool]:
    """Return an image in gray or RGB, on the background, and whether some of it is transparent."""
    mode = MODES[recipe.channels]
    if not image.has_transparency_data:
        return image.convert(mode), False
    if "A" not in image.getbands():
        image = image.convert("RGBA")
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] == 255:
        return image.convert(mode), False
    behind = Image.new("RGB", image.size, tuple(recipe.background))
    behind.paste(image.convert("RGB"), mask=alpha)
    return behind.convert(mode), True


def square(content: bytes, recipe: Recipe) -> tuple[Pixels, bool]:
    """Return the image (size, size, channels) and whether some of it is transparent.

    The shorter side is resized to `recipe.size`, and the centre is cut out.
    """
    size = recipe.size
    with opened(content) as image, _turn(image):
        _load(image)
        converted, transparent = flat(image, recipe)
        if converted.size != (size, size):
            resampling = Image.Resampling[recipe.resize.upper()]
            converted = ImageOps.fit(converted, (size, size), resampling)
        return np.asarray(converted).reshape(size, size, recipe.channels), transparent


def box(numbers: Sequence[float], height: int, width: int, recipe: Recipe) -> Box:
    """Return exactly the crop that `views.draw` gives to an image of this size.

    `numbers` are a row of `views.crop_numbers`. The operations left are correctly rounded by IEEE
    754 (product, quotient, root), so that every library has the same result.
    """
    ratios, place = numbers[CROP_ATTEMPTS:-2], numbers[-2:]
    for share, ratio in zip(numbers[:CROP_ATTEMPTS], ratios, strict=True):
        area = height * width * share
        tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            top, left = place
            return Box(int(top * (height - tall + 1)), int(left * (width - wide + 1)), tall, wide)
    tall = min(height, round(width / recipe.ratio_min))
    wide = min(width, round(height * recipe.ratio_max))
    return Box((height - tall) // 2, (width - wide) // 2, tall, wide)


def crops(content: bytes, numbers: Sequence[Sequence[float]], recipe: Recipe) -> list[Pixels]:
    """Return the crops of `recipe.views`, (size, size, channels) each, decoding the image once.

    `numbers` has a row for each view, wanted or not: together they determine the scale at which a
    JPEG is decoded, so that a crop doesn't depend on the views wanted with it. The resize is
    antialiased bilinear on the window only, as in `views.crop_and_resize`, rounded to 8 bits.
    """
    with opened(content) as image, _turn(image):
        size, full_width, full_height = recipe.size, image.width, image.height
        boxes = [box(row, full_height, full_width, recipe) for row in numbers]
        smallest = min(min(each.height, each.width) for each in boxes)
        if image.format == "JPEG" and smallest >= 2 * SPARE * size:
            factor = next(f for f in (8, 4, 2) if smallest >= f * SPARE * size)
            # PIL chooses the smallest scale that is not below this size.
            image.draft(None, (full_width // factor, full_height // factor))
        _load(image)
        cut = (_cut(image, boxes[v], full_height, full_width, recipe) for v in recipe.views)
        return [np.asarray(each).reshape(size, size, recipe.channels) for each in cut]


def _cut(
    image: Image.Image, box: Box, full_height: int, full_width: int, recipe: Recipe
) -> Image.Image:
    top, left, bottom, right = box.top, box.left, box.top + box.height, box.left + box.width
    if image.size != (full_width, full_height):
        across, down = image.width / full_width, image.height / full_height
        # Rounding is harmless, because the window has at least twice the view's pixels a side.
        top, bottom = round(top * down), max(round(bottom * down), round(top * down) + 1)
        left, right = round(left * across), max(round(right * across), round(left * across) + 1)
    window, _ = flat(image.crop((left, top, right, bottom)), recipe)
    return window.resize((recipe.size, recipe.size), Image.Resampling.BILINEAR)
