"""Grouped BatchNorm is one BatchNorm a group; the encoder is torchvision's ResNet with a head."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moco_dist.config.encoder import BACKBONES, EncoderConfig
from moco_dist.errors import ConfigError
from moco_dist.method import batch_norm, timm_backbone
from moco_dist.method.batch_norm import GroupedBatchNorm, batch_norms
from moco_dist.method.encoder import build_encoder, check

VIT: dict[str, Any] = {"backbone": "timm/vit_tiny_patch16_224", "stem": "imagenet"}
# For images of 32 pixels, and with the first weights of MoCo v3.
SMALL = ["img_size=32", "patch_size=8", "embed_dim=48", "depth=2", "num_heads=4"]
SMALL += ["weight_init=moco"]


def separate_norms(groups: int, channels: int) -> list[nn.BatchNorm2d]:
    return [nn.BatchNorm2d(channels).double() for _ in range(groups)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_norm_is_a_norm_for_each_group(
    groups: int, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    rows, channels = 3, 5
    grouped = GroupedBatchNorm(channels, rows, groups).double()
    separate = separate_norms(groups, channels)
    for norm in (grouped, *separate):
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        x = torch.randn(rows * groups, channels, 4, 4, dtype=torch.float64) * 2 + 1
        x = x.to(memory_format=memory_format).requires_grad_()
        x_separate = x.detach().clone().requires_grad_()
        y, parts = grouped(x), zip(separate, x_separate.split(rows), strict=True)
        y_separate = torch.cat([norm(part) for norm, part in parts])
        weight = torch.randn_like(y)
        (y * weight).sum().backward()
        (y_separate * weight).sum().backward()
        torch.testing.assert_close(y, y_separate, rtol=0, atol=1e-12)
        torch.testing.assert_close(x.grad, x_separate.grad, rtol=0, atol=1e-12)
    weight_gradients = [norm.weight.grad for norm in separate if norm.weight.grad is not None]
    torch.testing.assert_close(grouped.weight.grad, torch.stack(weight_gradients).sum(0))
    for number, norm in enumerate(separate):
        torch.testing.assert_close(grouped.group_mean[number], norm.running_mean)
        torch.testing.assert_close(grouped.group_var[number], norm.running_var)


def test_the_kernels_of_a_gpu_normalise_each_group_as_one_batch_norm_for_each() -> None:
    """Computed by Triton's interpreter, which needs no GPU."""
    command = [sys.executable, "-m", "tests.interpreted_kernels"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    allowed = {"torch.float64": 1e-13, "torch.float32": 1e-5, "torch.bfloat16": 1e-2}
    layers, spanning, encoders = json.loads(ended.stdout)
    assert len(layers) == 20
    for dtype, shape, kind, found in layers:
        case = dtype, shape, kind, found
        assert found.pop("alone") == 0, case
        names = {"y", "mean", "var", "dx", "dweight", "dbias"}
        assert found.keys() == names | ({"dshortcut"} if kind == "shortcut" else set())
        assert max(found.values()) < allowed[dtype], case
        # Sums are float32 at least, also for bfloat16 images.
        assert max(found["mean"], found["var"], found["dbias"]) < 1e-5, case
    # A group that spans two processes, as each of them sees it, without and with a shortcut.
    assert [len(found) for found in spanning] == [6, 6, 7, 7]
    assert all(max(found.values()) < 1e-13 for found in spanning), spanning
    # All ReLUs of an encoder are those of its norms, and nothing else changes.
    for name, norms in (("resnet18", 17), ("resnet50", 49)):
        assert encoders[name].pop("rectified") == norms
        assert max(encoders[name].values()) < 1e-9, encoders


def test_evaluation_uses_the_mean_of_the_groups_statistics() -> None:
    torch.manual_seed(0)
    grouped, separate = GroupedBatchNorm(5, 3, 2).double(), separate_norms(2, 5)
    x = torch.randn(6, 5, 4, 4, dtype=torch.float64)
    grouped(x)
    for norm, part in zip(separate, x.split(3), strict=True):
        norm(part)
    batch_norm.average_statistics(grouped)
    grouped.eval()
    whole = nn.BatchNorm2d(5).double().eval()
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(norm, name) for norm in separate]).mean(0)
        getattr(whole, name).copy_(mean)
    torch.testing.assert_close(grouped(x), whole(x), rtol=0, atol=1e-14)


def test_groups_taken_in_turn_are_the_groups_taken_at_once() -> None:
    torch.manual_seed(0)
    at_once, in_turn = GroupedBatchNorm(5, 3, 4), GroupedBatchNorm(5, 3, 4)
    for _ in range(2):
        x = torch.randn(12, 5, 4, 4)
        y = torch.cat([in_turn(x[:3]), in_turn(x[3:9]), in_turn(x[9:])])
        assert at_once(x).equal(y)
    assert at_once.group_mean.equal(in_turn.group_mean)
    assert at_once.group_var.equal(in_turn.group_var)


def test_a_batch_that_is_no_whole_groups_is_refused() -> None:
    with pytest.raises(AssertionError, match="7 rows are not whole groups of 3"):
        GroupedBatchNorm(5, 3, 4)(torch.zeros(7, 5, 2, 2))


@pytest.mark.parametrize(
    ("name", "features"), [("resnet18", 512), ("resnet50", 2048), ("resnext50_32x4d", 2048)]
)
def test_backbone_at_published_width_is_torchvisions(name: str, features: int) -> None:
    encoder = build_encoder(EncoderConfig(backbone=name, stem="imagenet"), seed=0).eval().double()
    theirs = torchvision.models.get_model(name, weights=None)
    theirs.fc = nn.Identity()
    theirs.double().load_state_dict(encoder.backbone.state_dict())
    # float64, because the memory format changes the order of sums.
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(encoder.backbone(x), theirs.eval()(x))
    assert encoder.num_features == features


@pytest.mark.parametrize("width", [4, 16])
def test_width_scales_every_stage(width: int) -> None:
    encoder = build_encoder(EncoderConfig(width=width), seed=0)
    convolutions = {m.out_channels for m in encoder.modules() if isinstance(m, nn.Conv2d)}
    assert convolutions == {width, 2 * width, 4 * width, 8 * width}
    features = encoder.eval().backbone(torch.zeros(1, 3, 32, 32))
    assert features.shape == (1, 8 * width) == (1, encoder.num_features)


def test_weights_depend_on_the_seed_alone() -> None:
    config = EncoderConfig(width=4)
    torch.manual_seed(1)
    first = build_encoder(config, seed=5).state_dict()
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    second = build_encoder(config, seed=5).state_dict()
    assert torch.random.get_rng_state().equal(before)
    assert all(first[name].equal(second[name]) for name in first)
    other = build_encoder(config, seed=6).state_dict()
    assert not first["backbone.conv1.weight"].equal(other["backbone.conv1.weight"])


@pytest.mark.parametrize(("head", "layers"), [("linear", 1), ("mlp", 2)])
def test_head_gives_unit_vectors(head: str, layers: int) -> None:
    config = EncoderConfig(width=4, head=head, dim=7)  # type: ignore[arg-type]
    encoder = build_encoder(config, seed=0).eval()
    assert sum(isinstance(m, nn.Linear) for m in encoder.head) == layers
    queries = encoder(torch.randn(3, 3, 32, 32))
    assert queries.shape == (3, 7)
    torch.testing.assert_close(queries.norm(dim=1), torch.ones(3))
    assert len(batch_norms(encoder)) == 20


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_has_the_tensors_of_torchvisions_model(name: str) -> None:
    with torch.device("meta"):
        ours = build_encoder(EncoderConfig(backbone=name, stem="imagenet"), seed=0).backbone
        theirs = torchvision.models.get_model(name, weights=None)
        theirs.fc = nn.Identity()
    shapes = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == shapes
    strides = [m.stride for m in theirs.modules() if isinstance(m, nn.Conv2d)]
    assert [m.stride for m in ours.modules() if isinstance(m, nn.Conv2d)] == strides


@pytest.mark.parametrize("size", [16, 512])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_images_of_any_size_have_features(size: int, stem: Literal["cifar", "imagenet"]) -> None:
    backbone = build_encoder(EncoderConfig(width=2, stem=stem), seed=0).eval().backbone
    assert backbone(torch.randn(1, 3, size, size)).shape == (1, 16)


@pytest.mark.parametrize("name", ["regnety_002", "mobilenetv3_small_050"])
def test_a_model_of_timm_has_its_features_and_grouped_norms(name: str) -> None:
    import timm

    encoder = build_encoder(EncoderConfig(backbone=f"timm/{name}", stem="imagenet"), 0, 2, 2)
    theirs = timm.create_model(name, num_classes=0)
    count = sum(isinstance(module, nn.BatchNorm2d) for module in theirs.modules())
    assert len(batch_norms(encoder)) == count > 0
    encoder.train()(torch.randn(4, 3, 64, 64))
    batch_norm.average_statistics(encoder)
    theirs.load_state_dict(encoder.backbone.state_dict())
    x = torch.randn(1, 3, 64, 64)
    features = encoder.eval().backbone(x)
    torch.testing.assert_close(features, theirs.eval()(x))
    assert features.shape == (1, encoder.num_features)


def test_a_model_of_timm_without_batchnorm_has_no_statistics() -> None:
    encoder = build_encoder(
        EncoderConfig(backbone="timm/vit_tiny_patch16_224", stem="imagenet"), 0, 2, 2
    )
    assert batch_norm.group_statistics(encoder) == {}
    batch_norm.average_statistics(encoder)
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 128)
    # On a device, where a CUDA graph has the numbers of a step found good.
    undo = batch_norm.Undo(encoder.to("meta"))
    undo.restore_unless(torch.ones((), dtype=torch.bool, device="meta"))


def test_the_kernels_of_a_gpu_get_no_group_that_their_offsets_do_not_reach() -> None:
    """Offsets have 32 bits; PyTorch's own BatchNorm takes larger groups."""
    norm = GroupedBatchNorm(64, rows_per_group=2**13, groups=2)
    with FakeTensorMode():
        largest = torch.empty(2**14, 64, 63, 64, device="cuda")
        larger = torch.empty(2**14, 64, 64, 64, device="cuda")
    assert norm.fuses(largest)
    assert not norm.fuses(larger)


def test_the_kernels_of_a_gpu_get_no_more_groups_than_have_statistics() -> None:
    """As of a loaded encoder in training, whose only group has one row: they would be one group."""
    norm = GroupedBatchNorm(4, rows_per_group=1, groups=1)
    with FakeTensorMode():
        row, rows = (torch.empty(number, 4, 8, 8, device="cuda") for number in (1, 6))
    assert norm.fuses(row)
    assert not norm.fuses(rows)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"backbone": "resnet19"}, "resnet19 is unknown; use one of resnet18, resnet34"),
        ({"backbone": "timm/regnety_002"}, "has the width and stem that timm gives it"),
        ({"backbone": "resnext50_32x4d", "width": 8}, "use 16 or more"),
        ({"backbone": "timm/none_such", "stem": "imagenet"}, "timm has no such model"),
        ({"backbone": "timm/levit_128s", "stem": "imagenet"}, "is a BatchNorm1d"),
        ({"patches": "frozen"}, "frozen is for timm's Vision Transformers, and resnet18 has no"),
        (
            {"backbone": "timm/regnety_002", "stem": "imagenet", "patches": "frozen"},
            "timm/regnety_002 has no projection of patches; use a Vision Transformer, or",
        ),
        ({"positions": "sincos"}, "sincos is for timm's Vision .*resnet18 has no positions; leave"),
        (
            {"backbone": "timm/regnety_002", "stem": "imagenet", "positions": "sincos"},
            "sincos: timm/regnety_002 adds no positions to its patches; use a Vision Transformer,",
        ),
        (
            VIT | {"options": ["embed_dim=66", "num_heads=3"], "positions": "sincos"},
            "needs a width that is a multiple of 4, and timm/vit_tiny_patch16_224 has 66; change",
        ),
        ({"options": ["depth=3"]}, r"\['depth=3'\] is for models of timm, and resnet18 is built"),
        (VIT | {"options": ["depth"]}, r"depth is no KEY=VALUE; write it as in \[patch_size=4\]"),
        (VIT | {"options": ["depth="]}, "depth= is no KEY=VALUE"),
        (VIT | {"options": ["depth=2", "depth=3"]}, "depth=3 sets depth again; leave one out"),
        (VIT | {"options": ["in_chans=1"]}, "in_chans is set by other keys of the configuration"),
        (
            VIT | {"options": ["patchsize=4"]},
            "patchsize=4: timm/vit_tiny_patch16_224 has no option patchsize; did you mean patch_s",
        ),
        (VIT | {"options": ["foo=4"]}, "has no option foo; use one of img_size, patch_size, glo"),
        (VIT | {"options": ["depth=four"]}, "depth=four is not a number, which timm/vit_tiny_p"),
        (VIT | {"options": ["qkv_bias=no"]}, "qkv_bias=no is not true or false, which timm/vit"),
        (
            VIT | {"options": ["num_heads=5"]},
            r"can't be built with num_heads=5 \(dim should be divisible by num_heads\); correct",
        ),
        (VIT | {"options": ["drop_rate=0.1"]}, r"drops at random \(rate 0.1\), .*drop_path_rate=0"),
        (
            {"backbone": "timm/regnety_002", "stem": "imagenet", "options": ["foo=4"]},
            "can't be built with foo=4 .*unexpected keyword",
        ),
    ],
)
def test_a_backbone_that_can_not_be_trained_is_one_sentence(
    settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_encoder(EncoderConfig(**settings), seed=0)


def test_frozen_patches_are_moco_v3s_and_need_no_gradient() -> None:
    frozen = build_encoder(EncoderConfig(**VIT, patches="frozen"), seed=0)
    trained = build_encoder(EncoderConfig(**VIT), seed=0)
    projection = frozen.backbone.patch_embed.proj
    bound = (6 / (3 * 16 * 16 + 192)) ** 0.5  # moco-v3, vits.py
    numbers = projection.weight.detach()
    assert 0.99 * bound < float(numbers.abs().max()) <= bound
    assert float(numbers.std()) == pytest.approx(bound / 3**0.5, rel=0.01)
    assert not projection.bias.any()
    names = [name for name, p in frozen.named_parameters() if not p.requires_grad]
    assert names == [f"backbone.patch_embed.proj.{part}" for part in ("weight", "bias")]
    assert all(p.requires_grad for p in trained.parameters())
    assert frozen.state_dict().keys() == trained.state_dict().keys()


def test_options_are_those_of_timm_and_the_first_weights_are_moco_v3s() -> None:
    import timm

    config = EncoderConfig(**VIT, options=[*SMALL, "qkv_bias=False", "global_pool=token"])
    backbone = build_encoder(config, 0).backbone
    settings: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 4,
    }
    theirs: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, **settings)
    blocks = backbone.blocks
    assert len(blocks) == 2
    assert [b.attn.num_heads for b in blocks] == [b.attn.num_heads for b in theirs.blocks] == [4, 4]
    assert blocks[0].attn.qkv.bias is None  # a value is no text
    shapes = {k: v.shape for k, v in theirs.state_dict().items() if "qkv.bias" not in k}
    assert {k: v.shape for k, v in backbone.state_dict().items()} == shapes
    for each, out in (
        (blocks[1].attn.qkv, 48),
        (blocks[1].attn.proj, 48),
        (blocks[1].mlp.fc1, 192),
    ):
        bound = (6 / (48 + out)) ** 0.5  # Q, K and V apart: moco-v3, vits.py
        assert 0.99 * bound < float(each.weight.detach().abs().max()) <= bound
    assert 0 < float(backbone.cls_token.detach().abs().max()) < 1e-5


def test_sincos_positions_are_moco_v3s_and_need_no_gradient() -> None:
    encoder = build_encoder(EncoderConfig(**VIT, options=SMALL, positions="sincos"), seed=0)
    found = encoder.backbone.pos_embed.detach()[0].double().numpy()
    assert not found[0].any()  # the class token has none
    # A position along each side is a complex number of each frequency, of length 1.
    turns = 1j * 10000.0 ** -(np.arange(12) / 12)
    for row, column in itertools.product(range(4), range(4)):
        numbers = np.concatenate([np.exp(turns * row), np.exp(turns * column)])
        parts = [numbers[:12].imag, numbers[:12].real, numbers[12:].imag, numbers[12:].real]
        np.testing.assert_allclose(found[1 + 4 * row + column], np.concatenate(parts), atol=1e-6)
    names = [name for name, p in encoder.named_parameters() if not p.requires_grad]
    assert names == ["backbone.pos_embed"]


@pytest.mark.parametrize(
    ("settings", "size", "sentence"),
    [
        (
            VIT,
            40,
            r"takes no views of 40 pixels \(Input height \(40\) should be divisible by patch",
        ),
        (VIT | {"options": ['global_pool=""']}, 32, r"gives \(1, 5, 192\) numbers for a view, not"),
    ],
)
def test_views_that_do_not_fit_the_patches_are_one_sentence(
    settings: dict[str, Any], size: int, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(EncoderConfig(**settings), size)
    check(EncoderConfig(**VIT, options=["patch_size=8"]), size)
    check(EncoderConfig(), size)


def test_positions_of_another_size_have_a_sentence() -> None:
    small = build_encoder(EncoderConfig(**VIT, options=SMALL), 0).backbone
    said = timm_backbone.interpolates(small, 40)
    assert said.startswith("the positions of the patches are made for 32 pixels, and interpolated")
    assert "encoder.options=[img_size=40] makes" in said
    assert not timm_backbone.interpolates(small, 32)
    assert not timm_backbone.interpolates(build_encoder(EncoderConfig(width=4), 0).backbone, 40)


def test_without_timm_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="pip install timm"):
        build_encoder(EncoderConfig(backbone="timm/regnety_002", stem="imagenet"), seed=0)
