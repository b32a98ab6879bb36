"""What is made of a file: transparent pixels, 16 bits in colour, other formats, what is refused."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from moco_dist.config.recipe import DataConfig
from moco_dist.data import datasets, image_file
from moco_dist.data.datasets import Images
from moco_dist.data.image_file import Recipe
from moco_dist.doctor import images as doctor
from moco_dist.errors import ConfigError, DataError

SIDE = 16
SQUARE = Recipe(SIDE)
# Of a view that is the whole image: the share of the area, its ratio, and the place.
WHOLE = [1.0] * 10 + [1.0] * 10 + [0.0, 0.0]


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def drawing(mode: str) -> Image.Image:
    """Return a random drawing with an alpha of all values."""
    numbers = np.random.default_rng(7)
    bands = {"RGBA": 4, "LA": 2}[mode]
    pixels = numbers.integers(0, 256, (SIDE, SIDE, bands), dtype=np.uint8)
    pixels[..., -1] = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)
    return Image.fromarray(pixels, mode)


def composed(image: Image.Image, background: list[int]) -> NDArray[np.float64]:
    """Return the image on the background, in the arithmetic of Porter and Duff."""
    pixels = np.asarray(image.convert("RGBA"), dtype=np.float64)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + np.array(background) * (1 - alpha)


def palette() -> Image.Image:
    image = drawing("RGBA").convert("RGB").quantize(8)
    image.info["transparency"] = bytes([0, 40, 80, 120, 160, 200, 240, 255])
    return image


CLEAR = {
    "RGBA": lambda: encoded(drawing("RGBA"), "PNG"),
    "gray with alpha": lambda: encoded(drawing("LA"), "PNG"),
    "palette": lambda: encoded(palette(), "PNG"),
    "one colour": lambda: encoded(
        Image.new("RGB", (SIDE, SIDE), (9, 8, 7)), "PNG", transparency=(9, 8, 7)
    ),
    "GIF": lambda: encoded(drawing("RGBA").convert("P"), "GIF", transparency=0),
    "WebP": lambda: encoded(drawing("RGBA"), "WEBP", lossless=True, exact=True),
    "TIFF": lambda: encoded(drawing("RGBA"), "TIFF"),
}


@pytest.mark.parametrize("background", [[255, 255, 255], [10, 200, 30]])
@pytest.mark.parametrize("kind", CLEAR)
def test_transparent_pixels_lie_on_the_background(kind: str, background: list[int]) -> None:
    content = CLEAR[kind]()
    with Image.open(io.BytesIO(content)) as image:
        expected = composed(image, background)
    recipe = Recipe(SIDE, background=background)
    pixels, some = image_file.square(content, recipe)
    assert some
    assert np.abs(pixels - expected).max() <= 1
    (crop,) = image_file.crops(content, [WHOLE], recipe._replace(views=(0,)))
    assert np.array_equal(crop, pixels)
    gray, _ = image_file.square(content, recipe._replace(channels=1))
    luma = expected @ np.array([0.299, 0.587, 0.114])
    assert np.abs(gray[..., 0] - luma).max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_that_hides_nothing_changes_no_bit(mode: str) -> None:
    image = drawing(mode)
    image.putalpha(255)
    pixels, some = image_file.square(encoded(image, "PNG"), SQUARE)
    assert not some
    assert np.array_equal(pixels, np.asarray(image.convert("RGB")))


def save(root: Path, place: str, content: bytes) -> None:
    (root / place).parent.mkdir(parents=True, exist_ok=True)
    (root / place).write_bytes(content)


def config(root: Path, **values: object) -> DataConfig:
    cache = str(root.parent / "cache")
    where = {"name": "folder", "root": str(root), "size": SIDE, "cache": cache, "validation": 0.0}
    return DataConfig(**(where | values))  # type: ignore[arg-type]


def test_transparent_images_are_counted_and_cached_by_their_background(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for number in range(4):
        save(root, f"{number}.png", encoded(drawing("RGBA"), "PNG"))
    save(root, "4.png", encoded(drawing("RGBA").convert("RGB"), "PNG"))
    black = "data.background=[0, 0, 0]"
    for background, told in (([255, 255, 255], "white"), ([0, 0, 0], black)):
        for _ in ("decoded", "from the cache"):
            loaded = datasets.load(config(root, background=background))
            assert loaded.held.endswith(f"allows it; 4 transparent, on {told}")
        assert isinstance(loaded.train, Images)
        expected = composed(drawing("RGBA"), background).transpose(2, 0, 1)
        assert np.abs(loaded.train.pixels[0].numpy() - expected).max() <= 1
        streamed = datasets.load(config(root, background=background, memory_gb=0.0, workers=1))
        assert streamed.held.endswith(f"; what is transparent on {told}")
        assert streamed.train.squares(torch.arange(5)).equal(loaded.train.pixels)
    assert len(list((tmp_path / "cache").glob("[!l]*.safetensors"))) == 2
    with pytest.raises(ConfigError, match=r"data.background=\[0, 256, 0\] is no colour"):
        config(root, background=[0, 256, 0])


def test_images_that_become_one_colour_are_named_by_the_doctor(tmp_path: Path) -> None:
    root = tmp_path / "set"
    white = Image.new("RGBA", (SIDE, SIDE), (255, 255, 255, 255))
    white.putpixel((3, 3), (255, 255, 255, 0))
    save(root, "flat.png", encoded(white, "PNG"))
    save(root, "good.png", encoded(drawing("RGBA"), "PNG"))
    findings, _ = doctor.data(config(root), 3)
    assert findings[0].found.endswith("in 2 sampled files, 2 of them transparent")
    assert findings[0].warning == (
        f"1 of 2 sampled images have one colour: {root / 'flat.png'}; remove them, or give another "
        "data.background if they are transparent"
    )
    findings, _ = doctor.data(config(root, background=[0, 0, 0]), 3)
    assert findings[0].warning == ""


def png16(pixels: NDArray[np.uint16]) -> bytes:
    """Return a PNG of 16 bits in colour, made by hand: (height, width, 3) or with alpha."""
    height, width, bands = pixels.shape
    kind = {2: 4, 3: 2, 4: 6}[bands]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    made = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        checked = name + content
        made += struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))
    return made


def tiff(pixels: NDArray[np.generic], bands: int, bits: int, numbers: int) -> bytes:
    """Return a TIFF without compression, made by hand, of any numbers (1, 2, 3 by its norm)."""
    height, width = pixels.shape[:2]
    content = pixels.tobytes()
    tags = [
        *((256, width), (257, height), (258, bits), (259, 1), (262, 2 if bands > 2 else 1)),
        *((273, 0), (277, bands), (278, height), (279, len(content)), (339, numbers)),
    ]
    start = 8 + 2 + 12 * len(tags) + 4
    lists = b""
    entries = b""
    for tag, value in tags:
        repeated = tag in (258, 339) and bands > 2
        if tag == 273:
            value = start + 2 * bands * 2 if bands > 2 else start
        if repeated:
            place = start + len(lists)
            lists += struct.pack(f"<{bands}H", *[value] * bands)
            entries += struct.pack("<HHII", tag, 3, bands, place)
        else:
            entries += struct.pack("<HHII", tag, 4, 1, value)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + entries + b"\0\0\0\0" + lists + content


def sixteen(most: int, bands: int) -> NDArray[np.uint16]:
    numbers = np.random.default_rng(3)
    pixels = numbers.integers(0, most, (SIDE, SIDE, bands), dtype=np.uint16)
    if bands in (2, 4):
        pixels[..., -1] = 65535
    return pixels


@pytest.mark.parametrize(
    ("kind", "bands"), [("PNG", 3), ("PNG", 4), ("PNG", 2), ("TIFF", 3)], ids=str
)
def test_16_bits_in_colour_are_read_and_12_of_them_refused(kind: str, bands: int) -> None:
    def content(most: int) -> bytes:
        pixels = sixteen(most, bands)
        return png16(pixels) if kind == "PNG" else tiff(pixels, bands, 16, 1)

    pixels, _ = image_file.square(content(65536), SQUARE)
    expected = np.repeat(sixteen(65536, bands)[..., :1], 3, 2) if bands == 2 else None
    expected = sixteen(65536, bands)[..., :3] if expected is None else expected
    assert np.abs(pixels - expected / 257).max() <= 1
    for read in (
        lambda: image_file.square(content(4096), SQUARE),
        lambda: image_file.crops(content(4096), [WHOLE], SQUARE._replace(views=(0,))),
    ):
        with pytest.raises(ValueError, match="its 16-bit values lie below 4096, as from 12 bits"):
            read()
    black, _ = image_file.square(content(1), SQUARE)
    assert not black.any()


@pytest.mark.filterwarnings("ignore")  # Pillow's, which pytest would turn into errors
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            tiff(np.zeros((8, 8, 3), np.float32), 3, 32, 3),
            "its content is a TIFF with 3 channels of floating-point numbers of 32 bits; save 1",
        ),
        (
            tiff(np.zeros((8, 8, 5), np.uint8), 5, 8, 1),
            "its content is a TIFF with 5 channels of numbers of 8 bits; save 1 or 3 channels of",
        ),
        (b"II*\0\x08\0\0\0", "its content is a damaged TIFF"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "its content is HEIC, which is not read; save it as"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "its content is JPEG 2000, which is not read; save it as"),
        (b"GIF89a", "its content is a damaged GIF, or of a kind that is not read"),
        (b"<html>", "its content is none of JPEG, PNG"),
    ],
    ids=["floats", "five channels", "cut TIFF", "HEIC", "JPEG 2000", "cut GIF", "text"],
)
def test_what_is_not_read_is_called_by_its_name(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    save(tmp_path / "set", "0.tif", content)
    with pytest.raises(DataError) as error:
        datasets.load(config(tmp_path / "set"))
    path = tmp_path / "set" / "0.tif"
    assert str(error.value).startswith(f"{path}: not a readable image ({sentence}")


def test_the_first_frame_of_a_moving_image_is_read() -> None:
    frames = [Image.new("RGB", (SIDE, SIDE), (shade, 0, 0)) for shade in (200, 90, 10)]
    for kind in ("GIF", "WEBP", "PNG", "AVIF", "TIFF"):
        settings = {"save_all": True, "append_images": frames[1:]}
        if kind == "WEBP":
            settings["lossless"] = True
        pixels, _ = image_file.square(encoded(frames[0], kind, **settings), SQUARE)
        assert np.abs(pixels[..., 0].astype(int) - 200).max() <= 3, kind


# It runs apart, because pytest has warnings of its own.
READ = """
import sys
from pathlib import Path
from moco_dist.data import image_file
bad = 0
for path in Path(sys.argv[1]).iterdir():
    try:
        image_file.square(path.read_bytes(), image_file.Recipe(16))
    except Exception:
        bad += 1
print(bad)
"""


def test_libraries_print_no_line_without_the_name_of_a_file(tmp_path: Path) -> None:
    whole = encoded(drawing("RGBA").convert("RGB"), "TIFF", compression="tiff_deflate")
    for place in range(8, len(whole), 7):
        bad = whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]
        save(tmp_path / "set", f"{place}.tif", bad)
    command = [sys.executable, "-c", READ, str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 10
    assert done.stderr == ""
    # What they print otherwise.
    plain = READ.replace("from moco_dist.data import image_file", "from PIL import Image")
    ours = "image_file.square(path.read_bytes(), image_file.Recipe(16))"
    plain = plain.replace(ours, "Image.open(path).convert('RGB')")
    command = [sys.executable, "-c", plain, str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(done.stderr.splitlines()) > 10
