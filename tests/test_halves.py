"""Two halves of an encoder see lightness and colours, and each meets the bank of the other one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import color
from torch import Tensor

from moco_dist import load_encoder
from moco_dist.config.encoder import EncoderConfig
from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from moco_dist.doctor.bn_leak import bn_leak
from moco_dist.doctor.checks import batch
from moco_dist.encoders.load import find
from moco_dist.errors import ConfigError, DataError
from moco_dist.export.run import export
from moco_dist.export.targets import TARGETS
from moco_dist.method.bank import Bank
from moco_dist.method.encoder import Encoder, build_encoder
from moco_dist.method.halves import Halves, rgb_to_lab
from moco_dist.notebook import run_pretrain, run_probe
from moco_dist.pretrain import figures
from moco_dist.pretrain.trainer import Trainer
from moco_dist.probe.frozen import both
from moco_dist.report.table import details
from moco_dist.runs.record import CONTROL, TRAINED, read
from tests.test_mechanisms import CMC, EXACT, account
from tests.test_moco import unit
from tests.test_one_run_any_machine import assert_same
from tests.test_trainer import TINY, build

STEP_OF_COLOURS = 17  # of 256: a grid of 16 x 16 x 16 colours, with all corners


def colours() -> Tensor:
    """Return a grid of all sRGB colours as one image, uint8 (1, 3, 64, 64)."""
    levels = torch.arange(0, 256, STEP_OF_COLOURS, dtype=torch.uint8)
    return torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 64, 64)


def lab_of(images: Tensor) -> Tensor:
    """scikit-image's Lab of uint8 images (n, 3, h, w)."""
    found = color.rgb2lab(images.permute(0, 2, 3, 1).numpy())
    return torch.from_numpy(found).permute(0, 3, 1, 2)


def halves(**settings: Any) -> tuple[Encoder, Halves]:
    encoder = build_encoder(EncoderConfig(**{"width": 8, "dim": 8, "halves": "lab", **settings}), 1)
    assert isinstance(encoder.backbone, Halves)
    return encoder.eval(), encoder.backbone


def seen(backbone: Halves, images: Tensor) -> list[Tensor]:
    """Return what the halves see of normalised images."""
    found: list[Tensor] = []
    hooks = [
        half.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        for half in (backbone.l, backbone.ab)
    ]
    backbone(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lab_is_that_of_scikit_image(dtype: torch.dtype) -> None:
    ours = rgb_to_lab(colours().to(dtype) / 255)
    # Its constants have four digits, which is 1e-4 of a unit of L; a person sees two units.
    assert (ours.double() - lab_of(colours()).double()).abs().max() < 2e-3


@pytest.mark.parametrize("autocast", [False, True])
def test_the_halves_see_lightness_and_colours_between_minus_one_and_one(autocast: bool) -> None:
    _, backbone = halves()
    mean, std = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
    backbone.expect(mean, std)
    normalised = (colours() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        lightness, ab = seen(backbone, normalised)
    both = torch.cat([lightness, ab], 1)
    assert both.dtype == torch.float32
    # What train_CMC.py of HobbitLong/CMC normalises scikit-image's Lab by.
    centre, scale = torch.tensor([50, 6.025, -6.6895]), torch.tensor([50, 92.208, 101.1675])
    expected = (lab_of(colours()) - centre[:, None, None]) / scale[:, None, None]
    assert (both - expected).abs().max() < 1e-4
    for channel in both.unbind(1):
        assert (float(channel.min()), float(channel.max())) == pytest.approx((-1, 1), abs=2e-3)


def test_a_half_knows_nothing_of_what_the_other_one_sees() -> None:
    _, backbone = halves()
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    lab = np.moveaxis(color.rgb2lab(np.moveaxis(images.numpy(), 1, -1)), -1, 1)
    lab[:, 1:] = 0
    grays = torch.from_numpy(np.moveaxis(color.lab2rgb(np.moveaxis(lab, 1, -1)), -1, 1)).float()
    (own, ab), (same, none) = (backbone(x).chunk(2, 1) for x in (images, grays))
    assert (own - same).abs().max() < 1e-3 * own.abs().max()
    flat = backbone(torch.full_like(images, 0.3)).chunk(2, 1)[1]
    assert (none - flat).abs().max() < 1e-3 * flat.abs().max() < (ab - none).abs().max()


@pytest.mark.parametrize(
    ("name", "settings"),
    [("resnet18", {"width": 64}), ("timm/test_resnet", {"width": 64, "stem": "imagenet"})],
)
def test_features_of_two_halves_are_joined(name: str, settings: dict[str, Any]) -> None:
    encoder, backbone = halves(backbone=name, **settings)
    whole = build_encoder(EncoderConfig(backbone=name, **settings), 1)
    images = torch.rand(2, 3, 32, 32)
    assert backbone(images).shape == (2, encoder.num_features)
    # A ResNet's halves have half its width, and a model of timm can't have another one.
    times = 1 if name == "resnet18" else 2
    assert encoder.num_features == times * whole.num_features
    vectors = encoder(images)
    assert vectors.shape == (2, 2, 8)
    assert torch.allclose(vectors.norm(dim=2), torch.ones(2, 2))


def by_autograd(trainer: Trainer, steps: int) -> list[Tensor]:
    """CMC with all images as candidates, over whole batches, by PyTorch's own loss and autograd."""
    settings, encoder = trainer.config.moco, trainer.moco.query_encoder.train()
    v_l, v_ab = (each.clone() for each in trainer.moco.bank.vectors.unbind(1))
    losses = []
    for step in range(steps):
        rows = trainer.plan.step(step).samples
        views = trainer.views(rows, step // trainer.steps_per_epoch, 0)
        q_l, q_ab = encoder(views).unbind(1)
        loss = F.cross_entropy(q_l @ v_ab.T / settings.temperature, rows)
        loss = loss + F.cross_entropy(q_ab @ v_l.T / settings.temperature, rows)
        loss.backward()
        for bank, queries in ((v_l, q_l), (v_ab, q_ab)):
            kept = settings.bank_momentum
            bank[rows] = F.normalize(kept * bank[rows] + (1 - kept) * queries.detach())
        trainer.update_query_encoder()
        trainer.step += 1
        losses.append(loss.detach() / 2)
    return [*losses, v_l, v_ab, *(p.detach().clone() for p in encoder.parameters())]


def test_steps_are_those_of_two_cross_entropies_over_crossed_banks() -> None:
    words = EXACT, *CMC, "moco.bank_draws=0", "moco.bank_start=random"
    trainer = build(*words)
    ours = [trainer.train_step()[0] for _ in range(8)]
    ours += trainer.moco.bank.vectors.unbind(1)
    ours += [p.detach() for p in trainer.moco.query_encoder.parameters()]
    for mine, theirs in zip(ours, by_autograd(build(*words), 8), strict=True):
        assert (mine - theirs).abs().max() < 1e-10


def test_a_query_is_never_compared_with_its_own_image_twice() -> None:
    trainer = build(EXACT, *CMC, "moco.bank_draws=500")
    _, (logits,) = trainer.train_step()
    drawn = trainer.moco.bank.drawn(0)
    own = drawn == trainer.plan.step(0).samples[:, None]
    assert own.any()
    assert logits[:, 1:].isinf().equal(torch.cat([own, own]))


def test_new_banks_hold_unit_vectors_of_their_own() -> None:
    vectors = Bank(images=5000, dim=6, seed=1, draws=0, momentum=0.5, halves=2).vectors.double()
    assert vectors.shape == (5000, 2, 6)
    assert (vectors.norm(dim=2) - 1).abs().max() < 1e-6
    assert float((vectors[:, 0] * vectors[:, 1]).sum(1).mean().abs()) < 0.03


def test_a_random_start_is_one_run_on_any_machine_too(tmp_path: Path) -> None:
    words = "cmc", "moco.bank_start=random"
    straight = account(tmp_path / "1", 1, *words, until=6)
    assert_same(account(tmp_path / "2x2", 2, *words, "runtime.micro_batches=2", until=6), straight)


def test_health_is_the_mean_of_both_halves() -> None:
    trainer = build(*CMC)
    queries, met = (torch.stack([unit(16, 8, n), unit(16, 8, n + 1)], 1) for n in (1, 3))
    samples = torch.arange(16)
    both = figures.health(trainer.moco, queries, [met], samples)
    each = [
        figures.health(trainer.moco, queries[:, half], [met[:, half]], samples) for half in (0, 1)
    ]
    assert both.keys() == each[0].keys()
    for name, value in both.items():
        assert value == pytest.approx((each[0][name] + each[1][name]) / 2, abs=1e-12)


@pytest.mark.parametrize("head", ["linear", "mlp", "mlp_bn"])
def test_heads_without_batch_norm_are_warned_of(head: str) -> None:
    config = load(PretrainConfig, [*CMC, f"encoder.head={head}"])
    assert (f"encoder.head={head} has no BatchNorm" in config.drifts) == (head != "mlp_bn")
    (found,) = (each for each in batch(config, 9000) if each.about == "negatives")
    assert (found.fault, found.warning) == ("", config.drifts)
    assert found.found.endswith("; two banks, crossed between the halves")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two halves, with kNN by its vectors, a linear classifier and pictures."""
    words = [*TINY, *CMC, f"output={tmp_path_factory.mktemp('runs')}", "name=cmc", "epochs=1"]
    words += ["data.validation=0.3", "knn.every_epochs=1", "knn.features=head"]
    return run_pretrain(load(PretrainConfig, [*words, "monitor.linear=true", "views.jitter=0"]))


def test_a_run_is_evaluated_probed_and_read_back(run: Path, tmp_path: Path) -> None:
    assert "resnet18 in two halves (lab), width 4, cifar stem" in "\n".join(details(read(run)))
    encoder = load_encoder(run)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    assert encoder(images).shape == (4, 32)
    words = [*TINY[5:8], f"encoder={run}", f"output={tmp_path}", "epochs=1", "batch_size=16"]
    results = run_probe(load(ProbeConfig, [*words, "views.size=16", "runtime.device=cpu"]))
    assert results["encoders"].keys() == {TRAINED, CONTROL}


def test_the_control_sees_images_as_the_trained_encoder_does(run: Path) -> None:
    images, device = torch.rand(2, 3, 16, 16), torch.device("cpu")
    backbones: list[Any] = [*both(find(run), ProbeConfig(), device, torch.float32).values()]
    trained, control = (seen(each, images) for each in backbones)
    assert all(map(Tensor.equal, trained, control))
    assert not backbones[0](images).equal(backbones[1](images))


@pytest.mark.parametrize("target", TARGETS)
def test_onnx_alone_holds_two_halves(target: str, run: Path) -> None:
    if target != "onnx":
        with pytest.raises(ConfigError, match=f"^{target} can't hold .* two backbones.*--to onnx$"):
            export(run, target)
        return
    folder = export(run, target)  # which compares the features
    card = (folder / "README.md").read_text()
    assert "by Contrastive Multiview Coding with moco_dist" in card
    assert "resnet18 in two halves (lab), width 4, cifar stem" in card


def test_another_run_starts_from_two_halves_with_its_own_normalisation(run: Path) -> None:
    other = "views.mean=[0.5,0.5,0.5]"
    trainer = build(*CMC, f"init_from={run}", other)
    trained: Any = load_encoder(run).backbone
    found: Any = trainer.moco.query_encoder.backbone
    assert found.l.conv1.weight.equal(trained.l.conv1.weight)
    assert found.mean.flatten().tolist() == [0.5] * 3 != trained.mean.flatten().tolist()
    with pytest.raises(DataError, match=r"give encoder.halves=lab"):
        build(f"init_from={run}")


def test_the_doctor_looks_for_leaks_in_two_halves(capsys: pytest.CaptureFixture[str]) -> None:
    bn_leak(load(PretrainConfig, [*TINY, *CMC, "output=/nowhere", "epochs=1"]))
    assert "keeps the groups of queries and keys apart" in capsys.readouterr().out
