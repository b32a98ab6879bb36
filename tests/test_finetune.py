"""Fine-tuning: a step is plain PyTorch's, and statistics stay; a random network can begin."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_dist.config.encoder import EncoderConfig
from moco_dist.method import views
from moco_dist.method.batch_norm import batch_norms
from moco_dist.method.encoder import build_encoder
from moco_dist.probe.finetune import calibrate
from tests.probes import prepared, pretrained

__all__ = ["pretrained"]


def test_steps_of_fine_tuning_are_those_of_plain_pytorch(pretrained: Path, tmp_path: Path) -> None:
    rates = ["optim.lr=0.1", "encoder_lr=0.01", "optim.weight_decay=0.001"]
    plain = ["protocol=finetune", "augment=false", "control=false", "optim.schedule=constant"]
    trial = prepared(pretrained, tmp_path, *rates, *plain)
    network = copy.deepcopy(trial.backbones["probe"])
    before = copy.deepcopy(network.state_dict())
    head = nn.Linear(32, 10).double()
    heads = {"weight": trial.heads.weight[0, 0, 0], "bias": trial.heads.bias[0, 0, 0]}
    head.load_state_dict(heads)
    groups = [
        {"params": list(network.parameters()), "lr": 0.01},
        {"params": list(head.parameters()), "lr": 0.1},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.001)
    for step in range(4):
        images = trial.parts["train"][trial.plans[0].step(step).samples]
        made = views.center(images.pixels, trial.config.views, torch.float64)
        optimizer.zero_grad()
        F.cross_entropy(head(network(made)), images.labels).backward()
        optimizer.step()
        trial.train_step()
    found = trial.backbones["probe"].state_dict()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10, msg=name)
        statistics = "running" in name or "batches" in name
        assert found[name].equal(before[name]) == statistics, name
    torch.testing.assert_close(trial.heads.weight[0, 0, 0], head.weight, rtol=0, atol=1e-10)


def test_a_calibrated_network_has_the_statistics_of_the_images() -> None:
    """They are the statistics of each layer's inputs when all layers before it normalise."""
    images = 3 + torch.randn(24, 3, 16, 16, dtype=torch.float64)
    config = EncoderConfig(width=4)
    network = build_encoder(config, seed=1).backbone.double().eval()
    alike = build_encoder(config, seed=1, rows_per_group=24).backbone.double().train()
    inputs: list[Tensor] = []
    for norm in batch_norms(alike):
        norm.register_forward_hook(lambda module, given, made: inputs.append(given[0]))
    alike(images)
    before = copy.deepcopy(dict(network.named_parameters()))
    calibrate(network, images)
    assert not any(module.training for module in network.modules())
    for name, parameter in network.named_parameters():
        assert parameter.equal(before[name]), name
    # A block calls its shortcut's layer after its own two; `modules` has the same order.
    layers = batch_norms(network)
    assert len(inputs) == len(layers) == 20
    for norm, given in zip(layers, inputs, strict=True):
        mean, variance = given.mean((0, 2, 3)), given.transpose(0, 1).flatten(1).var(1)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(norm.running_var, variance, rtol=1e-9, atol=1e-9)
