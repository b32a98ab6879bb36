"""The Job of docs/kubernetes.md hangs together, and its command runs, stops and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from moco_dist import errors
from tests.test_documents import blocks
from tests.test_launch import BIN, ROOT, TINY, free_port, lines

SERVICE, JOB = yaml.safe_load_all(blocks(ROOT / "docs/kubernetes.md", "yaml")[0])
PODS: dict[str, Any] = JOB["spec"]["template"]["spec"]
(CONTAINER,) = PODS["containers"]
VARIABLES = {each["name"]: each.get("value") for each in CONTAINER["env"]}


def test_the_pods_find_each_other_share_the_disk_and_have_time_to_save() -> None:
    name, spec = JOB["metadata"]["name"], JOB["spec"]
    assert SERVICE["spec"]["clusterIP"] == "None"  # a name for each pod
    assert SERVICE["spec"]["selector"] == {"job-name": name}
    assert PODS["subdomain"] == SERVICE["metadata"]["name"]
    assert VARIABLES["MEETING"].partition(":")[0] == f"{name}-0.{PODS['subdomain']}"
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(VARIABLES["MACHINES"])
    gpus = CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == int(VARIABLES["PROCESSES"])
    volumes = {volume["name"]: volume for volume in PODS["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in CONTAINER["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert "persistentVolumeClaim" in mounts["/data"]
    patience = int(VARIABLES["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert patience + 10 <= PODS["terminationGracePeriodSeconds"]


def test_each_exit_status_leads_to_what_helps() -> None:
    actions: dict[int, str] = {}
    for rule in JOB["spec"]["podFailurePolicy"]["rules"]:
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == CONTAINER["name"]
            actions |= dict.fromkeys(codes["values"], rule["action"])
    assert PODS["restartPolicy"] == "Never"  # as a podFailurePolicy requires
    refused = (errors.ConfigError, errors.DataError, errors.MissingError)
    assert actions == {
        **{error.exit_status: "FailJob" for error in refused},
        errors.StoppedError.exit_status: "Ignore",
    }
    # What a machine should start again is never failed at once.
    again = {e.exit_status for e in vars(errors).values() if getattr(e, "again", False) is True}
    assert not [status for status in again if actions.get(status) == "FailJob"]
    table = (ROOT / "docs/kubernetes.md").read_text()
    assert all(str(status) in table for status in {*errors.STATES} - {1, 77, 130})


def pod(index: int, port: int, *arguments: str) -> subprocess.Popen[str]:
    """Start the container of a pod: the command of the page with other arguments at its end."""
    head, _, _ = CONTAINER["args"][0].partition("pretrain/imagenet_v2")
    script = head + " ".join(arguments)
    own = {"JOB_COMPLETION_INDEX": str(index), "PROCESSES": "1", "POD_IP": "127.0.0.1"}
    own |= {"MEETING": f"127.0.0.1:{port}", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    set_by_page = {name: value for name, value in VARIABLES.items() if value}
    return subprocess.Popen(
        [*CONTAINER["command"], script],
        env={**os.environ, **set_by_page, **own, "PATH": f"{BIN}:{os.environ['PATH']}"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(*pods: subprocess.Popen[str]) -> list[int]:
    said = [each.communicate(timeout=300)[0] for each in pods]
    statuses = [each.returncode for each in pods]
    print(*said)
    return statuses


@pytest.mark.slow
def test_two_pods_train_one_is_evicted_and_both_go_on(tmp_path: Path) -> None:
    arguments = [*TINY, "epochs=40", "tracking.wandb=disabled", "tracking.media_every_epochs=0"]
    arguments += [f"output={tmp_path}", "name=run", "tracking.every_steps=1"]
    status, port = tmp_path / "run/status.json", free_port()
    first = [pod(index, port, *arguments) for index in (0, 1)]
    deadline = time.monotonic() + 200
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 20):
        assert time.monotonic() < deadline, ended(*first)
        time.sleep(0.2)
    # By the kubelet, to the first process of the container. It is not where the pods meet.
    first[1].send_signal(signal.SIGTERM)
    statuses = ended(*first)
    assert statuses[1] == 75
    assert set(statuses) <= {69, 75}
    stopped = json.loads(status.read_text())
    assert (stopped["state"], stopped["again"]) == ("stopped", True)
    assert 0 < stopped["step"] < 200

    again = [pod(index, port, *arguments) for index in (0, 1)]
    assert ended(*again) == [0, 0]
    assert json.loads(status.read_text())["state"] == "done"
    steps = [line["step"] for line in lines(tmp_path / "run") if "train/loss" in line]
    assert steps == list(range(1, 201))


@pytest.mark.slow
def test_what_is_refused_has_its_own_status_behind_torchrun() -> None:
    pods = [pod(index, port, "epochs=0") for port in [free_port()] for index in (0, 1)]
    statuses = ended(*pods)
    # The pod that the others meet at may leave before their processes have.
    assert statuses[0] == 78
    assert statuses[1] in (69, 78)
