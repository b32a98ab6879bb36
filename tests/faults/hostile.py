"""Checkpoints made by a stranger to run code, read other files, or use up the memory."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from moco_dist.encoders import load
from moco_dist.runs import checkpoint, saving
from tests.faults.damage import pretrained, put
from tests.faults.table import Fault, Outcome

# Reads what it is given, as the probe does, and prints how each ended and the memory it took.
READER = """
import resource, sys, time
from pathlib import Path
from moco_dist.encoders import load
from moco_dist.errors import DataError, MissingError

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
whole, *bad = map(Path, sys.argv[1:])
load.find(whole)
before = peak()
for path in bad:
    began = time.process_time()
    try:
        load.find(path)
        print(f"{path.name}: READ")
    except (DataError, MissingError) as error:
        assert len(str(error)) < 2000 and time.process_time() - began < 5
        print(f"{path.name}: refused")
print(f"grown by {peak() - before} MB")
"""


class Evil:
    """What runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def resealed(folder: Path, **changes: Any) -> None:
    """Change the state and give it sums that are right, as a stranger can."""
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]
    for name in checkpoint.FILES:
        state["files"][name] = {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
    (folder / "state.json").unlink()
    saving._write_state(folder / "state.json", state | changes)


def with_model(content: bytes, folder: Path) -> None:
    """Replace the model by other bytes."""
    (folder / "model.safetensors").write_bytes(content)
    resealed(folder)


def with_encoder(folder: Path, **values: Any) -> None:
    """Put values into the encoder's configuration."""
    config = json.loads((folder / "state.json").read_text())["config"]
    config["encoder"] |= values
    resealed(folder, config=config)


def ways(marker: Path) -> dict[str, Callable[[Path], Any]]:
    """Return ways to make a checkpoint hostile, by name."""
    huge = json.dumps({"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}})
    model = "model.safetensors"
    elsewhere = {"../../../../etc/passwd": {"bytes": 1, "sha256": "0" * 64}}
    return {
        "pickle": partial(with_model, pickle.dumps(Evil(marker))),
        "torch-save": partial(with_model, torch_saved(Evil(marker))),
        "pickle-state": lambda f: (f / "state.json").write_bytes(pickle.dumps(Evil(marker))),
        "huge-header": partial(with_model, (2**60).to_bytes(8, "little") + b"{}"),
        "huge-tensor": partial(with_model, len(huge).to_bytes(8, "little") + huge.encode()),
        "huge-width": partial(with_encoder, width=10**7),
        "overflowing-width": partial(with_encoder, width=10**30),
        "code-in-backbone": partial(with_encoder, backbone=f"${{oc.env:HOME}};touch {marker}"),
        "secret-in-config": partial(with_encoder, head="${oc.env:PATH}"),
        "other-file": partial(resealed, files=elsewhere),
        "device": partial(put, model, lambda path: path.symlink_to("/dev/zero")),
        "pipe": partial(put, model, os.mkfifo),
        "pipe-state": partial(put, "state.json", os.mkfifo),
        "sparse-state": lambda f: os.truncate(f / "state.json", 10**12),
        "deep-state": resealed_deep,
    }


def torch_saved(value: Any) -> bytes:
    """Return what torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def resealed_deep(folder: Path) -> None:
    """Nest lists a hundred thousand deep, with a sum that is right."""
    text = '{\n "x": ' + "[" * 100_000 + "]" * 100_000 + ',\n "sha256": "'
    text += hashlib.sha256(text.encode()).hexdigest() + '"\n}\n'
    (folder / "state.json").write_text(text)


def checkpoints(folder: Path, times: int, random: Random) -> Outcome:
    """Read each hostile checkpoint in a fresh process."""
    marker = folder / "marker"
    whole = load.checkpoint_of(pretrained(folder)).path
    bad = []
    for name, way in ways(marker).items():
        copy = folder / name
        subprocess.run(["cp", "-r", str(whole), str(copy)], check=True)
        way(copy)
        bad.append(str(copy))
    command = [sys.executable, "-c", READER, str(whole), *bad]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    lines = result.stdout.splitlines()
    assert lines[:-1] == [f"{Path(path).name}: refused" for path in bad], result
    grown = int(lines[-1].split()[2])
    assert grown < 200, f"{grown} MB"
    assert not marker.exists(), "code was run"
    return Outcome(len(bad), f"all refused with a sentence; no code run; {grown} MB more memory")


def files(folder: Path, times: int, random: Random) -> Outcome:
    """Run the tests of hostile archives, images, names, links and configurations."""
    return Outcome(_passed("tests/test_foreign_input.py"), "all refused or left out, by name")


def properties(folder: Path, times: int, random: Random) -> Outcome:
    """Run the property tests."""
    return Outcome(_passed("tests/test_properties.py"), "property tests hold (hypothesis)")


def _passed(path: str) -> int:
    command = [sys.executable, "-m", "pytest", "-q", path]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stdout
    return int(result.stdout.splitlines()[-1].split()[0])


FAULTS = [
    Fault("hostile checkpoint", 1, 1, checkpoints),
    # launch/test.sh runs these tests by themselves.
    Fault("hostile archives, images, names, links, YAML", 0, 1, files),
    Fault("properties of config, queue, plan, checkpoints", 0, 1, properties),
]
