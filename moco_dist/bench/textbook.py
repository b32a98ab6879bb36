"""A plain Momentum Contrast loop to measure against, as one would write it from the paper alone.

Views by PIL in a DataLoader, torchvision's ResNet in NCHW and fp32, ordinary BatchNorm, a gather of
all images to shuffle them, momentum parameter by parameter, logits concatenated with those of a
copy of the queue (He et al. 2020, algorithm 1 and section 3.3). Nothing in it is slowed on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from moco_dist.config.encoder import EncoderConfig
from moco_dist.config.recipe import PretrainConfig, ViewsConfig
from moco_dist.distributed import comms
from moco_dist.method import heads
from moco_dist.method.encoder import Backbone
from moco_dist.method.view_blur import blur_taps


class PilViews(Dataset[tuple[Tensor, Tensor]]):
    """Two random views of each image, made one by one; `pixels` are uint8 (n, 3, H, W)."""

    def __init__(self, pixels: Tensor, recipes: Sequence[ViewsConfig]) -> None:
        self.arrays = pixels.cpu().permute(0, 2, 3, 1).contiguous().numpy()
        self.transforms = [self._transform(each) for each in recipes]

    def _transform(self, c: ViewsConfig) -> transforms.Compose:
        jitter = transforms.ColorJitter(c.brightness, c.contrast, c.saturation, c.hue)
        steps = [
            transforms.RandomResizedCrop(
                c.size, (c.scale_min, c.scale_max), (c.ratio_min, c.ratio_max)
            ),
            transforms.RandomHorizontalFlip(c.flip),
            *([transforms.RandomApply([jitter], p=c.jitter)] if c.jitter else []),
            *([transforms.RandomGrayscale(c.grayscale)] if c.grayscale else []),
        ]
        if c.blur:
            sigmas = c.blur_sigma_min, c.blur_sigma_max
            blur = transforms.GaussianBlur(blur_taps(c), sigmas)
            steps.append(transforms.RandomApply([blur], p=c.blur))
        if c.solarize:
            steps.append(transforms.RandomSolarize(128, c.solarize))
        to_tensor = [transforms.ToTensor(), transforms.Normalize(c.mean, c.std)]
        return transforms.Compose([*steps, *to_tensor])

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = Image.fromarray(self.arrays[index])
        return self.transforms[0](image), self.transforms[-1](image)


def _encoder(config: EncoderConfig) -> nn.Sequential:
    backbone = Backbone(config, nn.BatchNorm2d)
    features = backbone.num_features
    return nn.Sequential(backbone, heads.projection(config, features, nn.BatchNorm1d))


class TextbookMoCo(nn.Module):
    """Both encoders and the queue in one module; its forward pass does all but the backward."""

    queue: Tensor
    pointer: Tensor

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__()
        self.config = config.moco
        self.query, self.key = _encoder(config.encoder), _encoder(config.encoder)
        self.key.load_state_dict(self.query.state_dict())
        self.key.requires_grad_(False)
        queue = torch.randn(config.encoder.dim, config.moco.queue_size)
        self.register_buffer("queue", F.normalize(queue, dim=0))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    @torch.no_grad()
    def _momentum(self) -> None:
        share = self.config.momentum
        for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
            key.data = key.data * share + query.data * (1 - share)

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """Return the keys of this process's images, encoded among those of others."""
        if comms.world_size() == 1:
            return F.normalize(self.key(images), dim=1)
        everything = comms.all_gather(images)
        # Drawn by the first process, as the others' numbers differ.
        order = comms.all_gather(torch.randperm(len(everything), device=images.device)[None])[0]
        mine = order.chunk(comms.world_size())[comms.rank()]
        keys = comms.all_gather(F.normalize(self.key(everything[mine]), dim=1))
        return keys[order.argsort().chunk(comms.world_size())[comms.rank()]]

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        keys = comms.all_gather(keys)
        size, start = self.queue.shape[1], int(self.pointer)
        places = torch.arange(start, start + len(keys), device=keys.device) % size
        self.queue[:, places] = keys.T
        self.pointer[0] = (start + len(keys)) % size

    def forward(self, for_query: Tensor, for_key: Tensor) -> Tensor:
        """Return the logits (rows, 1 + queue_size), positive first."""
        queries = F.normalize(self.query(for_query), dim=1)
        with torch.no_grad():
            self._momentum()
            keys = self._keys(for_key)
        positive = torch.einsum("nc,nc->n", queries, keys)[:, None]
        negative = torch.einsum("nc,ck->nk", queries, self.queue.clone().detach())
        logits = torch.cat([positive, negative], dim=1) / self.config.temperature
        self._enqueue(keys)
        return logits


class Textbook:
    """The plain loop on this process's share of the work that `config` gives."""

    def __init__(
        self, config: PretrainConfig, pixels: Tensor, device: torch.device, workers: int
    ) -> None:
        self.device = device
        model = TextbookMoCo(config).to(device)
        several = comms.world_size() > 1
        self.model: nn.Module = DistributedDataParallel(model) if several else model
        optim = config.optim
        self.optimizer = torch.optim.SGD(
            model.query.parameters(), optim.lr, optim.momentum, weight_decay=optim.weight_decay
        )
        loader = DataLoader(
            PilViews(pixels, config.view_recipes),
            batch_size=config.batch_size // comms.world_size(),
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
        )
        self.batches = _endless(loader)

    def views(self) -> tuple[Tensor, Tensor]:
        """Return the next batch of both views, on the device."""
        move = partial(Tensor.to, device=self.device, non_blocking=True)
        for_query, for_key = next(self.batches)
        return move(for_query), move(for_key)

    def step(self) -> float:
        """Do one step; return its loss."""
        self.model.train()
        logits = self.model(*self.views())
        target = torch.zeros(len(logits), dtype=torch.int64, device=self.device)
        loss = F.cross_entropy(logits, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def _endless(
    loader: DataLoader[tuple[Tensor, Tensor]],
) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader
