"""MoCo on CIFAR-10 after the authors' CIFAR demo, without anything of this package but its images.

  OMP_NUM_THREADS=1 python -m tests.plain_moco DIR [epochs]

DIR holds CIFAR-10 as train/CLASS/*.jpg and test/CLASS/*.jpg. Views by PIL and torchvision, a
ResNet-18 of width 16 with split BatchNorm, fp32, batch 128, and the other settings of
configs/pretrain/cifar10.yaml. Prints loss, accuracy among the keys and, every fourth epoch, kNN on
the test images: what the package should reach with encoder.width=16 batch_size=128 epochs=8.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as T

from moco_dist.config.recipe import DataConfig
from moco_dist.data import datasets

WIDTH, BATCH, GROUPS, QUEUE, TEMPERATURE, MOMENTUM, RATE = 16, 128, 8, 4096, 0.1, 0.99, 0.06
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class Pairs(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Two views of each image."""

    def __init__(self, pixels: Tensor) -> None:
        self.images = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]
        jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        crop = T.RandomResizedCrop(32, scale=(0.08, 1.0))
        to_tensor = [T.ToTensor(), T.Normalize(MEAN, STD)]
        self.view = T.Compose(
            [crop, T.RandomHorizontalFlip(), jitter, T.RandomGrayscale(0.2), *to_tensor]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.view(self.images[index]), self.view(self.images[index])


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm over each eighth of the batch, with averaged running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        if not self.training:
            return super().forward(x)
        mean, var = self.running_mean.repeat(GROUPS), self.running_var.repeat(GROUPS)
        each = x.reshape(-1, x.shape[1] * GROUPS, *x.shape[2:])
        weight, bias = self.weight.repeat(GROUPS), self.bias.repeat(GROUPS)
        found = F.batch_norm(each, mean, var, weight, bias, True, 0.1, self.eps)
        self.running_mean.copy_(mean.view(GROUPS, -1).mean(0))
        self.running_var.copy_(var.view(GROUPS, -1).mean(0))
        return found.view_as(x)


class Block(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([SplitBatchNorm(after), SplitBatchNorm(after)])
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            narrow = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = nn.Sequential(narrow, SplitBatchNorm(after))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(inner)) + self.shortcut(x))


class Network(nn.Module):
    """ResNet-18 with a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, WIDTH, 3, 1, 1, bias=False),
            SplitBatchNorm(WIDTH),
            nn.ReLU(),
        ]
        before = WIDTH
        for stage in range(4):
            after = WIDTH << stage
            layers += [Block(before, after, 1 + (stage > 0)), Block(after, after, 1)]
            before = after
        self.body, self.head = nn.Sequential(*layers), nn.Linear(before, 128)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x).mean((2, 3))
        return found

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.head(self.features(x)), dim=1)


@torch.no_grad()
def knn(see: Callable[[Tensor], Tensor], splits: datasets.Splits) -> float:
    """Return the share of test images that their 200 nearest training images get right."""
    assert isinstance(splits.train, datasets.Images)
    assert isinstance(splits.test, datasets.Images)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    bank, points = (
        torch.cat([F.normalize(see((p.float() / 255 - mean) / std)) for p in pixels.split(500)])
        for pixels in (splits.train.pixels, splits.test.pixels)
    )
    right = 0
    for some, labels in zip(points.split(500), splits.test.labels.split(500), strict=True):
        near, places = (some @ bank.T).topk(200, dim=1)
        votes = torch.zeros(len(some), 10)
        votes.scatter_add_(1, splits.train.labels[places], (near / 0.1).exp())
        right += int((votes.argmax(1) == labels).sum())
    return right / len(points)


def main(root: str, epochs: int = 8) -> None:
    """Train, and print what is reached."""
    splits = datasets.load(DataConfig(name="folder", root=root), 3)
    assert isinstance(splits.train, datasets.Images)
    torch.manual_seed(0)
    query, key = Network(), Network()
    key.load_state_dict(query.state_dict())
    key.requires_grad_(False)
    optimizer = torch.optim.SGD(query.parameters(), RATE, momentum=0.9, weight_decay=5e-4)
    queue, place = F.normalize(torch.randn(128, QUEUE), dim=0), 0
    loader = torch.utils.data.DataLoader(
        Pairs(splits.train.pixels), BATCH, shuffle=True, num_workers=1, drop_last=True
    )
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        figures = torch.zeros(2)
        for first, second in loader:
            with torch.no_grad():
                for mine, other in zip(key.parameters(), query.parameters(), strict=True):
                    mine.lerp_(other, 1 - MOMENTUM)
                order, keys = torch.randperm(BATCH), torch.empty(BATCH, 128)
                keys[order] = key(second[order])
            queries = query(first)
            own = (queries * keys).sum(1, keepdim=True)
            logits = torch.cat([own, queries @ queue.clone()], dim=1) / TEMPERATURE
            loss = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.int64))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            queue[:, place : place + BATCH] = keys.T
            place = (place + BATCH) % QUEUE
            hits = (logits.argmax(1) == 0).float().mean()
            figures += torch.stack([loss.detach(), hits]) / len(loader)
        said = f"epoch {epoch + 1} loss {figures[0]:.3f} top1 {figures[1]:.3f}"
        if (epoch + 1) % 4 == 0:
            query.eval()
            backbone, head = knn(query.features, splits), knn(query, splits)
            said += f" kNN of the backbone {backbone:.3f}, of the head {head:.3f}"
            query.train()
        print(said, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
