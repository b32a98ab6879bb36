"""An exported encoder is the same in the other library, or is not there; and comes back."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torchvision
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

import moco_dist
from moco_dist.config.encoder import EncoderConfig
from moco_dist.config.moco import MocoConfig
from moco_dist.config.recipe import DataConfig, PretrainConfig, ViewsConfig
from moco_dist.config.yaml_files import to_dict
from moco_dist.distributed import fingerprint
from moco_dist.encoders import original
from moco_dist.encoders.load import Found, checkpoint_of, find
from moco_dist.encoders.names import from_detectron2
from moco_dist.errors import ConfigError, DataError, MissingError, OutputError
from moco_dist.export import targets
from moco_dist.export.run import export, run
from moco_dist.method.encoder import build_encoder
from moco_dist.method.moco import MoCo
from moco_dist.method.moco import build as method
from moco_dist.runs import saving
from moco_dist.runs.record import CONTROL, TRAINED

DATA = DataConfig()
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def written(
    run: Path,
    enqueued: int = 50,
    init_from: str = "",
    data: DataConfig = DATA,
    **encoder: Any,
) -> Path:
    """Write a checkpoint with statistics as after training, and a queue of 40."""
    config = EncoderConfig(dim=8, **encoder)
    torch.manual_seed(3)
    network = MoCo(build_encoder(config, seed=1), 40, 8)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith("bias"):
            tensor.add_(torch.randn(tensor.shape))
    network.queue.keys[: min(enqueued, 40)] = torch.randn(min(enqueued, 40), 8)
    other = ViewsConfig(mean=[0.5] * config.channels, std=[0.25] * config.channels)
    views = ViewsConfig() if config.channels == 3 else other
    settings = to_dict(PretrainConfig(encoder=config, views=views, init_from=init_from, data=data))
    state = {"config": settings, "epoch": 2.5, "enqueued": enqueued, "data": "0123", "run_id": "a"}
    saving.write(run, 7, network.state_dict(), {}, state)
    return run


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("runs") / "im", stem="imagenet", head="mlp")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("runs") / "cifar")


def stirred() -> dict[str, Tensor]:
    """Tensors of a ResNet-18 without which it would be as before the first step."""
    return {"bn1.bias": torch.ones(64)}


def backbone_of(path: Path) -> Any:
    return find(path).backbone


def assert_same(theirs: Tensor, run: Path) -> None:
    ours = backbone_of(run)(IMAGES)
    assert theirs.shape == ours.shape
    assert float((theirs.detach() - ours).abs().max()) < 1e-5 * max(1, float(ours.abs().max()))


def small_stem(model: Any) -> Any:
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_torchvision_and_timm_load_it(stem: str, request: pytest.FixtureRequest) -> None:
    import timm

    run: Path = request.getfixturevalue(stem)
    for target, make in (
        ("torchvision", lambda: torchvision.models.resnet18()),
        ("timm", lambda: timm.create_model("resnet18", num_classes=0)),
    ):
        folder = export(run, target)
        assert folder == run / "export" / target
        model = make() if stem == "imagenet" else small_stem(make())
        model.fc = nn.Identity()
        model.load_state_dict(load_file(folder / "model.safetensors"))
        assert_same(model.eval()(IMAGES), run)


def test_timm_loads_the_folder_by_name_with_its_normalisation(imagenet: Path) -> None:
    import timm

    model = timm.create_model(f"local-dir:{export(imagenet, 'timm')}", pretrained=True)
    assert_same(model.eval()(IMAGES), imagenet)
    settings: Any = model.pretrained_cfg
    assert list(settings["mean"]) == ViewsConfig().mean
    assert list(settings["input_size"]) == [3, 32, 32]


def test_a_vision_transformer_keeps_its_options_in_every_export(tmp_path: Path) -> None:
    import timm

    options = ["img_size=32", "patch_size=8", "embed_dim=48", "depth=2", "num_heads=4"]
    own: dict[str, Any] = {
        "stem": "imagenet",
        "options": [*options, "weight_init=moco"],
        "positions": "sincos",
    }
    run = written(tmp_path / "r", backbone="timm/vit_tiny_patch16_224", **own)
    assert len(backbone_of(run).blocks) == 2
    folder, drawn = export(run, "timm"), export(run, "onnx")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert_same(model(IMAGES), run)
    # The number of heads is in no tensor.
    again = find(folder)
    assert again.architecture == find(run).architecture
    assert_same(again.backbone(IMAGES), run)
    assert (
        "| encoder | timm/vit_tiny_patch16_224 with img_size=32, patch_size=8, embed_dim=48, "
        in ((drawn / "README.md").read_text())
    )
    # A folder of timm itself, without the description.
    (folder / "moco_dist.json").unlink()
    foreign = find(folder)
    assert foreign.architecture.options == options
    assert_same(foreign.backbone(IMAGES), run)
    with pytest.raises(ConfigError, match="moco can't hold this encoder"):
        export(run, "moco")


@pytest.mark.parametrize("backbone", ["resnet18", "timm/regnety_002"])
def test_timm_gives_the_folder_a_new_classifier_or_gray_images(
    tmp_path: Path, backbone: str
) -> None:
    import timm

    run = written(tmp_path / "r", stem="imagenet", backbone=backbone)
    folder = f"local-dir:{export(run, 'timm')}"
    plain = timm.create_model(folder, pretrained=True)
    tuned: Any = timm.create_model(folder, pretrained=True, num_classes=10)
    assert tuned.eval()(IMAGES).shape == (3, 10)
    features = tuned.forward_head(tuned.forward_features(IMAGES), pre_logits=True)
    torch.testing.assert_close(features, plain.eval()(IMAGES))
    gray = timm.create_model(folder, pretrained=True, in_chans=1).eval()
    one = IMAGES[:, :1]
    # The filters of the colours are added.
    torch.testing.assert_close(gray(one), plain(one.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)
    data = tuned.pretrained_cfg
    assert (data["crop_pct"], data["input_size"]) == (1.0, [3, 32, 32])


def by_pipeline(folder: Path, pixels: Tensor) -> Tensor:
    from transformers import pipeline

    extractor: Any = pipeline("image-feature-extraction", model=str(folder))
    return torch.tensor(extractor(to_pil_image(pixels), pool=True)).flatten(1)


@pytest.mark.parametrize(
    "changed",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"resample": 2},
    ],
)
def test_images_are_fed_as_transformers_feeds_them(
    imagenet: Path, tmp_path: Path, changed: dict[str, Any]
) -> None:
    folder = export(imagenet, "huggingface", tmp_path / "changed")
    (folder / "moco_dist.json").unlink()  # as of a stranger
    pixels = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    before = moco_dist.load_encoder(folder)(pixels[None])
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    theirs, ours = by_pipeline(folder, pixels), moco_dist.load_encoder(folder)(pixels[None])
    assert float((theirs - ours).abs().max()) < 1e-5 * float(ours.abs().max())
    assert float((before - ours).abs().max()) > 1e-3 * float(ours.abs().max())


@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
def test_the_filter_of_a_run_is_that_of_its_encoder_and_of_its_exports(
    tmp_path: Path, resize: Literal["bicubic", "bilinear"]
) -> None:
    run = written(tmp_path / "r", stem="imagenet", data=DataConfig(resize=resize))
    pixels = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    ours = moco_dist.load_encoder(run)(pixels[None])
    folders = [export(run, target) for target in ("huggingface", "timm", "moco")]
    theirs = by_pipeline(folders[0], pixels)
    assert float((theirs - ours).abs().max()) < 1e-5 * float(ours.abs().max())
    described = json.loads((folders[1] / "config.json").read_text())
    assert described["pretrained_cfg"]["interpolation"] == resize
    for folder in folders:
        assert moco_dist.load_encoder(folder)(pixels[None]).equal(ours)
    for folder in folders[:2]:
        (folder / "moco_dist.json").unlink()
        assert moco_dist.load_encoder(folder)(pixels[None]).equal(ours)


def test_the_pipeline_of_transformers_gives_the_features_of_load_encoder(tmp_path: Path) -> None:
    folder = export(written(tmp_path / "r", stem="imagenet"), "huggingface")
    pixels = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    theirs, ours = by_pipeline(folder, pixels), moco_dist.load_encoder(folder)(pixels[None])
    assert float((theirs - ours).abs().max()) < 1e-5 * float(ours.abs().max())
    (folder / "moco_dist.json").unlink()  # as of a stranger
    again = moco_dist.load_encoder(folder)
    assert (again.view.mean, again.view.size, again.resize) == (ViewsConfig().mean, 32, 32)
    assert again(pixels[None]).equal(ours)


@pytest.mark.parametrize("encoder", [{}, {"backbone": "resnet50", "width": 8}])
def test_transformers_loads_it(tmp_path: Path, encoder: dict[str, Any]) -> None:
    from transformers import ResNetModel

    run = written(tmp_path / "r", stem="imagenet", **encoder)
    folder = export(run, "huggingface")
    loaded: Any = ResNetModel.from_pretrained(folder, output_loading_info=True)
    model, found = loaded
    assert not any(found.values())
    assert_same(model.eval()(IMAGES).pooler_output.flatten(1), run)


def test_onnxruntime_runs_it_on_any_number_of_images(tmp_path: Path) -> None:
    import onnxruntime

    run = written(tmp_path / "narrow", width=8)
    session = onnxruntime.InferenceSession(export(run, "onnx") / "model.onnx")
    ours = backbone_of(run)(IMAGES)
    for rows in (1, 3):
        (theirs,) = session.run(None, {"images": IMAGES[:rows].numpy()})
        torch.testing.assert_close(torch.from_numpy(theirs), ours[:rows], rtol=1e-5, atol=1e-5)


def test_detectron2_gets_its_names_and_every_weight_once(imagenet: Path) -> None:
    """Names are written out for a block of each kind, because detectron2 is not on PyPI."""
    folder = export(imagenet, "detectron2")
    with (folder / "backbone.pkl").open("rb") as file:
        saved = pickle.load(file)
    assert (saved["__author__"], saved["matching_heuristics"]) == ("moco_dist", True)
    own, theirs = backbone_of(imagenet).state_dict(), saved["model"]
    pairs = {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.1.conv2.weight": "layer1.1.conv2.weight",
        "res3.0.shortcut.weight": "layer2.0.downsample.0.weight",
        "res3.0.shortcut.norm.bias": "layer2.0.downsample.1.bias",
        "res5.1.conv1.norm.running_mean": "layer4.1.bn1.running_mean",
    }
    for name, ours in pairs.items():
        assert torch.from_numpy(theirs[name]).equal(own[ours])
    kept = [name for name in own if not name.endswith("num_batches_tracked")]
    assert sorted(map(from_detectron2, theirs)) == sorted(kept)
    assert "DEPTH: 18" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("backbone", "groups", "channels"), [("wide_resnet50_2", 1, 32), ("resnext50_32x4d", 32, 1)]
)
def test_detectron2_is_told_the_depth_and_the_groups(
    tmp_path: Path, backbone: str, groups: int, channels: int
) -> None:
    run = written(tmp_path / "run", backbone=backbone, width=16, stem="imagenet")
    card = (export(run, "detectron2") / "README.md").read_text()
    resnets = yaml.safe_load(card.partition("```yaml\n")[2].partition("```")[0])["MODEL"]["RESNETS"]
    assert (resnets["DEPTH"], resnets["RES2_OUT_CHANNELS"]) == (50, 64)
    assert (resnets["NUM_GROUPS"], resnets["WIDTH_PER_GROUP"]) == (groups, channels)


def test_the_original_scripts_find_both_encoders_and_the_queue(imagenet: Path) -> None:
    path = export(imagenet, "moco") / "model.pth.tar"
    saved = torch.load(path, weights_only=True)
    assert (saved["epoch"], saved["arch"]) == (2, "resnet18")
    tensors, found = saved["state_dict"], checkpoint_of(imagenet)
    assert tensors["module.queue"].equal(found.model["queue.keys"].T)
    assert tensors["module.queue_ptr"].tolist() == [50 % 40]
    for which, ours in (("q", "query"), ("k", "key")):
        model = torchvision.models.resnet18(num_classes=8)
        model.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), model.fc)
        prefix = f"module.encoder_{which}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        model.load_state_dict(own)
        encoder = build_encoder(EncoderConfig(dim=8, stem="imagenet", head="mlp"), 0).eval()
        names = {k: v for k, v in found.model.items() if k.startswith(f"{ours}_encoder.")}
        encoder.load_state_dict({k.partition(".")[2]: v for k, v in names.items()})
        theirs = nn.functional.normalize(model.eval()(IMAGES), dim=1)
        torch.testing.assert_close(theirs, encoder(IMAGES))


@pytest.mark.parametrize(("head", "enqueued"), [("mlp", 93), ("linear", 16)])
def test_moco_to_ours_to_moco_keeps_every_bit(tmp_path: Path, head: str, enqueued: int) -> None:
    """A file made with torchvision is read, written as our checkpoint, read and written back."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for which in ("q", "k"):
        model = torchvision.models.resnet18(num_classes=8)
        nn.init.uniform_(model.bn1.weight)  # as training would have moved it
        if head == "mlp":
            model.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), model.fc)
        tensors |= {f"module.encoder_{which}.{k}": v for k, v in model.state_dict().items()}
    queue = torch.randn(8, 40)
    queue[:, min(enqueued, 40) :] = 0
    tensors |= {"module.queue": queue, "module.queue_ptr": torch.tensor([enqueued % 40])}
    published = {"epoch": 200, "arch": "resnet18", "state_dict": tensors}
    path = tmp_path / "moco.pth.tar"
    torch.save(published, path)
    found = find(path).checkpoint
    saving.write(tmp_path / "ours", 1, found.model, {}, found.state)
    again = export(tmp_path / "ours", "moco") / "model.pth.tar"
    back = torch.load(again, weights_only=True)
    assert (back["epoch"], back["arch"]) == (200, "resnet18")
    assert back["state_dict"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back["state_dict"][name].dtype == tensor.dtype
        assert back["state_dict"][name].equal(tensor), name


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"arch": "vit"}, "its 'arch' is vit, not one of resnet18"),
        ({"state_dict": {}}, "is no state dict, it holds nothing"),
        ({"extra": True}, "module.extra is not expected"),
        ({"missing": True}, "bn1.bias is missing"),
    ],
)
def test_a_file_of_another_kind_is_named(
    imagenet: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    found = checkpoint_of(imagenet)
    content = original.write(found.model, EncoderConfig(head="mlp"), 1, 0)
    if change.pop("extra", False):
        content["state_dict"]["module.extra"] = torch.zeros(1)
    if change.pop("missing", False):
        del content["state_dict"]["module.encoder_q.bn1.bias"]
    torch.save(content | change, tmp_path / "x.pth")
    with pytest.raises(DataError, match=sentence):
        find(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("target", "encoder", "reason"),
    [
        ("torchvision", {"width": 8}, "64 channels in stage 1; use --to onnx"),
        ("timm", {"width": 8}, "64 channels in stage 1"),
        ("moco", {"width": 8}, "64 channels in stage 1"),
        ("huggingface", {"width": 8}, "begin with a 7x7 .*; use --to onnx$"),
        ("huggingface", {}, "begin with a 7x7 .*; use --to timm or onnx$"),
        ("detectron2", {"width": 8}, "begin with a 7x7"),
        ("huggingface", {"backbone": "wide_resnet50_2", "width": 4}, "no wider blocks"),
    ],
)
def test_an_architecture_without_a_place_is_one_sentence(
    tmp_path: Path, target: str, encoder: dict[str, Any], reason: str
) -> None:
    run = written(tmp_path / "r", **encoder)
    with pytest.raises(ConfigError, match=reason):
        export(run, target)
    assert not any((run / "export").glob("*"))


def test_without_the_library_there_is_a_sentence_and_no_file(
    imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for target, module, packages in (
        ("timm", "timm", "timm"),
        ("huggingface", "transformers", "transformers"),
        ("onnx", "onnxruntime", "onnx onnxscript onnxruntime"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingError, match=f"pip install {packages}$"):
            export(imagenet, target, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_not_the_same_is_not_kept(
    imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(found: Found, folder: Path) -> str:
        lines = targets.torchvision(found, folder)
        return lines + "features = features + 1e-3 * features.abs().max()\n"

    monkeypatch.setattr("moco_dist.export.run.TARGETS", {"torchvision": broken})
    with pytest.raises(AssertionError, match="its features differ by"):
        export(imagenet, "torchvision", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_others_is_left_and_an_older_export_is_replaced(
    imagenet: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputError, match="is no export of ours"):
        export(imagenet, "torchvision", tmp_path / "mine")
    for _ in range(2):
        export(imagenet, "torchvision", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_exports_of_files_that_differ_behind_a_dot_stay_apart(tmp_path: Path) -> None:
    tensors = torchvision.models.resnet18().state_dict()
    made: dict[Path, Tensor] = {}
    for name in (
        "epoch=9-loss=0.12.ckpt",
        "epoch=9-loss=0.15.ckpt",
        "m.v1.pth.tar",
        "m.v2.pth.tar",
    ):
        bias = torch.full((64,), float(len(made) + 1))
        torch.save({"state_dict": tensors | {"bn1.bias": bias}}, tmp_path / name)
        made[export(tmp_path / name, "torchvision")] = bias
    assert [folder.name for folder in made] == [
        *("epoch=9-loss=0.12-torchvision", "epoch=9-loss=0.15-torchvision"),
        *("m.v1-torchvision", "m.v2-torchvision"),
    ]
    for folder, bias in made.items():
        assert load_file(folder / "model.safetensors")["bn1.bias"].equal(bias)


def test_the_key_encoder_is_read_or_missed(imagenet: Path) -> None:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    query, key = (moco_dist.load_encoder(imagenet, which)(images) for which in ("query", "key"))
    assert not key.equal(query)
    folders = export(imagenet, "moco"), export(imagenet, "timm", None, "key")
    for folder in folders:
        assert moco_dist.load_encoder(folder, "key")(images).equal(key)
    with pytest.raises(DataError, match="has no key encoder"):
        moco_dist.load_encoder(export(imagenet, "torchvision"), "key")


def test_the_card_has_the_figures_of_this_checkpoint_alone(tmp_path: Path) -> None:
    run = written(tmp_path / "r")
    lines = [{"step": 6, "knn/top1": 0.111}, {"step": 7, "knn/top1": 0.222}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    probed, shares = tmp_path / "r-probe", {TRAINED: 0.4321, CONTROL: 0.1234}
    results = {name: {"test": {"top1": top1}} for name, top1 in shares.items()}
    for which, shown in (("another", False), (fingerprint.of_module(backbone_of(run)), True)):
        saving.write(probed, 3, {"a": torch.zeros(1)}, {}, {"encoder": which})
        (probed / "DONE").write_text(json.dumps(results))
        (probed / "results.json").write_text('{"selected": {"lr": 7.5}}')  # the grid's choice
        card = (export(run, "torchvision") / "README.md").read_text()
        assert "22.2%" in card
        assert "11.1%" not in card
        for words in ("43.21%", "12.34%", "learning rate 7.5"):
            assert (words in card) == shown


def test_a_card_says_without_labels_only_where_that_is_known(tmp_path: Path) -> None:
    known, plain = written(tmp_path / "known"), tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict() | stirred(), plain)
    begun = written(tmp_path / "begun", init_from=str(plain))
    wordings = {
        known: "encoder pretrained without labels by Momentum Contrast with moco_dist: its query",
        begun: "weights in `resnet18.pth`, which may have been trained with labels.",
        plain: "image encoder that moco_dist did not train. Whether it was trained with labels is",
    }
    for source, words in wordings.items():
        folder = export(source, "torchvision", tmp_path / "out" / source.name)
        again = export(folder, "timm", tmp_path / "again" / source.name)
        for card in (folder / "README.md", again / "README.md"):
            text = card.read_text()
            assert words in text, text
            assert ("without labels" in text) == (source == known)
            assert ("self-supervised" in text) == (source == known)


@pytest.mark.parametrize(
    ("keys", "words", "tags"),
    [
        (
            {"negatives": "batch", "keys": "gradient", "symmetric": True},
            "by SimCLR with moco_dist: its encoder\n",
            ["self-supervised", "simclr"],
        ),
        (
            {"negatives": "batch", "keys": "gradient"},
            "by contrastive learning, end to end, with moco_dist: its encoder\n",
            ["self-supervised"],
        ),
        (
            {"negatives": "bank", "keys": "gradient"},
            "by a memory bank with moco_dist: its encoder\n",
            ["self-supervised"],
        ),
        (
            {"negatives": "batch", "symmetric": True},
            "by Momentum Contrast with moco_dist: its query encoder\n",
            ["self-supervised", "moco"],
        ),
    ],
)
def test_a_card_names_the_method(
    tmp_path: Path, keys: dict[str, Any], words: str, tags: list[str]
) -> None:
    config = PretrainConfig(encoder=EncoderConfig(), moco=MocoConfig(**keys))
    network = method(build_encoder(config.encoder, 1), config.moco, seed=1, images=90)
    network.query_encoder.backbone.load_state_dict(stirred(), strict=False)
    state = {"config": to_dict(config), "epoch": 2.5, "data": "0123", "run_id": "a"}
    saving.write(tmp_path / "r", 7, network.state_dict(), {}, state)
    folder = export(tmp_path / "r", "torchvision")
    again = export(folder, "timm", tmp_path / "again")
    for card in (folder / "README.md", again / "README.md"):
        text = card.read_text()
        assert f"pretrained without labels {words}" in text
        assert yaml.safe_load(text.split("---")[1])["tags"] == tags


def test_the_views_of_an_export_are_found_wherever_it_is_named(imagenet: Path) -> None:
    for target in ("torchvision", "timm", "huggingface", "moco"):
        folder = export(imagenet, target)
        (file,) = (each for each in folder.iterdir() if each.name.startswith("model."))
        renamed, own = folder / f"mine{file.suffix}", find(imagenet)
        assert own.views is not None
        for path in (folder, file, renamed):
            if path == renamed:
                file.rename(renamed)
            found = find(path)
            assert (found.views, found.resize) == (own.views, own.resize), path
            assert found.backbone(IMAGES).equal(own.backbone(IMAGES))


def test_the_command_exports_and_says_what_is_wrong(
    imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run([str(imagenet), "--to", "torchvision", "--output", str(out)]) == 0
    assert (out / "README.md").is_file()
    assert run([str(imagenet), "--to", "keras"]) == 78
    assert "invalid choice: 'keras'" in capsys.readouterr().err
    assert run([str(tmp_path / "none"), "--to", "timm"]) == 66
    assert run([str(imagenet), "--to", "moco", "--encoder", "key"]) == 78
