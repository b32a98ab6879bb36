"""The shell scripts, the Accelerate files and the texts beside the package hold what they claim."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

ROOT = Path(__file__).resolve().parents[1]
NOT_OURS = {".git", ".venv", "runs", "data", "wandb", "build", "dist", "__pycache__"}
BASH = shutil.which("bash") or "bash"
TOOLS = ("bash", "cat", "chmod", "cksum", "cp", "dirname", "mkdir", "mv", "rm")

# Machines and processes of each file in launch/.
ACCELERATE_FILES = {
    "one_gpu.yaml": (1, 1),
    "eight_gpus.yaml": (1, 8),
    "several_nodes.yaml": (2, 8),
    "two_cpus.yaml": (1, 2),
}

# This one, under the name python3.
REAL_PYTHON = f'''#!{BASH}
exec "{sys.executable}" "$@"
'''

# An interpreter that makes a venv with a pip; it logs "venv", and what pip is asked to install.
FAKE_PYTHON = """#!{bash}
case "$*" in
    "-m venv --clear .venv")
        rm -rf .venv
        mkdir -p .venv/bin
        cp "$0" .venv/bin/python
        echo "echo pip 25.0 from $PWD/.venv/lib/pip" > .venv/bin/pip
        chmod +x .venv/bin/pip
        echo venv >> log ;;
    "-m pip install "*)
        echo "${{@: -1}}" >> log
        exit "${{PIP_STATUS:-0}}" ;;
    *print*) echo 3.12 ;;
esac
"""


def our_files() -> Iterator[Path]:
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_OURS and "cache" not in name]
        yield from (Path(folder, name) for name in names)


def shell_scripts() -> list[Path]:
    return [p for p in our_files() if p.suffix in {".sh", ".sbatch"}] + [ROOT / ".ci/run"]


class Checkout:
    """A copy of the scripts in a folder whose PATH holds a few shell tools and nothing else."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bin = root / "bin"
        self.bin.mkdir(parents=True)
        shutil.copytree(ROOT / "launch", root / "launch")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, root)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or tool)

    def add_python(self, text: str) -> None:
        python = self.bin / "python3"
        python.write_text(text)
        python.chmod(0o755)

    def prepare(self, wish: str = ".", **environment: str) -> subprocess.CompletedProcess[str]:
        """Source environment.sh as demo.sh and test.sh do, from another folder."""
        source = 'source "$1/launch/environment.sh" "$2"'
        return subprocess.run(
            [BASH, "-euo", "pipefail", "-c", source, "test.sh", str(self.root), wish],
            env={"PATH": str(self.bin)} | environment,
            cwd="/",
            capture_output=True,
            text=True,
        )

    def installed(self) -> list[str]:
        """Return what was made and installed since the last call."""
        log = self.root / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "a folder")


def assert_gives_up(result: subprocess.CompletedProcess[str], sentence: str) -> None:
    assert result.returncode == 69
    assert result.stderr.count("\n") == 1, result.stderr
    assert re.match(f"error: {sentence}", result.stderr), result.stderr


@pytest.mark.parametrize("script", shell_scripts(), ids=lambda p: str(p.relative_to(ROOT)))
def test_shell_script_parses_and_is_short(script: Path) -> None:
    subprocess.run([BASH, "-n", script], check=True)
    assert len(script.read_text().splitlines()) < 50


def test_every_accelerate_file_is_listed_here() -> None:
    assert {path.name for path in (ROOT / "launch").glob("*.yaml")} == set(ACCELERATE_FILES)


@pytest.mark.parametrize("name", ACCELERATE_FILES)
def test_accelerate_file_loads_and_starts_the_processes_it_claims(name: str) -> None:
    path = ROOT / "launch" / name
    machines, processes = ACCELERATE_FILES[name]
    config = load_config_from_file(str(path))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    several = DistributedType.MULTI_GPU if processes > 1 else DistributedType.NO
    assert (config.distributed_type, config.mixed_precision) == (several, "no")
    command = f"accelerate launch --config_file launch/{name} \\\n"
    assert command in path.read_text(), "the header holds the command"


def test_missing_python_is_one_sentence(checkout: Checkout) -> None:
    assert_gives_up(checkout.prepare(), "there is no 'python3' on the PATH; install Python 3.11")
    assert_gives_up(checkout.prepare(PYTHON="python3.99"), "there is no 'python3.99'")


def test_python_that_is_too_old_is_one_sentence(checkout: Checkout) -> None:
    checkout.add_python(REAL_PYTHON)
    stub = checkout.root / "sitecustomize.py"
    stub.write_text('import sys\nsys.version_info = (3, 9, 2, "final", 0)\n')
    result = checkout.prepare(PYTHONPATH=str(checkout.root))
    assert_gives_up(result, r"'python3' is Python 3\.9, which is too old; install Python 3.11")


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_missing_venv_module_is_one_sentence(checkout: Checkout, module: str) -> None:
    checkout.add_python(REAL_PYTHON)
    (checkout.root / f"{module}.py").write_text("raise ImportError\n")
    result = checkout.prepare(PYTHONPATH=str(checkout.root))
    assert_gives_up(result, r"Python 3\.\d+ has no venv module; on Debian: apt install")
    assert not (checkout.root / ".venv").exists()


def test_a_gpu_check_of_no_such_name_is_no_success(tmp_path: Path) -> None:
    own = {"GPU_CHECK_PYTHON": sys.executable, "GPU_CHECK_ONLY": "grahp"}
    done = subprocess.run(
        [BASH, str(ROOT / "launch" / "gpu_check.sh"), str(tmp_path / "file.json")],
        env=os.environ | own,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 78
    assert done.stderr.startswith(
        "error: GPU_CHECK_ONLY=grahp is in no name of a check: GPU against"
    )


def test_environment_is_made_once_for_each_state_of_the_project(checkout: Checkout) -> None:
    checkout.add_python(FAKE_PYTHON.format(bash=BASH))
    first = checkout.prepare()
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout.startswith("installing into .venv")
    assert checkout.installed() == ["venv", "."]
    again = checkout.prepare()
    assert (again.returncode, again.stdout, checkout.installed()) == (0, "", [])
    checkout.prepare(".[dev]")
    assert checkout.installed() == [".[dev]"]
    checkout.prepare(".")
    assert checkout.installed() == [], "what serves the tests serves the demo"
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    checkout.prepare()
    assert checkout.installed() == ["."]


def test_broken_environment_is_made_anew(checkout: Checkout) -> None:
    checkout.add_python(FAKE_PYTHON.format(bash=BASH))
    checkout.prepare()
    checkout.installed()
    for damage in ("killed while installing", "no pip", "moved"):
        if damage == "moved":
            checkout.root = checkout.root.rename(checkout.root.with_name("another"))
            checkout.bin = checkout.root / "bin"
        elif damage == "no pip":
            (checkout.root / ".venv/bin/pip").unlink()
        else:
            (checkout.root / ".venv/installing").touch()
        checkout.prepare()
        assert checkout.installed() == ["venv", "."], damage


def test_failed_installation_is_one_sentence_and_is_tried_again(checkout: Checkout) -> None:
    checkout.add_python(FAKE_PYTHON.format(bash=BASH))
    assert_gives_up(checkout.prepare(PIP_STATUS="1"), "pip can't install the packages")
    assert checkout.installed() == ["venv", "."]
    checkout.prepare()
    assert checkout.installed() == ["."], "the same .venv is filled"


def test_continuous_integration_runs_the_test_script_and_the_other_sets() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    commands = [line for line in lines if line.startswith("bash ")]
    sets = [f"bash tests/{name}/test.sh" for name in ("slurm", "browser")]
    assert commands == ["bash launch/test.sh", *sets]


def test_contributing_is_under_forty_lines() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 40


def test_no_file_names_a_package_registry() -> None:
    hosts = re.compile(r"pypi\.|pythonhosted\.|download\.pytorch\.|anaconda\.(?:org|com)")
    assert [p for p in our_files() if hosts.search(p.read_text(errors="ignore"))] == []
