"""Pillow's own test images, hundreds of odd files: each is read, refused by name or counted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, ImageOps

DOCS = Path(__file__).parent.parent / "docs" / "data.md"
# Rules of docs/data.md.
FORMATS = {"JPEG", "MPO", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF"}
MAX_PIXELS = 160_000_000
# Suffixes that tell neither Pillow nor us that a file is an image, of formats without a mark.
NAMELESS = {".ara", ".im1", ".imt", ".p7"}

RUN = """
import json, logging, resource, sys
from pathlib import Path
from moco_dist.config.recipe import DataConfig
from moco_dist.data import datasets
said = []
logging.getLogger().addHandler(type("Kept", (logging.Handler,), {
    "emit": lambda self, record: said.append(record.getMessage())})())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loaded = datasets.load(DataConfig(
    name="folder", root=sys.argv[1], cache=sys.argv[2], size=32, validation=0.0, labels="none",
    skip_unreadable=True))
most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
train = loaded.train
json.dump({
    "read": [train.file(row) for row in range(len(train))],
    "refused": [train.catalogue.places([row])[0].path for row, _ in train.left_out],
    "said": said, "held": loaded.held,
    "gigabytes": most * 1024 / 1e9,
    "means": train.pixels.double().mean((1, 2, 3)).tolist(),
}, sys.stdout)
"""


def opened(path: Path) -> Image.Image | None:
    """Return the image as Pillow reads it, by whichever of its readers; None if it refuses it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as image:
                image.load()
                return image
        except Exception:
            return None


def verdict(path: Path) -> tuple[float, bool] | None:
    """Return the mean of the square on white, and whether some is transparent; None if refused."""
    image = opened(path)
    if image is None or image.format not in FORMATS or image.mode[0] in "IF":
        return None
    if image.width * image.height > MAX_PIXELS:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            rgba = image.convert("RGBA")
        except ValueError:  # a colour space that Pillow doesn't convert
            return None
    white = Image.new("RGBA", image.size, "white")
    composed = Image.alpha_composite(white, rgba).convert("RGB")
    square = ImageOps.fit(composed, (32, 32), Image.Resampling.BICUBIC)
    return float(np.asarray(square).mean()), bool((np.asarray(rgba)[..., 3] < 255).any())


@pytest.mark.slow
def test_pillows_own_images_are_read_refused_or_counted(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", "-q"]
    subprocess.run([*command, f"pillow=={PIL.__version__}", "-d", str(tmp_path)], check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        members = [m for m in tar if "/Tests/images/" in m.name and m.isfile()]
        tar.extractall(tmp_path / "sources", members, filter="data")
    (root,) = tmp_path.glob("sources/*/Tests/images")
    listed = re.search(r"files that end in ([\w, ]+) or (\w+)", DOCS.read_text())
    assert listed
    suffixes = tuple(f".{name}" for name in [*listed[1].split(", "), listed[2]])
    Image.init()

    run = [sys.executable, "-c", RUN, str(root), str(tmp_path / "cache")]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    found = json.loads(done.stdout)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    ours = [path for path in files if path.name.lower().endswith(suffixes)]
    assert len(found["read"]) + len(found["refused"]) == len(ours) > 700
    means = dict(zip(found["read"], found["means"], strict=True))
    clear = 0
    for path in ours:
        if expected := verdict(path):
            assert abs(means[str(path)] - expected[0]) < 1, path
            clear += expected[1]
        else:
            assert found["refused"].count(str(path)) == 1, path
    assert (
        f"; {len(found['refused'])} unreadable left out; {clear} transparent, on white"
        in (found["held"])
    )
    (unread,) = [said for said in found["said"] if "are not read (" in said]
    counted = dict(
        (suffix, int(count)) for count, suffix in re.findall(r"(\d+) (\.\w+|without)", unread)
    )
    others = Counter(path.suffix.lower() for path in set(files) - set(ours))
    assert all(others[suffix] == count for suffix, count in counted.items() if suffix[0] == ".")
    silent = {path.suffix for path in set(files) - set(ours) if opened(path)} - set(counted)
    assert silent == NAMELESS
    assert found["gigabytes"] < 4
