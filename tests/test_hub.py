"""An encoder on the hub is that of the run, sent in one commit, or not sent with one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from torchvision.transforms.v2.functional import to_pil_image

import moco_dist
from moco_dist.export import hub
from moco_dist.export.run import run
from tests.hub_server import HubServer
from tests.test_export import IMAGES, backbone_of, written

# What a user of another machine does: paste the code of the card, or use the Auto classes.
LOADING = """\
import re, sys
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoImageProcessor, AutoModel

saved = torch.load(sys.argv[1], weights_only=False)
found = {}
for name in saved["names"]:
    card = open(hf_hub_download(name, "README.md")).read()
    (code,) = re.findall(r"```python\\n(.*?)```", card, re.DOTALL)
    names = {"images": saved["images"]}
    exec(code, names)
    found[name] = names["features"].detach()
processor = AutoImageProcessor.from_pretrained("me/h")
pixels = processor(saved["picture"], return_tensors="pt")["pixel_values"]
found["auto"] = AutoModel.from_pretrained("me/h").eval()(pixels).pooler_output.flatten(1).detach()
torch.save(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("runs") / "im", stem="imagenet")


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("runs") / "cifar")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub where somebody is logged in."""
    with HubServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        # The library has read its environment when it was imported.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield server


def test_what_others_load_from_the_hub_has_the_features_of_the_run(
    server: HubServer, imagenet: Path, cifar: Path, tmp_path: Path
) -> None:
    sent = {"me/h": (imagenet, "huggingface"), "me/t": (imagenet, "timm")}
    sent |= {"team/c": (cifar, "timm")}  # whose stem timm does not have
    for name, (source, target) in sent.items():
        assert run([str(source), "--to", target, "--push", name, "--yes"]) == 0
        # .gitattributes of the new repository, and then everything at once.
        assert len(server.repositories[name].commits) == 2
        assert server.repositories[name].private
    libraries = {n: yaml.safe_load(card(server, n).split("---\n")[1]) for n in sent}
    assert libraries["me/h"]["library_name"] == "transformers"
    assert libraries["me/t"]["pipeline_tag"] == "image-feature-extraction"
    assert "hf-hub:me/t" in card(server, "me/t")
    assert str(tmp_path.parent) not in card(server, "team/c")  # no path of this machine

    pixels = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    asked = {"names": list(sent), "images": IMAGES, "picture": to_pil_image(pixels)}
    torch.save(asked, tmp_path / "asked.pt")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOADING, str(tmp_path / "asked.pt"), str(tmp_path / "f.pt")]
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=tmp_path)
    found = torch.load(tmp_path / "f.pt")
    ours = {name: backbone_of(source)(IMAGES) for name, (source, _) in sent.items()}
    ours["auto"] = moco_dist.load_encoder(imagenet)(pixels[None])
    for name, features in ours.items():
        assert float((found[name] - features).abs().max()) < 1e-5 * float(features.abs().max())


def card(server: HubServer, name: str) -> str:
    return server.repositories[name].commits[-1][1]["README.md"].decode()


def test_without_yes_it_lists_and_sends_nothing(
    server: HubServer, cifar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([str(cifar), "--to", "torchvision", "--push", "c"]) == 0
    said = capsys.readouterr().out
    size = (cifar / "export/torchvision/model.safetensors").stat().st_size
    assert f"{server.url}/me/c: private, new" in said
    assert f"adds model.safetensors ({size:,} bytes)" in said
    assert "nothing was sent" in said
    assert not server.repositories
    assert {asked.split()[0] for asked in server.asked} == {"GET"}


def test_an_older_export_is_replaced_whole_and_files_of_others_stay(
    server: HubServer, cifar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push = [str(cifar), "--to", "torchvision", "--push", "c", "--yes"]
    assert run([*push, "--public"]) == 0
    repository = server.repositories["me/c"]
    assert not repository.private
    more = {"model.onnx": b"of before", "figure.png": b"of a person"}
    repository.commit(repository.commits[-1][1] | more)
    capsys.readouterr()
    assert run(push) == 0  # which is public already
    said = capsys.readouterr().out
    assert "me/c: public, there" in said
    assert "removes model.onnx" in said
    assert "keeps figure.png" in said
    assert repository.commits[-1][1].keys() == {
        *(".gitattributes", "figure.png"),
        *(file.name for file in (cifar / "export/torchvision").iterdir()),
    }


@pytest.mark.parametrize(
    ("name", "environment", "fails", "status", "sentence"),
    [
        ("a--b", {}, {}, 78, "--push a--b can't name a repository: give NAME or OWNER/NAME of"),
        ("c", {"HF_TOKEN": ""}, {}, 77, "nobody is logged in to the hub; run hf auth login"),
        ("c", {"HF_TOKEN": "hf_old"}, {}, 77, "the hub does not know this login; run hf auth"),
        ("you/c", {}, {}, 77, "can't create it under you; give a name under me or team"),
        ("c", {"HF_TOKEN": "hf_reads"}, {}, 77, "reader/c: this login may not write there (You"),
        ("c", {}, {"whoami": (503, "maintenance")}, 69, "the hub can't be reached (maintenance)"),
        ("c", {}, {"create": (402, "pay first")}, 74, "the hub refused it (402: pay first)"),
        ("c", {}, {"/upload/": (403, "no")}, 77, "no file was sent; me/c was created and is empty"),
        ("c", {}, {"/commit/": (500, "oh")}, 69, "me/c was created and is empty; the hub can't be"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence_and_leaves_no_file(
    server: HubServer,
    cifar: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    environment: dict[str, str],
    fails: dict[str, tuple[int, str]],
    status: int,
    sentence: str,
) -> None:
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    server.fails = fails
    assert run([str(cifar), "--to", "torchvision", "--push", name, "--yes"]) == status
    captured = capsys.readouterr()
    (line,) = (line for line in captured.err.splitlines() if line.startswith("error: "))
    assert sentence in line
    assert "hf_" not in captured.out + captured.err.replace("HF_", "")
    assert all(len(found.commits) == 1 for found in server.repositories.values())


def test_a_hub_that_is_not_there_or_not_wanted_is_one_sentence(
    server: HubServer, cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, because the library reads both variables when it is imported."""
    for key, value, words in (
        ("HF_ENDPOINT", "http://127.0.0.1:9", "the hub can't be reached ("),
        ("HF_HUB_OFFLINE", "1", "HF_HUB_OFFLINE is set; unset it to upload"),
    ):
        code = f"from moco_dist.export import hub; hub.find('c', False) or {key!r}"
        found = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {key: value},
            capture_output=True,
            text=True,
        )
        assert f"UnavailableError: --push c: {words}" in found.stderr


def test_a_repository_that_is_no_export_is_left_alone(server: HubServer, cifar: Path) -> None:
    command = [str(cifar), "--to", "torchvision", "--push", "c", "--yes"]
    assert run(command) == 0
    repository = server.repositories["me/c"]
    assert run([*command, "--public"]) == 78  # it is private, and stays so
    repository.commit({"model.safetensors": b"of a person"})
    assert run(command) == 74
    assert repository.commits[-1][1] == {"model.safetensors": b"of a person"}


def test_a_change_since_the_plan_and_a_file_that_did_not_arrive_are_named(
    server: HubServer, cifar: Path
) -> None:
    assert run([str(cifar), "--to", "torchvision", "--push", "c", "--yes"]) == 0
    repository, folder = server.repositories["me/c"], cifar / "export/torchvision"
    planned = hub.find("c", public=False)
    repository.commit(repository.commits[-1][1] | {"other.txt": b""})
    with pytest.raises(hub.UnavailableError, match="somebody else changed it"):
        planned.push(folder)
    assert "other.txt" in repository.commits[-1][1]
    server.ignored = {"model.safetensors"}
    with pytest.raises(hub.OutputError, match=r"model.safetensors did not arrive in http"):
        hub.find("d", public=False).push(folder)
