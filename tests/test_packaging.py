"""What the package brings along is found from any folder, and its commands are the modules."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from moco_dist import packaged
from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import load
from tests import image_sets

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    "name", ["pretrain/demo", "pretrain/demo.yaml", "configs/pretrain/demo.yaml"]
)
def test_a_configuration_is_found_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = load(PretrainConfig, [str(ROOT / "configs/pretrain/demo.yaml")])
    assert load(PretrainConfig, [name]) == expected != load(PretrainConfig, [])


def test_a_file_here_comes_before_the_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/pretrain").mkdir(parents=True)
    (tmp_path / "configs/pretrain/demo.yaml").write_text("epochs: 3\n")
    assert load(PretrainConfig, ["configs/pretrain/demo.yaml"]).epochs == 3


def test_configurations_that_another_package_installs_are_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in site-packages, where many a project leaves a folder `configs`."""
    own = tmp_path / "moco_dist" / "packaged_files" / "configs" / "pretrain" / "a.yaml"
    other = tmp_path / "configs" / "pretrain" / "a.yaml"
    for file, seed in ((own, 1), (other, 2)):
        file.parent.mkdir(parents=True)
        file.write_text(f"seed: {seed}\n")
    monkeypatch.setattr(packaged, "__file__", str(tmp_path / "moco_dist" / "packaged.py"))
    assert load(PretrainConfig, ["pretrain/a"]).seed == 1
    assert packaged.files() == ["configs/pretrain/a.yaml"]
    own.parents[2].rename(tmp_path / "gone")  # as in a clone
    assert load(PretrainConfig, ["pretrain/a"]).seed == 2


def test_the_place_of_each_file_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert packaged.run(["launch/two_cpus.yaml"]) == 0
    assert capsys.readouterr().out == f"{ROOT / 'launch/two_cpus.yaml'}\n"
    assert packaged.run(["launch/none.yaml"]) == 66
    assert packaged.config("pretrain/../../pyproject") is None


@pytest.mark.parametrize("command", PROJECT["scripts"])
def test_a_console_command_is_the_main_of_its_module(command: str) -> None:
    package = command.removeprefix("moco-")
    target = PROJECT["scripts"][command]
    assert target == f"moco_dist.{package}.__main__:main"
    module, _, name = target.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_every_command_of_the_package_is_a_console_command() -> None:
    commands = {path.parent.name for path in (ROOT / "moco_dist").glob("*/__main__.py")}
    assert {f"moco-{command}" for command in commands} == set(PROJECT["scripts"])


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean clone, as far as it is committed."""
    folder = tmp_path_factory.mktemp("clone") / "moco_dist"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def built(clone: Path) -> Path:
    """The folder with sdist and wheel, built in an environment for which hatchling is fetched."""
    subprocess.run([sys.executable, "-m", "build", str(clone)], check=True, capture_output=True)
    return clone / "dist"


def installed(source: Path, folder: Path) -> Path:
    """Return the programs of a new environment with the package alone, and our libraries behind."""
    venv.create(folder, with_pip=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["-m", "pip", "install", "--quiet", "--no-deps", str(source)]
    subprocess.run([str(folder / "bin/python"), *install], check=True, env=plain())
    return folder / "bin"


def plain() -> dict[str, str]:
    """Return an environment in which nothing but the new one has the package."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return kept | {"ACCELERATE_USE_CPU": "true", "WANDB_MODE": "disabled"}


def started(programs: Path, folder: Path, command: str) -> str:
    """Return what a console command prints, launched in `folder`."""
    name, *arguments = command.split()
    words, piped = [str(programs / name), *arguments], subprocess.PIPE
    done = subprocess.run(words, cwd=folder, env=plain(), stdout=piped, stderr=piped, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_sdist_and_wheel_pass_twine_and_hold_configurations_and_launch_files(built: Path) -> None:
    files = sorted(map(str, built.iterdir()))
    assert len(files) == 2
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
    (wheel,) = built.glob("*.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    for name in packaged.files():
        assert f"moco_dist/packaged_files/{name}" in inside
    assert not [name for name in inside if name.startswith("tests")]


@pytest.mark.slow
def test_the_installed_commands_work_from_any_folder(built: Path, tmp_path: Path) -> None:
    """From a folder of images on: doctor, pretraining, probe, export and report."""
    (wheel,) = built.glob("*.whl")
    programs = installed(wheel, tmp_path / "environment")
    folder = tmp_path / "elsewhere"
    image_sets.write_folder(folder / "images", 24)
    data = "data.name=folder data.root=images data.cache=cache data.size=16 views.size=16"
    small = "batch_size=16 epochs=1 data.validation=0.3 runtime.device=cpu"
    run = f"pretrain/cifar10 name=mine {data} {small} moco.queue_size=16 knn.every_epochs=1"
    assert "mine" in started(programs, folder, f"moco-doctor {run}")
    started(programs, folder, f"moco-pretrain {run}")
    probe = f"probe/cifar10 encoder=runs/mine {data} {small} top_k=2 optim.lr=1"
    assert "top-1" in started(programs, folder, f"moco-probe {probe}")
    started(programs, folder, "moco-export runs/mine --to torchvision")
    started(programs, folder, "moco-report runs/mine --quick")
    for made in ("mine/export/torchvision/model.safetensors", "mine/report/report.html"):
        assert (folder / "runs" / made).is_file()
    found = started(programs, folder, "python -m moco_dist.packaged launch/two_cpus.yaml")
    inside = "site-packages/moco_dist/packaged_files/launch/two_cpus.yaml"
    assert found.strip().endswith(inside)
    assert Path(found.strip()).is_file()
    code = "import moco_dist; print(moco_dist.load_encoder('runs/mine').view.size)"
    (folder / "load.py").write_text(code)
    assert started(programs, folder, "python load.py") == "16\n"


@pytest.mark.slow
def test_a_clean_clone_is_installed_by_pip(clone: Path, tmp_path: Path) -> None:
    programs = installed(clone, tmp_path / "environment")
    for command in PROJECT["scripts"]:
        assert started(programs, tmp_path, f"{command} --help")
    found = started(programs, tmp_path, "python -m moco_dist.packaged configs/pretrain/demo.yaml")
    assert str(tmp_path / "environment") in found
