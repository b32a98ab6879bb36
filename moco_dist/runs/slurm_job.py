"""What a job script in slurm/ asks: where is the run directory, and is the job to be requeued?

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
from moco_dist.errors import ConfigError, OutputError, UserError, escape_output, output_errors
from moco_dist.runs.status import write_status

REQUEUE = 200  # asks the job script to requeue the job
MAX_RESTARTS = 3  # without a new checkpoint


def directory(kind: str, arguments: list[str]) -> Path:
    """Return the run directory of a command line; UserError if its configuration is refused.

    If the command line has name=... and output=..., and no run has begun there, a refusal is also
    written to status.json, so that a sweep shows why a task is missing.
    """
    try:
        if kind == "pretrain":
            pretrain = yaml_files.load(PretrainConfig, arguments)
            return Path(pretrain.output).expanduser() / pretrain.name
        probe = yaml_files.load(ProbeConfig, arguments)
        return Path(probe.output).expanduser() / probe.run_name()
    except UserError as error:
        given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        if {"name", "output"} <= given.keys():
            run = Path(given["output"]).expanduser() / given["name"]
            if not (run / "checkpoints").exists():
                with suppress(OSError):
                    run.mkdir(parents=True, exist_ok=True)
                    write_status(run, error.exit_status, 0, str(error))
        raise


def end(run: Path, outcome: dict[str, Any] | None, state: str) -> tuple[int, str]:
    """Return the exit status of this job, or REQUEUE, and a sentence about it.

    `outcome` is what the run wrote at its end, None if it was killed or never started; `state` is
    the job's state in Slurm.
    """
    status, reason, again = 70, "the run was killed, or did not start", True
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    if outcome:
        status, reason, again = outcome["exit_status"], outcome["reason"], outcome["again"]
        # The previous launch may not have ended yet.
        again = again or (status == 73 and restarts > 0)
    if status == 0:
        return 0, f"{run} is done"
    if not again:
        return status, f"exited with status {status}: {reason}"
    if state != "RUNNING":
        return status, f"{reason}. Slurm itself ends this job ({state or 'unknown state'})"
    names = [path.name.removeprefix("step_") for path in (run / "checkpoints").glob("step_*")]
    step = max((int(name) for name in names if name.isdecimal()), default=0)
    notes = run / "requeues.jsonl"
    if _earlier(notes, step)[-MAX_RESTARTS:] == [step] * MAX_RESTARTS:
        return 70, (
            f"no checkpoint after step {step} in {MAX_RESTARTS} restarts, so this job is not "
            f"started again; the last reason: {reason}"
        )
    requeue = {"job": _job(), "restart": restarts, "step": step, "reason": reason}
    try:
        with output_errors(notes):
            run.mkdir(parents=True, exist_ok=True)
            with notes.open("ab+") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                cut = file.read(1) not in (b"", b"\n")  # a line that a full disk cut short
                file.write(b"\n" * cut + json.dumps(requeue).encode() + b"\n")
    except OutputError as error:
        return error.exit_status, f"{error}; unnoted, this job could be requeued for ever: {reason}"
    return REQUEUE, f"to be requeued at step {step}: {reason}"


def _earlier(notes: Path, step: int) -> list[int]:
    """Return the steps at which this job was requeued before; a line that is damaged counts too.

    It counts as one at `step`, so that damage can end a loop of restarts but not let it go on.
    """
    steps = []
    with suppress(OSError):
        for line in notes.read_bytes().splitlines():
            try:
                found = json.loads(line)
                job, at = str(found["job"]), int(found["step"])
            except (ValueError, TypeError, KeyError, RecursionError):
                job, at = _job(), step
            steps += [at] if job == _job() else []
    return steps


def _job() -> str:
    job = os.environ.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        raise ConfigError(f"SLURM_JOB_ID={job!r} is no job; run this in a script for sbatch")
    return job


def main(arguments: list[str]) -> int:
    """Run a command line; return its exit status."""
    escape_output()
    match arguments:
        case ["directory", ("pretrain" | "probe") as kind, *rest]:
            try:
                # The bytes of the path, because the job script goes there.
                sys.stdout.buffer.write(os.fsencode(directory(kind, rest)) + b"\n")
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return error.exit_status
            return 0
        case ["end", run, path, state]:
            outcome = None
            with suppress(OSError, ValueError):
                outcome = json.loads(Path(path).read_bytes())
            status, sentence = end(Path(run), outcome, state)
            print(f"job {_job()}: {sentence}", flush=True)
            return status
    print(__doc__, file=sys.stderr)
    return 78


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
