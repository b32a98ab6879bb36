"""What README and the pages of docs/ say is so: commands, links, settings and public names."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import moco_dist
from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.config.yaml_files import flat, load, to_dict
from moco_dist.export.targets import TARGETS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "slurm/README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = (ROOT / "configs", ROOT / "launch", ROOT / "slurm")
SCRIPTS = sorted(path for folder in FOLDERS for path in folder.rglob("*.*") if path.is_file())
PACKAGE = [*(ROOT / "moco_dist").rglob("*.py"), *(ROOT / "moco_dist").rglob("*.jinja")]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *SCRIPTS, *sorted(PACKAGE)]
SCHEMAS: dict[str, Any] = {"pretrain": PretrainConfig, "probe": ProbeConfig}
SCHEMAS |= {"doctor": PretrainConfig, "bench": PretrainConfig}
# Words that are never right here, where others are.
IDIOMS = (
    *("leaves with", "way out", "has no say", "comes forward", " beside ", "exit state", "anew"),
    *("no matter", "maybe", "are taken as they stand", "is told who"),
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of the commands in a page's blocks of bash."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                if words := shlex.split(part, comments=True):
                    yield words


# Options without a value.
ALONE = ("--all-files", "--bn-leak", "--quick", "--text", "--follow", "--yes", "--public")


def check_arguments(module: str, words: list[str]) -> None:
    """Check the arguments of a command of ours: options against its help, keys by loading them."""
    text = importlib.import_module(f"moco_dist.{module}.run").__doc__ or ""
    given, rest = list[str](), iter(words)
    for word in rest:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", text), f"{module} has no {word}"
            value = "" if word in ALONE else next(rest)
            assert word != "--to" or value in TARGETS
        else:
            given.append(word)
    if module in SCHEMAS:
        load(SCHEMAS[module], [word for word in given if not word.startswith("runs/")])


def check_script(words: list[str]) -> None:
    """Check a command with a script: that it is there, and what it passes on to ours."""
    place = next(n for n, word in enumerate(words) if re.match(r"(launch|slurm|tests|docs)/", word))
    script, (first, _, second) = words[place], (" ".join(words[place + 1 :]).partition(" -- "))
    assert (ROOT / script).is_file()
    kind = {"slurm/probe.sbatch": "probe"}.get(script, "pretrain")
    if script == "launch/record.sh":
        first = first.removeprefix("DIR")
    if re.search("record.sh|pretrain|probe|pipeline", script):
        load(SCHEMAS[kind], first.split())
        load(ProbeConfig, second.split())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_are_taken(page: Path) -> None:
    for block in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    for words in commands(page):
        files = [word for word in words if re.match(r"(launch|configs)/.*\.(yaml|txt)$", word)]
        assert all((ROOT / file).is_file() for file in files), files
        if "-m" in words:
            module, *arguments = words[words.index("-m") + 1 :]
            if module.startswith("moco_dist."):
                check_arguments(module.removeprefix("moco_dist."), arguments)
            else:
                assert module.startswith("tests.")
                assert importlib.util.find_spec(module)
        elif any(re.match(r"(launch|slurm|tests|docs)/", word) for word in words):
            check_script(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    known = flat(to_dict(PretrainConfig())).keys() | flat(to_dict(ProbeConfig())).keys()
    named = re.findall(r"(?<![\w./-])([a-z]+\.[a-z_]+)(?==)", page.read_text())
    assert set(named) <= known


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_every_link_and_picture_of_a_page_is_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in link:
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_every_page_can_be_found_from_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= set(re.findall(r"\((\w+\.md)\)", index))


def test_readme_is_short() -> None:
    assert len(README.read_text().split()) < 1100


@pytest.mark.parametrize("text", TEXTS, ids=name_of)
def test_the_english_is_idiomatic(text: Path) -> None:
    words = " ".join(text.read_text().lower().replace("#", " ").split())
    assert not [idiom for idiom in IDIOMS if idiom in words]


def test_the_citation_has_what_its_format_requires() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == moco_dist.__version__
    for work in (cited, *cited["references"]):
        assert work["title"]
        assert all({"name"} <= set(a) or {"family-names"} <= set(a) for a in work["authors"])
    assert cited["message"]


def test_public_names_are_there_and_load_no_torch_before_they_are_used() -> None:
    code = "import sys, moco_dist; dir(moco_dist); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
    for name in moco_dist.__all__:
        assert getattr(moco_dist, name) is not None
    listed = set(re.findall(r"`(\w+)`", (ROOT / "docs/quickstart.md").read_text()))
    assert set(moco_dist.__all__) <= listed
    with pytest.raises(AttributeError):
        moco_dist.pretrain_run  # noqa: B018


def run_python(code: list[str], folder: Path) -> str:
    """Return what Python prints in `folder`, where warnings are errors."""
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_quickstart_learns(tmp_path: Path) -> None:
    printed = run_python(["-W", "error", str(ROOT / "docs/quickstart.py")], tmp_path)
    before, after = (
        [float(number) for number in re.findall(r"([\d.]+)%", line)]
        for line in printed.splitlines()
    )
    # Accuracies of 500 images: the difference of two has a standard error below 3 points.
    assert after[0] > before[0] + 9  # kNN
    assert after[1] > before[1] + 9  # linear probe


def test_runs_from_python_end_as_the_commands_do(tmp_path: Path) -> None:
    (block,) = (b for b in blocks(ROOT / "docs/quickstart.md", "python") if "run_probe" in b)
    printed = run_python(["-c", block], tmp_path)
    for run in ("small", "small-probe"):
        assert '"state": "done"' in (tmp_path / "runs" / run / "status.json").read_text()
    verdict = (tmp_path / "runs/small-probe/results.json").read_text()
    assert printed.splitlines()[-1] in yaml.safe_load(verdict)["verdict"]


def test_the_tables_of_settings_are_what_the_files_say() -> None:
    found = re.findall(r"(?:^\|.+\|\n)+", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE)
    tables = [
        [[cell.strip("` ") for cell in row.strip("|").split("|")] for row in table.splitlines()]
        for table in found
        if table.startswith("| Key ")
    ]
    assert [len(table) for table in tables] == [11, 12]
    for (header, _, *rows), columns in zip(tables, (4, 4), strict=True):
        names = header[1 : 1 + columns]
        for name in names:
            values = flat(to_dict(load(PretrainConfig, [f"pretrain/{name}"])))
            for row in rows:
                key, cell = row[0], row[header.index(name)]
                given = flat(to_dict(load(PretrainConfig, [f"pretrain/{name}", f"{key}={cell}"])))
                assert given == values, f"{key} of {name}: {cell}"
