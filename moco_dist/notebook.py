"""The commands as functions, for a notebook or a script: `from moco_dist import run_pretrain`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.distributed.stopping import StopRequests
from moco_dist.errors import InterruptedRunError, UserError, machine_error
from moco_dist.pretrain import run as pretrain_run
from moco_dist.probe import run as probe_run

Config = TypeVar("Config", PretrainConfig, ProbeConfig)


def run_pretrain(config: PretrainConfig) -> Path:
    """Pretrain as `python -m moco_dist.pretrain` does, and return the run directory.

    The same call again resumes the run. Raises a subclass of `moco_dist.errors.UserError`.
    """
    _run(pretrain_run.run, config)
    return Path(config.output).expanduser() / config.name


def run_probe(config: ProbeConfig) -> dict[str, Any]:
    """Probe as `python -m moco_dist.probe` does, and return the content of results.json.

    It is empty where `config.stop_at_step` ended the probe early. Raises a subclass of
    `moco_dist.errors.UserError`.
    """
    _run(probe_run.run, config)
    run = Path(config.output).expanduser() / config.run_name()
    done = (run / "DONE").exists()  # else the results are those of a shorter probe
    results: dict[str, Any] = json.loads((run / "results.json").read_text()) if done else {}
    return results


def _run(run: Callable[[Config, StopRequests], None], config: Config) -> None:
    """Call `run`, release the lock of the run directory, and note there how the run ended."""
    stop = StopRequests()
    status, text, again = 0, "", False
    try:
        run(config, stop)
    except BaseException as error:
        status, text = UserError.exit_status, f"{type(error).__name__}: {error}"
        known = error if isinstance(error, UserError) else machine_error(error)
        if isinstance(error, KeyboardInterrupt):
            known = InterruptedRunError("stopped by Ctrl-C; the last checkpoint stands")
        if known:
            status, text, again = known.exit_status, str(known), known.again
        stop.flush()
        raise
    finally:
        stop.on_end(status, text, again)
