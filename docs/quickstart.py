"""Momentum Contrast from its parts: Algorithm 1 of the paper, kNN and a linear probe.

Draws its own images, and needs under two minutes on a CPU: python docs/quickstart.py
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import moco_dist as md

STEPS, BATCH, TRAIN, TEST = 600, 128, 3000, 500

images, labels = md.draw_shapes(TRAIN + TEST, size=40, seed=0)
recipe = md.ViewsConfig(
    size=24, scale_min=0.25, scale_max=0.5, grayscale=0.5, mean=[0.5] * 3, std=[0.25] * 3
)
architecture = md.EncoderConfig(width=8, head="mlp", dim=64)
encoder = md.build_encoder(architecture, seed=0, rows_per_group=BATCH // 2, groups=2)
moco = md.MoCo(encoder, queue_size=256, dim=64)
sgd = torch.optim.SGD(encoder.parameters(), lr=0.08, momentum=0.9, weight_decay=5e-4)
warmup = torch.optim.lr_scheduler.LinearLR(sgd, start_factor=0.01, total_iters=100)
plan = md.Plan(num_samples=TRAIN, batch_size=BATCH, seed=0)


def aug(samples: Tensor, epoch: int, view: int) -> Tensor:
    """Return random view number `view` of some images, a function of its arguments alone."""
    return md.make_views(images[samples], recipe, 0, epoch, samples, view)


@torch.no_grad()
def measure() -> str:
    """Return the accuracies of kNN and a least-squares linear probe on frozen features."""
    md.average_statistics(encoder)
    encoder.eval()
    centers = [md.center_view(part, recipe) for part in images.split(250)]
    features = torch.cat([encoder.backbone(part) for part in centers])
    train, test = features.split([TRAIN, TEST])
    near = md.knn_predict(test, train, labels[:TRAIN], num_classes=10, k=20, temperature=0.1)
    mean = train.mean(0)
    linear = torch.linalg.lstsq(train - mean, one_hot(labels[:TRAIN]).float()).solution
    probed = ((test - mean) @ linear).argmax(1)
    hits = [(found == labels[TRAIN:]).float().mean() for found in (near, probed)]
    return f"kNN {hits[0]:.1%}, linear probe {hits[1]:.1%}"


print(f"before: {measure()}", flush=True)
for step in range(STEPS):
    rows = plan.step(step)  # for x in loader
    moco.train()
    shuffled = partial(aug, rows.samples[rows.key_rows[0]], rows.epoch, 1)
    k = md.shuffled_keys(moco.key_encoder, [shuffled], rows.unshuffle[0])  # k = f_k.forward(aug(x))
    q = moco.query_encoder(aug(rows.samples, rows.epoch, 0))  # q = f_q.forward(aug(x))
    loss, _ = md.info_nce(q, k, moco.queue.negatives()[0], temperature=0.2)
    sgd.zero_grad()
    loss.backward()
    sgd.step()  # update(f_q.params)
    warmup.step()
    moco.update_key_encoder(momentum=0.99)  # f_k.params = m * f_k.params + (1 - m) * f_q.params
    moco.queue.enqueue(k, rows.samples)  # enqueue(queue, k), dequeue(queue)
print(f"after {STEPS} steps: {measure()}, loss {float(loss.detach()):.2f}")
