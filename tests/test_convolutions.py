"""Convolutions that go another way on a CPU give what the library's give, and have its weights."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from moco_dist.config.encoder import EncoderConfig
from moco_dist.method import convolutions
from moco_dist.method.convolutions import SmallMapConv
from moco_dist.method.encoder import build_encoder


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 2), (3, 5), (4, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_sum_of_products_is_the_convolution(
    size: tuple[int, int], memory_format: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
        return numbers.to(memory_format=memory_format)

    x, weight = drawn(3, 5, *size).requires_grad_(), drawn(7, 5, 3, 3).requires_grad_()
    ours, theirs = convolutions.sum_of_products(x, weight), functional.conv2d(x, weight, padding=1)
    of_out = drawn(*theirs.shape)
    found = torch.autograd.grad(ours, (x, weight), of_out)
    expected = torch.autograd.grad(theirs, (x, weight), of_out)
    torch.testing.assert_close((ours, *found), (theirs, *expected), rtol=0, atol=1e-12)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    torch.library.opcheck(convolutions.sum_of_products, (x, weight), test_utils=checks)


def test_an_encoder_of_published_width_goes_that_way_on_its_last_maps_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.Size] = []

    def noted(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(x.shape)
        return functional.conv2d(x, weight, padding=1)

    monkeypatch.setattr(convolutions, "sum_of_products", noted)
    backbone = build_encoder(EncoderConfig(), 0).backbone
    images = torch.zeros(4, 3, 32, 32)
    with torch.no_grad():
        backbone(images)
        assert seen == 3 * [torch.Size([4, 512, 4, 4])]
        with torch.autocast("cpu", torch.bfloat16):
            backbone(images)
        backbone.eval()(images)
        narrow = build_encoder(EncoderConfig(width=16), 0).backbone
        narrow(images)
    assert len(seen) == 3


def test_weights_and_names_stay_and_nothing_is_drawn() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(256, 256, 3, padding=1, bias=False),
            nn.Conv2d(8, 8, 1, 2, bias=False),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.Conv2d(256, 256, 3, padding=1, groups=2, bias=False),
            nn.Conv2d(256, 256, 3, padding=2, dilation=2, bias=False),
            nn.Conv2d(256, 256, 3, 2, padding=1, bias=False),
            nn.Conv2d(255, 256, 3, padding=1, bias=False),
            nn.Conv2d(256, 256, 3, padding=1, padding_mode="circular", bias=False),
            nn.Conv2d(8, 8, 1, 2, padding=1, bias=False),
        ).eval()

    plain, suited = model(), model()
    before = torch.get_rng_state()
    convolutions.suit(suited)
    assert torch.equal(torch.get_rng_state(), before)
    kinds = [type(module) for module in suited]
    assert kinds == [SmallMapConv, convolutions.PointwiseShortcut, *[nn.Conv2d] * 7]
    assert not any(module.training for module in suited)
    torch.testing.assert_close(suited.state_dict(), plain.state_dict(), rtol=0, atol=0)
    for ours, theirs in zip(suited, plain, strict=True):
        assert repr(ours).partition("(")[2] == repr(theirs).partition("(")[2]


def test_shortcuts_of_narrow_encoders_do_not_write_beyond_their_memory() -> None:
    """In a separate process, which oneDNN's fault would end; against the sum of products."""
    code = """
import torch
from moco_dist.config.encoder import EncoderConfig
from moco_dist.method.encoder import build_encoder
for width in (4, 8):
    shortcut = build_encoder(EncoderConfig(width=width), 0).backbone.layer2[0].downsample[0]
    images = torch.randint(-9, 10, (4, width, 128, 128)).float()
    images = images.to(memory_format=torch.channels_last)
    out = shortcut(images)
    assert out.shape == (4, 2 * width, 64, 64)
    gradient = torch.randint_like(out, -9, 10)  # sums of whole numbers are exact
    out.backward(gradient)
    expected = torch.einsum("noyx,niyx->oi", gradient.double(), images[:, :, ::2, ::2].double())
    assert shortcut.weight.grad.flatten(1).double().equal(expected)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
