"""Small folders and tars of real image files for tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Return a smooth picture with some noise, another for each seed."""
    numbers = np.random.default_rng(seed)
    coarse = numbers.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = numbers.integers(-8, 9, (height, width, 1))
    return Image.fromarray((np.asarray(smooth).astype(int) + noise).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **settings: object) -> bytes:
    """Return the bytes of a JPEG file."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **settings)
    return buffer.getvalue()


def write_folder(root: Path, images: int, side: int = 0) -> Path:
    """Write DIR/train/CLASS and DIR/test/CLASS with JPEGs; `side` 0 gives each its own size."""
    for number in range(images):
        for part, seed in (("train", number), ("test", 10_000 + number)):
            if part == "test" and number % 4:
                continue
            path = root / part / f"class_{number % 3}" / f"{number:04d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            width, height = (side, side) if side else (40 + number % 13 * 9, 36 + number % 7 * 11)
            path.write_bytes(jpeg(picture(seed, width, height)))
    return root


def write_shards(folder: Path, root: Path, labels: str = "cls") -> Path:
    """Write the files of `write_folder` as tars of ten samples, in the same order."""
    for part in ("train", "test"):
        write_tars(folder / part, root / part, 10, labels)
    return root


def write_tars(folder: Path, root: Path, each: int, labels: str = "cls") -> None:
    """Write the images of FOLDER/CLASS/* as tars of `each` samples in WebDataset's layout."""
    root.mkdir(parents=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = sorted({file.parent.name for file in files})
    for first in range(0, len(files), each):
        with tarfile.open(root / f"{first // each:06d}.tar", "w") as tar:
            for file in files[first : first + each]:
                key, label = f"{file.parent.name}_{file.stem}", names.index(file.parent.name)
                other = f"{label}\n" if labels == "cls" else json.dumps({"label": label})
                add(tar, f"{key}{file.suffix}", file.read_bytes())
                add(tar, f"{key}.{labels}", other.encode())


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member to a tar."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
