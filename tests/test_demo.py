"""The demo teaches an encoder something: what `bash launch/demo.sh` promises, as a test."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.report_pages import Page

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_demos_encoder_is_far_above_a_random_one(tmp_path: Path) -> None:
    command = ["bash", "launch/demo.sh", f"output={tmp_path}", "name=demo"]
    for attempt in ("first", "again"):
        result = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ)
        )
        assert result.returncode == 0, f"{attempt}: {result.stderr}"
        *_, before, last = result.stdout.splitlines()
        assert (
            before == f"The pretraining is in {tmp_path}/demo, its probe in {tmp_path}/demo-probe."
        )
        page = Path(last.removeprefix("Open the report in a browser: "))
        assert page == tmp_path / "demo" / "report" / "report.html"
        assert {"loss", "knn", "probe_top1", "neighbours"} <= {
            a["id"] for a in Page(page).all("figure")
        }
        results = json.loads((tmp_path / "demo-probe" / "DONE").read_text())
        trained, control = results["probe"]["test"], results["control"]["test"]
        assert trained["top1"] > control["top1"] + 0.3
        assert trained["knn_top1"] > control["knn_top1"] + 0.3
