"""The structure of the package: imports point down its floors, and files are short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moco_dist.runs.record import Metric

PACKAGE = Path(__file__).parent.parent / "moco_dist"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

# From the ground up: a folder imports only from itself and from lower floors.
FLOORS = (
    {"errors", "randomness"},
    {"packaged", "distributed"},
    {"config"},
    {"method", "runs"},
    {"data", "tracking"},
    {"encoders"},
    {"pretrain", "probe", "export"},
    {"report", "doctor", "bench", "notebook"},
)
OWNERS = {  # the only files that import a library
    "torch.distributed": {"distributed/comms.py", "distributed/torchrun.py"},
    "yaml": {"config/yaml_files.py"},
    "wandb": {"tracking/wandb_run.py"},
    "matplotlib": {"report/figures.py", "report/pictures.py"},
}
# Modules that must start quickly, on a login node, in a worker or in a job script: without PyTorch.
LIGHT = ("report.run", "runs.slurm_job", "packaged", "config.yaml_files", "data.image_worker")


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path) -> set[str]:
    """Return the modules, and the names in modules, that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=place)
def test_imports_go_down(path: Path) -> None:
    floors = {name: number for number, names in enumerate(FLOORS) for name in names}
    here = place(path).removesuffix(".py").split("/")[0]
    for module in imports(path):
        package, there, *_ = f"{module}.".split(".")
        if package == "moco_dist" and there not in ("", here):
            assert floors[there] < floors[here], f"{place(path)} imports {module}"


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_has_one_door(library: str) -> None:
    users = {
        place(path)
        for path in FILES
        if any(f"{module}.".startswith(f"{library}.") for module in imports(path))
    }
    assert users == OWNERS[library]


@pytest.mark.parametrize("module", LIGHT)
def test_what_must_start_quickly_loads_no_torch(module: str) -> None:
    heavy = {"torch", "accelerate", "matplotlib"}
    code = f"import sys, moco_dist.{module}; print(sorted({heavy!r} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize("path", FILES, ids=place)
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


def test_every_metric_in_the_code_is_one_that_runs_log() -> None:
    name = re.compile(r"(train|similarity|queue|health|knn|probe|control|system)/\w+")
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and name.fullmatch(text):
                assert text in set(Metric), f"{place(path)}: {text}"


def test_no_file_is_a_drawer_and_none_at_the_root_hides_the_standard_library() -> None:
    drawers = {"utils", "common", "helpers", "base", "core", "misc"}
    assert not {path.stem for path in FILES} & drawers
    assert not {path.stem for path in PACKAGE.glob("*.py")} & set(sys.stdlib_module_names)


def test_few_files_know_the_queue() -> None:
    """What a mechanism keeps is asked of its settings and of its model, not looked up."""
    word = re.compile(r"queue_size|KeyQueue|\.queue\b|[\"']queue[\"']|\bQUEUE_|\benqueued")
    known = {place(path) for path in FILES if word.search(path.read_text())}
    assert known <= {
        *("config/moco.py", "method/key_queue.py", "method/moco.py", "pretrain/mechanisms.py"),
        *("pretrain/figures.py", "runs/record.py"),
        *("encoders/original.py", "bench/textbook.py"),  # other people's MoCo
    }
