"""The console commands of the package: `moco-probe` is `python -m moco_dist.probe`, and so on.

Under a launcher: accelerate launch -m moco_dist.pretrain, from any folder.
"""

from __future__ import annotations

import runpy


def _run(module: str) -> None:
    runpy.run_module(f"moco_dist.{module}", run_name="__main__", alter_sys=True)


def pretrain() -> None:
    """Run moco-pretrain."""
    _run("pretrain")


def probe() -> None:
    """Run moco-probe."""
    _run("probe")


def export() -> None:
    """Run moco-export."""
    _run("export")


def report() -> None:
    """Run moco-report."""
    _run("report")


def doctor() -> None:
    """Run moco-doctor."""
    _run("doctor")
