"""Images of one channel, and of the smallest and largest size, work from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

import moco_dist
from moco_dist.config.encoder import EncoderConfig
from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import DataConfig, PretrainConfig, ViewsConfig
from moco_dist.config.yaml_files import load
from moco_dist.data import datasets, image_folder
from moco_dist.data.image_file import Recipe
from moco_dist.encoders.load import find
from moco_dist.errors import ConfigError, DataError
from moco_dist.export.run import export
from moco_dist.method import views
from moco_dist.method.encoder import build_encoder
from moco_dist.pretrain.run import run as pretrain
from moco_dist.probe.run import run as probe
from moco_dist.report.encoder import look
from tests import image_sets, processes
from tests.test_export import written

GRAY = ["encoder.channels=1", "views.mean=[0.48]", "views.std=[0.24]"]
RUN = [
    *("batch_size=16", "bn_groups=8", "epochs=1", "encoder.width=4", "encoder.dim=8"),
    *("moco.queue_size=32", "data.validation=0.2", "runtime.device=cpu", "knn.every_epochs=1"),
    *("tracking.wandb=disabled", "views.blur=0.5", "views.grayscale=0.5"),
]
PROBE = [
    *("batch_size=16", "epochs=1", "top_k=2", "data.validation=0.2", "runtime.device=cpu"),
    "tracking.wandb=disabled",
]


def gray_folder(root: Path, images: int = 48) -> Path:
    """Write PNGs of one channel, with one in colour and one with alpha among them."""
    for number in range(images):
        path = root / f"class_{number % 3}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = {0: "RGB", 1: "LA"}.get(number, "L")
        image_sets.picture(number, 20 + number % 5, 24).convert(mode).save(path)
    return root


@pytest.mark.parametrize("memory_gb", [16, 0], ids=["in memory", "streamed"])
def test_gray_images_are_pretrained_probed_and_reported(tmp_path: Path, memory_gb: int) -> None:
    folder = gray_folder(tmp_path / "set")
    where = [f"output={tmp_path / 'runs'}", "data.name=folder", f"data.root={folder}"]
    where += [f"data.cache={tmp_path / 'cache'}", f"data.memory_gb={memory_gb}", "data.workers=1"]
    where += ["data.size=16", "views.size=16"]
    pretrain(load(PretrainConfig, [*RUN, *GRAY, *where, "name=gray"]))
    run = tmp_path / "runs/gray"
    with pytest.raises(ConfigError, match=r"give 1 number each; for gray images"):
        probe(load(ProbeConfig, [*PROBE, *where, f"encoder={run}"]))
    probe(load(ProbeConfig, [*PROBE, *where, *GRAY[1:], f"encoder={run}"]))
    assert json.loads((tmp_path / "runs/gray-probe/DONE").read_text())
    encoder = moco_dist.load_encoder(run)
    pixels = torch.randint(256, (2, 1, 16, 16), dtype=torch.uint8)
    assert encoder(pixels).shape == (2, 32)
    with pytest.raises(AssertionError, match="images have 3 channels"):
        encoder(pixels.expand(2, 3, 16, 16))
    looked = look(run)
    assert looked.neighbours[0][0].pixels.shape == looked.pairs[0][0].pixels.shape == (16, 16, 3)
    assert list((run / "media").glob("step_*/views.png"))
    assert list((run / "media").glob("step_*/neighbours.png"))


@pytest.mark.parametrize(
    ("target", "library", "stem"),
    [
        ("torchvision", "torchvision", "imagenet"),
        ("torchvision", "torchvision", "cifar"),
        ("timm", "timm", "imagenet"),
        ("timm", "timm", "cifar"),
        ("huggingface", "transformers", "imagenet"),  # it can't hold the other stem
    ],
)
def test_an_encoder_of_gray_images_is_exported_and_comes_back(
    tmp_path: Path, target: str, library: str, stem: str
) -> None:
    """The exporter builds the library's own model, and compares its features."""
    pytest.importorskip(library)
    run = written(tmp_path / "gray", stem=stem, channels=1)
    folder = export(run, target)
    pixels = torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8)
    assert "`images` are gray, float (n, 1, 32, 32)" in (folder / "README.md").read_text()
    theirs, ours = (moco_dist.load_encoder(path)(pixels) for path in (folder, run))
    assert theirs.shape == (2, 512)
    assert theirs.equal(ours)


@pytest.mark.slow
def test_an_encoder_of_any_channels_is_exported_to_onnx(tmp_path: Path) -> None:
    """The exporter runs onnxruntime, and compares its features."""
    pytest.importorskip("onnxscript")
    run = written(tmp_path / "gray", channels=1)
    assert (export(run, "onnx") / "model.onnx").is_file()


@pytest.mark.parametrize("target", ["moco", "detectron2"])
def test_libraries_of_coloured_images_alone_are_told_so(tmp_path: Path, target: str) -> None:
    run = written(tmp_path / "gray", stem="imagenet", channels=1)
    with pytest.raises(ConfigError, match=r"1 channel\): its images have three channels; use"):
        export(run, target)


def test_a_state_dict_of_one_channel_is_known_by_its_first_layer(tmp_path: Path) -> None:
    config = EncoderConfig(channels=1, width=8)
    state = build_encoder(config, 1).backbone.state_dict()
    state["bn1.bias"] += 1  # as training would have moved it
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, tmp_path / "gray.safetensors")
    found = find(tmp_path / "gray.safetensors")
    assert found.architecture == config
    assert len(found.fed.mean) == 1


def test_gray_pixels_are_those_of_pil_from_files_and_from_memory(tmp_path: Path) -> None:
    folder = gray_folder(tmp_path / "set", 6)
    listing = image_folder.scan(folder, labelled=True)
    pixels = image_folder.decode(listing, Recipe(16, channels=1))
    for place, found in zip(listing.all_places(), pixels, strict=True):
        with Image.open(place.path) as image:
            gray = ImageOps.fit(image.convert("L"), (16, 16), Image.Resampling.BICUBIC)
        assert np.array_equal(found[0].numpy(), np.asarray(gray)), place
    config = DataConfig(shapes_train=20, shapes_test=10, size=24)
    drawn, gray_ones = datasets.load(config), datasets.load(config, 1)
    assert isinstance(drawn.test, datasets.Images)
    assert isinstance(gray_ones.test, datasets.Images)
    assert gray_ones.test.pixels.shape == (10, 1, 24, 24)
    for image, gray_one in zip(drawn.test.pixels, gray_ones.test.pixels, strict=True):
        by_pil = Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")
        assert np.array_equal(gray_one[0].numpy(), np.asarray(by_pil))
    assert drawn.fingerprint != gray_ones.fingerprint


def test_the_cache_holds_gray_and_coloured_images_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig(
        name="folder", root=str(gray_folder(tmp_path / "set", 6)), size=16, cache=str(tmp_path)
    )
    for channels in (3, 1, 3, 1):
        images = datasets.load(config, channels).train
        assert isinstance(images, datasets.Images)
        assert images.pixels.shape[1:] == (channels, 16, 16)
    assert "decoding the images again" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_channel_is_jittered_in_brightness_and_contrast_alone(dtype: torch.dtype) -> None:
    """As torchvision does it: saturation, hue and grayscale leave a gray image as it is."""
    config = ViewsConfig(size=16, jitter=1.0, grayscale=0.5, blur=0.0, mean=[0.5], std=[0.25])
    pixels = torch.randint(256, (64, 1, 16, 16), dtype=torch.uint8)
    rows = torch.arange(64)
    draws = views.draw(config, 0, 0, rows, 0, 16, 16)
    zero, whole = 0 * rows, 0 * rows + 16
    draws = replace(draws, top=zero, left=zero, height=whole, width=whole, flip=draws.flip & False)
    found = views.apply(pixels, draws, config, dtype) * 0.25 + 0.5
    for row in range(64):
        image = pixels[row].to(dtype) / 255
        for operation in draws.order[row].tolist():
            if operation < 2:
                factor = float((draws.brightness, draws.contrast)[operation][row])
                image = (tv.adjust_brightness, tv.adjust_contrast)[operation](image, factor)
        assert (found[row] - image).abs().max() < 1e-6
    alike = views._jitter_alike(pixels.to(dtype) / 255, draws)
    assert alike.equal(views._jitter_by_place(pixels.to(dtype) / 255, draws))


def losses(folder: str) -> Tensor:
    """Pretrain gray shapes for an epoch; return the losses."""
    shapes = ["data.shapes_train=80", "data.shapes_test=10", "data.size=16", "views.size=16"]
    where = [f"output={folder}", "name=gray", "precision=fp64", "tracking.every_steps=1"]
    pretrain(load(PretrainConfig, [*RUN, *GRAY, *shapes, *where]))
    lines = map(json.loads, (Path(folder) / "gray/metrics.jsonl").read_text().splitlines())
    return torch.tensor([line["train/loss"] for line in lines if "train/loss" in line])


def test_gray_images_are_one_run_on_any_number_of_processes(tmp_path: Path) -> None:
    (one,) = processes.run(losses, 1, str(tmp_path / "one"))
    two = processes.run(losses, 2, str(tmp_path / "two"))[0]
    assert len(one) == 4
    assert one.std() > 0.1
    assert (one - two).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["encoder.channels=4"], "encoder.channels=4 can't be read from images; use 3 (RGB) or 1"),
        (["encoder.channels=0"], "encoder.channels=0 is too small; it must be at least 1"),
        (GRAY[:1], "are for 3 channels and the encoder needs 1; give 1 number each; for gray"),
        (GRAY[1:], "are for 1 channel and the encoder needs 3; give 3 numbers each"),
        (GRAY[:2], "are not one number per channel; give both equally many"),
        (["views.mean=[]", "views.std=[]"], "are not one number per channel"),
    ],
)
def test_channels_that_do_not_fit_have_a_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(PretrainConfig, arguments)
    assert sentence in str(error.value)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pixels_of_more_than_8_bits_are_refused_and_not_cut_off(tmp_path: Path, mode: str) -> None:
    values = np.full((8, 8), 3000).astype({"I;16": "uint16", "I": "int32", "F": "float32"}[mode])
    Image.fromarray(values).save(tmp_path / "deep.tif")
    with pytest.raises(DataError, match=r"more than 8 bits \(mode .*\); scale them to 0 to 255"):
        image_folder.decode(image_folder.scan(tmp_path, labelled=False), Recipe(8, channels=1))


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize(
    ("backbone", "stem", "width"),
    [("resnet18", "cifar", 4), ("resnet18", "imagenet", 4), ("timm/regnetx_002", "imagenet", 64)],
)
def test_a_backbone_has_any_number_of_channels(
    channels: int, backbone: str, stem: Any, width: int
) -> None:
    config = EncoderConfig(channels=channels, backbone=backbone, stem=stem, width=width)
    encoder = build_encoder(config, seed=0)
    assert encoder(torch.randn(16, channels, 32, 32)).shape == (16, 128)


@pytest.mark.parametrize(
    ("size", "stem"),
    [(16, "cifar"), pytest.param(512, "imagenet", marks=pytest.mark.slow)],
)
def test_the_smallest_and_the_largest_images_are_pretrained_and_probed(
    tmp_path: Path, size: int, stem: str
) -> None:
    where = [f"output={tmp_path}", f"data.size={size}", f"views.size={size}"]
    where += ["data.shapes_train=40", "data.shapes_test=10"]
    pretrain(load(PretrainConfig, [*RUN, *where, f"encoder.stem={stem}", "name=run"]))
    probe(load(ProbeConfig, [*PROBE, *where, f"encoder={tmp_path}/run"]))
    assert moco_dist.load_encoder(tmp_path / "run").view.size == size
    assert json.loads((tmp_path / "run-probe/DONE").read_text())
