"""The cut of the package: who imports what, and files that can be read in one sitting."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "moco_dist"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 350

# What a file must not import, directly.
FORBIDDEN = {
    "config": {"torch", "accelerate"},
    "config_operation": {"torch", "accelerate"},
    "config_probe": {"torch", "accelerate"},
    "config_files": {"torch", "accelerate"},
    "comms": {"moco_dist", "accelerate"},
    "peers": {"moco_dist.config", "moco_dist.moco", "moco_dist.encoder", "accelerate"},
    "stopping": {"torch", "accelerate", "moco_dist.comms"},
    "run_lock": {"torch", "accelerate", "moco_dist.comms"},
    "guard": {"accelerate", "moco_dist.trainer", "moco_dist.comms"},
    "saving": {"moco_dist.moco", "moco_dist.data", "accelerate"},
    "command": {"moco_dist.runtime", "moco_dist.trainer"},
    "randomness": {"moco_dist", "accelerate"},
    "plan": {"accelerate"},
    "convolutions": {"moco_dist", "accelerate"},
    "compilation": {"accelerate", "moco_dist.encoder", "moco_dist.trainer"},
    "data": {"moco_dist.moco", "accelerate"},
    "image_file": {"torch", "accelerate"},
    "image_worker": {"torch", "accelerate"},
    "tar_shards": {"torch", "accelerate"},
    "streamed_images": {"accelerate", "moco_dist.data", "moco_dist.moco"},
    "view_source": {"accelerate", "moco_dist.moco"},
    "views": {"moco_dist.data", "moco_dist.moco"},
    "encoder": {"moco_dist.moco", "moco_dist.comms"},
    "key_queue": {"moco_dist.comms"},
    "moco": {"accelerate", "moco_dist.config"},
    "schedule": {"torch"},
    "checkpoint": {"moco_dist.moco", "moco_dist.data"},
    "moco_layout": {"moco_dist.moco", "moco_dist.data", "accelerate"},
    "encoder_files": {"moco_dist.moco", "moco_dist.trainer", "accelerate"},
    "export": {"moco_dist.moco", "moco_dist.trainer", "accelerate"},
    "export_card": {"moco_dist.probing.linear_probe", "moco_dist.trainer", "accelerate"},
    "export_targets": {"moco_dist.moco", "moco_dist.trainer", "accelerate"},
    "timm_backbone": {"moco_dist.encoder", "moco_dist.moco", "accelerate"},
    "packaged": {"torch", "accelerate"},
    "console_commands": {"torch", "accelerate"},
    "doctor_checks": {"moco_dist.pretrain", "moco_dist.trainer", "moco_dist.moco"},
    "knn": {"accelerate"},
    "tracking": {"moco_dist.moco", "moco_dist.services.wandb_run", "wandb", "torch"},
    "feed": {"torch", "accelerate", "wandb", "moco_dist.services.wandb_run"},
    "wandb_run": {"torch", "moco_dist.trainer", "moco_dist.comms"},
    "tensorboard_run": {"moco_dist.trainer", "wandb"},
    "media": {"wandb", "accelerate", "moco_dist.trainer", "moco_dist.comms"},
    "pictures": {"wandb", "accelerate", "moco_dist.comms"},
    "health": {"accelerate", "moco_dist.config", "moco_dist.trainer"},
    "alarms": {"torch", "accelerate", "moco_dist.comms", "moco_dist.trainer"},
    "doctor": {"moco_dist.pretrain", "moco_dist.probe", "moco_dist.probing.linear_probe"},
    "console_lines": {"torch", "accelerate"},
    "run_directory": {"moco_dist.moco", "moco_dist.data"},
    "run_record": {"torch", "accelerate", "rich"},
    "run_progress": {"torch", "accelerate", "rich"},
    "follow": {"torch", "accelerate"},
    "report": {"torch", "accelerate", "matplotlib"},
    "report_files": {"torch", "accelerate", "matplotlib"},
    "report_page": {"torch", "accelerate"},
    "report_html": {"torch", "accelerate", "matplotlib"},
    "report_figures": {"torch", "accelerate", "moco_dist.run_record"},
    "report_pictures": {"torch", "accelerate", "moco_dist.run_record"},
    "report_results": {"torch", "accelerate", "matplotlib"},
    "report_runs": {"torch", "accelerate", "matplotlib"},
    "report_encoder": {"accelerate", "moco_dist.trainer", "moco_dist.moco"},
    "runtime": {"moco_dist.moco", "moco_dist.data"},
    "pretrain": {"moco_dist.probe", "moco_dist.probing.linear_probe"},
    "trainer": {"moco_dist.probe", "moco_dist.probing.linear_probe"},
    "probe": {"moco_dist.pretrain", "moco_dist.trainer", "moco_dist.moco"},
    "linear_probe": {"moco_dist.pretrain", "moco_dist.trainer", "moco_dist.moco"},
    "probe_results": {"moco_dist.pretrain", "moco_dist.trainer", "moco_dist.moco"},
    "probe_figures": {"moco_dist.pretrain", "moco_dist.trainer", "moco_dist.moco"},
    "finetune": {"moco_dist.pretrain", "moco_dist.trainer", "moco_dist.moco"},
    "heads": {"accelerate", "moco_dist.comms", "moco_dist.data"},
    "frozen": {"accelerate", "moco_dist.comms", "moco_dist.data"},
    "overlap": {"accelerate", "moco_dist.comms"},
    "label_fraction": {"accelerate", "moco_dist.comms"},
    "encoder_source": {"accelerate", "moco_dist.comms", "moco_dist.data", "moco_dist.moco"},
    "foreign_encoder": {"accelerate", "moco_dist.comms", "moco_dist.data", "moco_dist.moco"},
    "verdict": {"torch", "accelerate"},
    "intervals": {"torch", "accelerate", "moco_dist"},
}


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports; names taken from a package of ours are modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module}
            if node.module.partition(".")[0] == "moco_dist":
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_imports_only_what_its_place_allows(path: Path) -> None:
    for module in imports(path):
        for banned in FORBIDDEN.get(path.stem, ()):
            assert module != banned, f"{path.name} imports {module}"
            assert not module.startswith(banned + "."), f"{path.name} imports {module}"


def test_a_report_starts_without_torch() -> None:
    """It runs on login nodes; what its imports import counts too."""
    code = "import sys, moco_dist.report; "
    code += "print(sorted({'torch', 'accelerate', 'matplotlib'} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_only_comms_talks_to_other_processes() -> None:
    users = [p.stem for p in FILES if any("torch.distributed" in m for m in imports(p))]
    assert users == ["comms"]


def test_config_reads_yaml_and_nobody_else_does() -> None:
    users = [p.stem for p in FILES if imports(p) & {"yaml", "omegaconf", "omegaconf.errors"}]
    assert users == ["config_files"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines; cut it"


def test_no_file_is_named_like_the_standard_library_or_like_a_drawer() -> None:
    names = {path.stem for path in FILES}
    assert not names & set(sys.stdlib_module_names)
    assert not names & {"utils", "common", "helpers", "base", "core", "misc"}


def test_every_rule_is_about_files_that_exist() -> None:
    assert FORBIDDEN.keys() <= {path.stem for path in FILES}
    modules = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES}
    banned = {each for rule in FORBIDDEN.values() for each in rule if "." in each}
    assert banned <= modules


def test_a_name_stands_once() -> None:
    names = [path.stem for path in FILES if path.stem != "__init__"]
    assert len(set(names)) == len(names)
