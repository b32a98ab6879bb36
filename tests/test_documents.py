"""The commands of the pages beside the configurations are ones that the program takes."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import flat, load, to_dict
from moco_dist.export import run
from moco_dist.export.targets import TARGETS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "configs").glob("*.md"))
SCHEMAS: dict[str, Any] = {
    "pretrain": PretrainConfig,
    "probe": ProbeConfig,
    "doctor": PretrainConfig,
}


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of the commands in a page's blocks of bash."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_commands_of_a_page_are_taken(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported: list[Any] = []

    def note(*arguments: Any) -> Path:
        exported.append(arguments)
        return page.parent

    monkeypatch.setattr(run, "export", note)
    found = list(commands(page))
    assert found
    for words in found:
        if "-m" not in words:
            _check_script(words)
            continue
        module = words[words.index("-m") + 1].removeprefix("moco_dist.")
        if module.startswith("tests."):
            assert importlib.util.find_spec(module)
            continue
        arguments = words[words.index("-m") + 2 :]
        if module == "export":
            assert run.run(arguments) == 0
            assert exported[-1][1] in TARGETS
        else:
            load(SCHEMAS[module], arguments)


def _check_script(words: list[str]) -> None:
    """Check a command of a file of launch/: of record.sh its table and the keys as well."""
    files = [word.rpartition("=")[2] for word in words if "launch/" in word]
    assert files
    assert all((ROOT / file).is_file() for file in files)
    if "launch/record.sh" in words:
        first, others = words.index("launch/record.sh") + 2, words.index("--")
        load(PretrainConfig, words[first:others])
        load(ProbeConfig, words[others + 1 :])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    known = flat(to_dict(PretrainConfig())).keys() | flat(to_dict(ProbeConfig())).keys()
    named = re.findall(r"\b([a-z]+\.[a-z_]+)(?==)", page.read_text())
    assert named
    assert set(named) <= known


def test_the_table_of_settings_is_what_the_files_say() -> None:
    rows = re.findall(r"^\| (.+) \|$", (ROOT / "configs/README.md").read_text(), re.MULTILINE)
    header = [cell.strip("` ") for cell in rows[0].split(" | ")]
    runs = {name: load(PretrainConfig, [f"pretrain/{name}"]) for name in header[1:5]}
    for row in rows[2:11]:
        key, *cells = [cell.strip("` ") for cell in row.split(" | ")]
        for name, cell in zip(runs, cells, strict=False):
            value = flat(to_dict(runs[name]))[key]
            assert type(value)(cell) == value, f"{key} of {name}: {cell}"
