"""What the package brings along is found from any folder, and its commands are the modules."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from moco_dist import console_commands, packaged
from moco_dist.config import PretrainConfig
from moco_dist.config_files import load

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


def test_the_place_of_each_file_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert packaged.run(["launch/two_cpus.yaml"]) == 0
    assert capsys.readouterr().out == f"{ROOT / 'launch/two_cpus.yaml'}\n"
    assert packaged.run(["launch/none.yaml"]) == 66
    assert packaged.config("pretrain/../../pyproject") is None


def test_every_console_command_is_there_and_starts_its_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []
    monkeypatch.setattr("runpy.run_module", lambda name, **_: started.append(name))
    for command, target in PROJECT["scripts"].items():
        module, _, name = target.partition(":")
        assert command == f"moco-{name}"
        assert module == console_commands.__name__
        getattr(importlib.import_module(module), name)()
        assert started.pop() == f"moco_dist.{name}"


@pytest.mark.slow
def test_the_wheel_has_configurations_and_launch_files_and_passes_twine(tmp_path: Path) -> None:
    """In an isolated environment, for which hatchling is fetched."""
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    files = sorted(map(str, tmp_path.iterdir()))
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    for name in packaged.files():
        if name.endswith((".yaml", ".sbatch", ".sh")):
            assert f"moco_dist/packaged_files/{name}" in inside
    environment = tmp_path / "installed"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(environment)]
    subprocess.run([sys.executable, *install, str(wheel)], check=True)
    code = "from moco_dist import packaged; print(packaged.config('pretrain/demo'))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(environment)},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = environment / "moco_dist/packaged_files/configs/pretrain/demo.yaml"
    assert found.stdout == f"{expected}\n"
