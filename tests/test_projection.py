"""Heads and predictor: those of the papers, in groups as the backbone, and where they belong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moco_dist.config.encoder import EncoderConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load, to_dict
from moco_dist.encoders.load import find, load_encoder
from moco_dist.errors import ConfigError
from moco_dist.method import batch_norm
from moco_dist.method.batch_norm import batch_norms
from moco_dist.method.encoder import Encoder, build_backbone, build_encoder
from moco_dist.method.moco import MoCo
from moco_dist.runs import checkpoint, saving
from tests.test_one_run_any_machine import assert_same, distance, one

V3 = EncoderConfig(width=4, head="mlp_bn", head_width=48, predictor=True, dim=16)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_heads_of_moco_v1_and_v2_have_their_names_and_first_weights(head: Any) -> None:
    encoder = build_encoder(EncoderConfig(width=4, head=head, dim=7), seed=3)
    torch.manual_seed(3)
    build_backbone(encoder.config, nn.BatchNorm2d)
    last = nn.Linear(32, 7)  # which has always drawn first
    layers = [nn.Linear(32, 32), nn.ReLU(), last] if head == "mlp" else [last]
    expected = nn.Sequential(*layers).state_dict()
    found = {k: v for k, v in encoder.state_dict().items() if not k.startswith("backbone.")}
    assert found.keys() == {f"head.{name}" for name in expected}
    assert all(found[f"head.{name}"].equal(tensor) for name, tensor in expected.items())


def v3_mlp(layers: int, first: int, width: int, last: int) -> nn.Sequential:
    """An MLP of MoCo v3 (Chen, Xie and He 2021, section 5.2), of PyTorch's own layers."""
    sides = [first, *[width] * (layers - 1), last]
    found: list[nn.Module] = []
    for number in range(layers):
        end = number == layers - 1
        found.append(nn.Linear(sides[number], sides[number + 1], bias=False))
        found.append(nn.BatchNorm1d(sides[number + 1], affine=not end))
        found += [] if end else [nn.ReLU()]
    return nn.Sequential(*found)


@pytest.mark.parametrize("layers", [2, 3])
def test_heads_with_batchnorm_are_pytorchs_layers_group_by_group(layers: int) -> None:
    config = EncoderConfig(width=4, head="mlp_bn", head_layers=layers, predictor=True, dim=7)
    rows, groups = 6, 3
    encoder = build_encoder(config, 0, rows, groups).double()
    ours = nn.Sequential(*encoder.head, *encoder.predictor)  # type: ignore[misc]
    alone = []
    for _ in range(groups):
        theirs = nn.Sequential(*v3_mlp(layers, 32, 32, 7), *v3_mlp(2, 7, 32, 7)).double()
        theirs.load_state_dict(ours.state_dict())  # the same names and shapes, too
        alone.append(theirs)
    draws = torch.Generator().manual_seed(1)
    for _ in range(2):
        x = torch.randn(rows * groups, 32, dtype=torch.float64, generator=draws).requires_grad_()
        twin, pull = x.detach().clone().requires_grad_(), torch.randn(18, 7, generator=draws)
        y = ours(x)
        expected = torch.cat([a(part) for a, part in zip(alone, twin.split(rows), strict=True)])
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        (y * pull).sum().backward()
        (expected * pull).sum().backward()
        torch.testing.assert_close(x.grad, twin.grad, rtol=0, atol=1e-12)
    for number, parameter in enumerate(ours.parameters()):
        gradients = [list(a.parameters())[number].grad for a in alone]
        total = sum(each for each in gradients if each is not None)
        torch.testing.assert_close(parameter.grad, total, rtol=0, atol=1e-11)
    batch_norm.average_statistics(ours)
    names = [name for name in ours.state_dict() if "running" in name]
    assert len(names) == 2 * (layers + 2)
    for name in names:
        mean = torch.stack([a.state_dict()[name] for a in alone]).mean(0)
        torch.testing.assert_close(ours.state_dict()[name], mean, rtol=0, atol=1e-12)
    evaluated = alone[0].eval()
    evaluated.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours.eval()(x), evaluated(x), rtol=0, atol=1e-12)


def test_a_query_passes_the_predictor_in_training_alone_and_a_key_never() -> None:
    network = MoCo(build_encoder(V3, 0, 4, 2), 40, 16)
    views = torch.randn(8, 3, 16, 16)
    assert network.key_encoder.predictor is None
    names = [name for name in network.state_dict() if "predictor" in name]
    assert names
    assert all(name.startswith("query_encoder.predictor.") for name in names)
    query, key = network.query_encoder.train(), network.key_encoder.train()
    assert query.predictor is not None
    keys = key(views)
    queries = query(views)
    # The key encoder is a copy, and its groups have seen one batch as well.
    expected = F.normalize(query.predictor(query.head(query.backbone(views))), dim=1)
    torch.testing.assert_close(queries, expected)
    queries[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in query.predictor.parameters())
    torch.testing.assert_close(keys, F.normalize(key.head(key.backbone(views)), dim=1))
    query.eval()
    plain = F.normalize(query.head(query.backbone(views)), dim=1)
    torch.testing.assert_close(query(views), plain, rtol=0, atol=0)


def test_the_key_encoder_follows_backbone_and_head_and_no_predictor() -> None:
    network = MoCo(build_encoder(V3, 0), 40, 16)
    before = [p.clone() for p in network.key_encoder.parameters()]
    with torch.no_grad():
        for parameter in network.query_encoder.parameters():
            parameter.add_(1)
    network.update_key_encoder(0.75)
    after = list(network.key_encoder.parameters())
    assert len(after) == len(before) == len(list(network.query_encoder.shared_parameters()))
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old + 0.25)
    mine = sum(p.numel() for p in network.query_encoder.parameters())
    predictor = network.query_encoder.predictor
    assert predictor is not None
    own = sum(p.numel() for p in predictor.parameters())
    assert mine - own == sum(p.numel() for p in after)


def test_a_trained_encoder_is_read_without_its_predictor(tmp_path: Path) -> None:
    config = load(
        PretrainConfig,
        ["encoder.width=4", "encoder.head=mlp_bn", "encoder.dim=8", "encoder.predictor=true"],
    )
    network = MoCo(build_encoder(config.encoder, seed=1), 40, 8)
    with torch.no_grad():
        for parameter in network.parameters():  # trained, for all that a reader can see
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    network.key_encoder.backbone.conv1.weight.data.add_(1)
    state = {"config": to_dict(config), "epoch": 1.0, "enqueued": 0, "data": "0", "run_id": "a"}
    saving.write(tmp_path, 7, network.state_dict(), {}, state)
    saving.write_encoder(tmp_path, 7, network.state_dict(), to_dict(config))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    whole = load_encoder(tmp_path)(images)
    alone = checkpoint.read(next((tmp_path / "encoder" / "checkpoints").glob("step_*")))
    assert not [name for name in alone.model if "predictor" in name]
    assert load_encoder(alone.path)(images).equal(whole)
    key = find(tmp_path, "key")
    assert key.backbone.conv1.weight.equal(network.key_encoder.backbone.conv1.weight)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"head_layers": 3}, "encoder.head=linear is one layer, which encoder.head_layers=3"),
        ({"head_width": 64}, "encoder.head_width=64 don't change; leave them out, or use"),
        ({"head": "mlp", "head_layers": 4}, "head_layers=4 is out of range; it must lie between"),
        ({"head": "mlp", "head_width": -1}, "encoder.head_width=-1 is too small"),
    ],
)
def test_a_head_that_is_none_is_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        EncoderConfig(**settings)


# The Vision Transformer of MoCo v3, of another size.
TRANSFORMER = [
    *("encoder.backbone=timm/test_vit", "encoder.stem=imagenet", "encoder.width=64"),
    "encoder.options=[img_size=16,patch_size=4,embed_dim=32,depth=2,num_heads=4,weight_init=moco]",
    *("encoder.patches=frozen", "encoder.positions=sincos"),
    *("optim.name=adamw", "optim.lr=1e-3"),
]


@pytest.mark.parametrize("backbone", [[], TRANSFORMER], ids=["resnet", "transformer"])
def test_a_run_with_batchnorm_in_its_heads_is_one_run_on_any_machine(
    backbone: list[str], tmp_path: Path
) -> None:
    v3 = ["encoder.head=mlp_bn", "encoder.head_width=24", "encoder.predictor=true"]
    # Few vectors in a group are scaled up by large factors, and differences with them.
    v3 += ["moco.negatives=batch", "moco.symmetric=true", "moco.temperature=1"]
    v3 += ["bn_groups=2", "optim.lr=0.01", *backbone]
    steps = 6
    straight = one(tmp_path / "one", 1, *v3, until=steps)
    several = one(tmp_path / "two", 2, *v3, until=steps)
    assert_same(several, straight)
    assert_same(one(tmp_path / "four", 4, *v3, until=steps), straight)  # two for each group
    micro = one(tmp_path / "micro", 1, *v3, "runtime.micro_batches=2", until=steps)
    assert_same(micro, straight)
    one(tmp_path / "resumed", 2, *v3, until=5)
    resumed = one(tmp_path / "resumed", 2, *v3, until=steps)
    assert distance(resumed["state"], several["state"]) == 0
    assert resumed["losses"].equal(several["losses"][5:])
    moved = [name for name in straight["state"] if "predictor" in name and "weight" in name]
    encoder = Encoder(load(PretrainConfig, v3).encoder)
    assert len(moved) == 3 < len(batch_norms(encoder))
    fixed = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    for name in fixed:
        first = straight["state"][f"key_encoder.{name}"]
        assert first.equal(straight["state"][f"query_encoder.{name}"])
    assert len(fixed) == (3 if backbone else 0)
