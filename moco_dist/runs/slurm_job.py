"""Two questions of a job script in slurm/: where is the run directory, and is the job requeued?

    python -m moco_dist.runs.slurm_job directory {pretrain,probe} ARGUMENTS   prints the directory
    python -m moco_dist.runs.slurm_job end RUN OUTCOME STATE   the exit status, or 200 to requeue

Neither loads PyTorch, so both are fast, and neither calls Slurm, which a container may not have.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from moco_dist.config import yaml_files
from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.errors import ConfigError, UserError
from moco_dist.runs.status import write_status

# Exit status that asks the job script to requeue the job.
REQUEUE = 200
# Restarts without a new checkpoint after which a job is not requeued again.
MAX_RESTARTS = 3


def directory(kind: str, arguments: list[str]) -> Path:
    """Return the run directory of a command line; UserError if its configuration is refused.

    If the command line has name=... and output=..., a refusal is also written to status.json there
    unless a run has begun, so that a sweep knows why a task is missing.
    """
    try:
        config: PretrainConfig | ProbeConfig
        if kind == "pretrain":
            config = yaml_files.load(PretrainConfig, arguments)
            name = config.name
        else:
            config = yaml_files.load(ProbeConfig, arguments)
            name = config.run_name()
    except UserError as error:
        given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        if {"name", "output"} <= given.keys():
            run = Path(given["output"]).expanduser() / given["name"]
            if not (run / "checkpoints").exists():
                with suppress(OSError):
                    run.mkdir(parents=True, exist_ok=True)
                    write_status(run, error.exit_status, 0, str(error))
        raise
    return Path(config.output).expanduser() / name


def end(run: Path, outcome: dict[str, Any] | None, state: str) -> tuple[int, str]:
    """Return the exit status of this job, or REQUEUE, and a sentence about it.

    `outcome` is what the run wrote at its end, None if it was killed or never started; `state` is
    the job's state in Slurm.
    """
    status, reason = 70, "the run was killed, or did not start"
    again = True
    if outcome:
        status, reason, again = outcome["exit_status"], outcome["reason"], outcome["again"]
        # The previous launch may not have ended yet.
        again = again or (status == 73 and _restarts() > 0)
    if status == 0:
        return 0, f"{run} is done"
    if not again:
        return status, f"ended with {status}: {reason}"
    if state != "RUNNING":
        return status, f"{reason}. Slurm itself ends this job ({state or 'unknown state'})"
    step = newest_step(run)
    if _stands_still(run, step):
        return 70, (
            f"no checkpoint after step {step} in {MAX_RESTARTS} restarts, so this job is not "
            f"started again; the last reason: {reason}"
        )
    _note(run, {"job": _job(), "restart": _restarts(), "step": step, "reason": reason})
    return REQUEUE, f"to be requeued at step {step}: {reason}"


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint, by the names of the folders, 0 without one."""
    names = [path.name.removeprefix("step_") for path in (run / "checkpoints").glob("step_*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _job() -> str:
    job = os.environ.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        raise ConfigError(f"SLURM_JOB_ID={job!r} is no job; run this in a script for sbatch")
    return job


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _stands_still(run: Path, step: int) -> bool:
    """Return whether this job was requeued MAX_RESTARTS times in a row at `step`."""
    try:
        lines = [json.loads(line) for line in (run / "requeues.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return False
    steps = [line["step"] for line in lines if line["job"] == _job()]
    return steps[-MAX_RESTARTS:] == [step] * MAX_RESTARTS


def _note(run: Path, requeue: dict[str, Any]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    with (run / "requeues.jsonl").open("a") as file:
        file.write(json.dumps(requeue) + "\n")


def main(arguments: list[str]) -> int:
    """Run a command line; return its exit status."""
    match arguments:
        case ["directory", ("pretrain" | "probe") as kind, *rest]:
            try:
                print(directory(kind, rest))
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return error.exit_status
            return 0
        case ["end", run, path, state]:
            outcome = None
            with suppress(OSError, ValueError):
                outcome = json.loads(Path(path).read_text())
            status, sentence = end(Path(run), outcome, state)
            print(f"job {_job()}: {sentence}", flush=True)
            return status
    print(__doc__, file=sys.stderr)
    return 78


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
