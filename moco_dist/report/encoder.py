"""A sample of images as an encoder sees it: maps of features, neighbours, and pairs of views."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from moco_dist.config.recipe import DataConfig, ViewsConfig
from moco_dist.config.yaml_files import from_dict
from moco_dist.data import datasets, file_sets, image_folder, torchvision_sets
from moco_dist.data.datasets import Images
from moco_dist.data.image_file import Recipe
from moco_dist.data.image_index import ImageIndex
from moco_dist.encoders import features, load
from moco_dist.errors import MissingError, shown
from moco_dist.method import views
from moco_dist.randomness import Purpose, permutation
from moco_dist.report.pictures import Tile
from moco_dist.tracking import fonts
from moco_dist.tracking.media import colours

# Images in the sample, images on the t-SNE map, images in a batch, and most seconds that extracting
# the features may take.
SAMPLE, NEIGHBOUR_EMBEDDING, BATCH, SECONDS = 2000, 1000, 100, 60.0
# Images whose neighbours are shown, neighbours of each, and images of which two views are shown.
QUERIES, NEIGHBOURS, PAIRS = 8, 5, 8
# Most images that a report decodes to draw its sample from.
MOST_READ = 200_000


@dataclass(frozen=True)
class Look:
    """What a report draws of an encoder and `images` images of a part of the data.

    Labels are -1 without a class; components are (images, 2). `embedding` is the t-SNE map of the
    first images, None without scikit-learn.
    """

    step: int
    part: str
    images: int
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    components: NDArray[np.float64]
    variance: tuple[float, float]
    embedding: NDArray[np.float64] | None
    neighbours: list[list[Tile]]
    pairs: list[list[Tile]]


def look(path: Path, data: DataConfig | None = None) -> Look:
    """Return what a report draws of an encoder, on held-out images of `data` or of its run's data.

    Raises UserError if the encoder or the data can't be read.
    """
    found = load.find(path)
    settings = found.checkpoint.piece("config")
    if data is None and "data" not in settings:
        raise MissingError(f"{found.place}: doesn't say which images it was trained on; give a run")
    config = data or from_dict(DataConfig, settings["data"])
    view = replace(found.fed, size=min(found.fed.size, config.size))
    recipes = [view]
    if second := settings.get("views_2"):
        recipes.append(replace(from_dict(ViewsConfig, second), size=view.size))
    part, images = held_out(config, found.architecture.channels)
    points = extract(found.backbone, images, view)
    images = images[torch.arange(len(points))]
    components, variance = principal(points)
    return Look(
        found.checkpoint.step,
        part,
        len(images),
        images.labels.numpy(),
        images.classes,
        components,
        variance,
        embedding(points[:NEIGHBOUR_EMBEDDING]),
        neighbours(points, images),
        pairs(images, recipes),
    )


def held_out(config: DataConfig, channels: int = 3) -> tuple[str, Images]:
    """Return the name of a part of the data and at most SAMPLE of its images.

    The part is the test set if there is one, else the validation images, else the training images.
    """
    root, downloaded = Path(config.root).expanduser(), config.name in torchvision_sets.FOLDERS
    if downloaded and not torchvision_sets.place(config.name, root).is_dir():
        raise MissingError(
            f"data.root={shown(root)}: {config.name} is not there, and a report downloads nothing; "
            "make the report in the folder where the run was launched"
        )
    if config.name in datasets.ON_DISK:
        found = file_sets.find(config, file_sets.root(config), file_sets.cache(config))
        if found.test:
            return "test", _some(found.test, config, channels)
        if len(found.train) > MOST_READ:
            raise MissingError(
                f"data.root={shown(root)}: {len(found.train):,} images without a test set are more "
                f"than the {MOST_READ:,} that a report reads"
            )
    splits = datasets.load(config, channels)
    parts = {"test": splits.test, "validation": splits.validation, "training": splits.train}
    part, images = next((name, images) for name, images in parts.items() if len(images))
    rows = _sample(len(images), config)
    return part, Images(images.squares(rows), images.labels[rows], images.classes)


def _some(test: ImageIndex, config: DataConfig, channels: int) -> Images:
    """Return a sample of the test images, without decoding the others."""
    known = (test.labels >= 0).nonzero().flatten()
    rows = known[_sample(len(known), config)]
    some = test.some(rows.tolist())
    recipe = Recipe(
        config.size, channels=channels, background=config.background, resize=config.resize
    )
    return Images(image_folder.decode(some, recipe), some.labels, some.classes)


def _sample(size: int, config: DataConfig) -> Tensor:
    return permutation(size, config.split_seed, Purpose.SPLIT)[:SAMPLE]


def extract(backbone: nn.Module, images: Images, view: ViewsConfig) -> Tensor:
    """Return unit-length features (n, features) of as many images as SECONDS allow."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone, parts, began = backbone.to(device), [], time.monotonic()
    for rows in torch.arange(len(images)).split(BATCH):
        parts.append(features.extract(backbone, images[rows].to(device), view, BATCH).cpu())
        if time.monotonic() - began > SECONDS:
            break
    return F.normalize(torch.cat(parts).double().nan_to_num(), dim=1)


def principal(points: Tensor) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """Return the first two principal components (n, 2) and their shares of the variance."""
    centred = points - points.mean(0)
    if min(centred.shape) < 2:
        return np.zeros((len(points), 2)), (0.0, 0.0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors[:, [-1, -2]]
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    shares = (values[[-1, -2]].clamp(min=0) / values.sum().clamp(min=1e-30)).tolist()
    return (centred @ (axes * largest.sign())).numpy(), (shares[0], shares[1])


def embedding(points: Tensor) -> NDArray[np.float64] | None:
    """Return a map (n, 2) by t-SNE (van der Maaten and Hinton 2008); None without scikit-learn."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        return None
    if len(points) < 10:
        return None
    perplexity = min(30.0, (len(points) - 1) / 3)
    noise = torch.empty_like(points).normal_(generator=torch.Generator().manual_seed(0))
    spread = points + 1e-6 * noise  # identical images have no principal axes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted: Any = TSNE(2, perplexity=perplexity, init="pca", random_state=0)
        found: NDArray[np.float64] = fitted.fit_transform(spread.numpy()).astype(np.float64)
    return found


def neighbours(points: Tensor, images: Images) -> list[list[Tile]]:
    """Return rows of an image followed by its nearest other images."""
    if len(images) < 2:
        return []
    similarity = points @ points.T
    rows = []
    for query in _queries(images.labels):
        near = features.nearest(points[query, None], points, NEIGHBOURS + 1)[0].tolist()
        others = [other for other in near if other != query][:NEIGHBOURS]
        row = [Tile(_pixels(images.pixels[query]), _name(images, query))]
        for other in others:
            known = images.labels[query] >= 0 and images.labels[other] >= 0
            right = bool(images.labels[query] == images.labels[other]) if known else None
            text = f"{_name(images, other)} {similarity[query, other]:.2f}".strip()
            row.append(Tile(_pixels(images.pixels[other]), text, right))
        rows.append(row)
    return rows


def _queries(labels: Tensor) -> list[int]:
    """Return at most QUERIES rows: the first of each class, then the first of the others."""
    first: dict[int, int] = {}
    for row, label in enumerate(labels.tolist()):
        first.setdefault(label, row)
    chosen = [first[label] for label in sorted(first)]
    return [*chosen, *(row for row in range(len(labels)) if row not in chosen)][:QUERIES]


def pairs(images: Images, recipes: Sequence[ViewsConfig]) -> list[list[Tile]]:
    """Return two rows of tiles, the two views of some images with the run's settings."""
    rows = torch.arange(min(PAIRS, len(images)))
    both = (
        views.make(images.pixels[rows], views.recipe(recipes, view), 0, 0, rows, view)
        for view in (0, 1)
    )
    return [[Tile(_pixels(each)) for each in colours(made, recipes[0])] for made in both]


def _pixels(image: Tensor) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = image.expand(3, -1, -1).permute(1, 2, 0).numpy()
    return pixels


def _name(images: Images, row: int) -> str:
    label = int(images.labels[row])
    name = fonts.drawable(images.classes)[0][label].text if 0 <= label < len(images.classes) else ""
    return name if len(name) <= 8 else f"{name[:7]}."
