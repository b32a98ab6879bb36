"""What CIFAR-10 files are worth to features that need no training: k-means of patches.

  OMP_NUM_THREADS=1 python -m tests.plain_features DIR [centroids]

DIR holds CIFAR-10 as train/CLASS/*.jpg and test/CLASS/*.jpg. Coates, Lee and Ng (2011), "k-means
(triangle)": whitened 6 x 6 patches at every position, 1,600 centroids, sums over the quarters of an
image, and a linear classifier with squared hinge loss. They report 77.9% on the original pixels,
so what is missing here is lost in the files, or is this script's. 50 minutes of one core, 6 GB.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

SIDE, PATCHES, ROUNDS, EPSILON = 6, 400_000, 30, 0.1


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """Return images, float (n, 3, 32, 32) from 0 to 255, and classes, int64 (n,)."""
    files = ImageFolder(str(folder))
    images = [pil_to_tensor(files[row][0]) for row in range(len(files))]
    return torch.stack(images).float(), torch.tensor(files.targets)


def equalised(patches: Tensor) -> Tensor:
    """Return patches (n, 108) without their mean and contrast."""
    patches = patches - patches.mean(1, keepdim=True)
    return patches / (patches.var(1, keepdim=True) + 10).sqrt()


class Features:
    """Whitening and centroids of patches, found on some images."""

    def __init__(self, images: Tensor, centroids: int) -> None:
        rows = torch.randint(len(images), (PATCHES,))
        places = torch.randint(32 - SIDE + 1, (PATCHES, 2)).tolist()
        cut = [
            images[row, :, top : top + SIDE, left : left + SIDE].reshape(-1)
            for row, (top, left) in zip(rows.tolist(), places, strict=True)
        ]
        patches = equalised(torch.stack(cut))
        self.mean = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((patches - self.mean).T))
        self.whiten = vectors @ torch.diag((values + EPSILON).rsqrt()) @ vectors.T
        patches = (patches - self.mean) @ self.whiten
        self.centres = patches[torch.randperm(PATCHES)[:centroids]]
        for _ in range(ROUNDS):
            sums, counts = torch.zeros_like(self.centres), torch.zeros(centroids, 1)
            for some in patches.split(20_000):
                nearest = (some @ self.centres.T - self.centres.square().sum(1) / 2).argmax(1)
                sums.index_add_(0, nearest, some)
                counts.index_add_(0, nearest, torch.ones(len(some), 1))
            self.centres = torch.where(counts > 0, sums / counts.clamp(min=1), self.centres)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of images, float (n, 4 x centroids)."""
        return torch.cat([self.of_few(some) for some in images.split(50)])

    def of_few(self, images: Tensor) -> Tensor:
        """Return those of a few images at once."""
        patches = F.unfold(images, SIDE).transpose(1, 2).reshape(-1, 3 * SIDE * SIDE)
        patches = (equalised(patches) - self.mean) @ self.whiten
        squares = patches.square().sum(1, keepdim=True) + self.centres.square().sum(1)
        distances = (squares - 2 * patches @ self.centres.T).clamp(min=0).sqrt()
        near = (distances.mean(1, keepdim=True) - distances).clamp(min=0)
        side = 32 - SIDE + 1
        grid, half = near.view(len(images), side, side, -1), (side + 1) // 2
        rows = grid[:, :half], grid[:, half:]
        quarters = [part for row in rows for part in (row[:, :, :half], row[:, :, half:])]
        return torch.cat([quarter.sum((1, 2)) for quarter in quarters], dim=1)


def classifier(features: Tensor, labels: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Return weights and biases of one classifier for each class against all others, by L-BFGS."""
    targets = 2 * F.one_hot(labels).float() - 1
    weights = torch.zeros(features.shape[1], targets.shape[1], requires_grad=True)
    biases = torch.zeros(targets.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights, biases], max_iter=150, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        short = (1 - targets * (features @ weights + biases)).clamp(min=0)
        found = short.square().sum() / len(features) + decay / 2 * weights.square().sum()
        found.backward()
        return found

    solver.step(loss)
    return weights.detach(), biases.detach()


def main(root: str, centroids: int = 1600) -> None:
    """Print the accuracies for some strengths of regularisation."""
    torch.manual_seed(0)
    (images, labels), (others, truth) = (read(Path(root, part)) for part in ("train", "test"))
    find = Features(images, centroids)
    features, test = find(images), find(others)
    mean, spread = features.mean(0), (features.var(0) + 0.01).sqrt()
    features.sub_(mean).div_(spread)
    test.sub_(mean).div_(spread)
    for decay in (1 / 10, 1 / 30, 1 / 100):
        weights, biases = classifier(features, labels, decay)
        right = [
            float(((x @ weights + biases).argmax(1) == y).float().mean())
            for x, y in ((features, labels), (test, truth))
        ]
        print(f"weight decay {decay:.4f}: train {right[0]:.4f}, test {right[1]:.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
