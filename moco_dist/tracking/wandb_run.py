"""The run at Weights & Biases: online or offline, always under one id, with nothing secret in it.

`wandb sync` of a folder replaces what another folder with the same id has sent. So an offline
launch writes the whole history into a new folder and removes the older ones; an online launch
sends what the server lacks.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco_dist.config.running import TrackingConfig
from moco_dist.errors import StoppedError, shown
from moco_dist.runs import record
from moco_dist.runs.status import replace

if TYPE_CHECKING:
    import wandb

# Seconds that the server has to answer at the start, and to receive the rest at the end.
INIT_SECONDS, FINISH_SECONDS = 10.0, 30.0

# Settings for privacy; W&B's variable for a setting overrides it.
PRIVATE: dict[str, Any] = {"console": "off", "host": "", "program": ""}
PRIVATE |= dict.fromkeys(["save_code", "x_save_requirements"], False)
PRIVATE |= dict.fromkeys(["disable_code", "disable_git", "disable_job_creation"], True)
PRIVATE |= dict.fromkeys(["label_disable", "x_disable_machine_info", "x_disable_meta"], True)
# Metrics whose best value means something; the training loss is lowest while the queue is empty.
EVALUATIONS = ("knn/", "online/", "probe/", "control/")


def mode(settings: TrackingConfig) -> str:
    """Return auto, online, offline or disabled: the configured mode, or that of WANDB_MODE."""
    if settings.wandb != "auto":
        return settings.wandb
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "disabled"
    asked = os.environ.get("WANDB_MODE", "")
    return {"dryrun": "offline", "run": "online", "shared": "online"}.get(asked, asked) or "auto"


def shareable(content: Any) -> Any:
    """Return a configuration with absolute paths, and those with ~, cut to their last part.

    Texts can be sent as UTF-8, which the bytes of a path need not be.
    """
    if isinstance(content, Mapping):
        return {key: shareable(value) for key, value in content.items()}
    if isinstance(content, str):
        private = content.startswith("~") or Path(content).is_absolute()
        return shown(Path(content).name if private else content, sys.maxsize)
    return content


class WandbRun:
    """A service for a feed (see `feed.py`), whose thread calls its methods.

    `identity` is the run's id, name, group and job_type, as wandb.init names them.
    """

    name = "W&B"
    resends = False
    run: wandb.Run
    # Imported by `begin`, in the feed's thread: it takes seconds.
    wandb: Any

    def __init__(
        self,
        settings: TrackingConfig,
        directory: Path,
        identity: Mapping[str, str],
        content: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.directory, self.identity, self.say = settings, directory, identity, say
        self.content = shareable(content)
        self.place = Path(os.environ.get("WANDB_DIR") or directory).absolute()
        # The sweep whose agent has started this run; wandb.init takes the run's id from it.
        self.sweep = os.environ.get("WANDB_SWEEP_ID")
        if self.sweep and identity["id"] != os.environ.get("WANDB_RUN_ID"):
            self.say(f"W&B: this run has its own id {identity['id']}; sweep {self.sweep} lacks it")
            self.sweep = None
        self._notes = directory / "wandb_folders.json"
        self._defined: set[str] = set()
        # Best and last value of each metric over all launches; wandb knows only this one.
        self._figures: dict[str, dict[str, float]] = {}

    def begin(self) -> int:
        """Start online, or offline if that is not possible; return the first step to log."""
        if not os.environ.get("WANDB_MODE"):  # wandb refuses an empty one
            os.environ.pop("WANDB_MODE", None)
        # wandb would report its own errors to its makers, with names of this machine.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb = wandb
        # wandb's log is in the run's folder: on a full disk each of its lines would be a traceback.
        logging.raiseExceptions = False
        folder = self.place / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):  # wandb would choose a folder in /tmp
            raise PermissionError(f"{folder} can't be written")
        wish = mode(self.settings)
        # `login` reads the mode of the session, which may differ from the run's.
        session = wandb.Settings(
            mode="offline" if wish == "offline" else "online",
            silent=True,
            sweep_id=self.sweep,
            x_disable_viewer=True,
            x_service_wait=INIT_SECONDS,
        )
        wandb.setup(session)
        reason = "" if wish == "offline" else self._online()
        if reason is None:
            self._remove("offline-run")  # uploaded later, it would replace the newer history
            self.say(f"W&B: {self.run.url}")
            return int(self.run.starting_step)
        self._start("offline")
        kept = Path(self.run.settings.sync_dir)
        self._remove("offline-run", kept)
        off = "; tracking.wandb=disabled turns W&B off" if wish == "auto" else ""
        self.resends = True
        self.say(f"W&B: offline{reason}; upload it later by: wandb sync {kept}{off}")
        return 0

    def _online(self) -> str | None:
        """Start online; return None, or why that is not possible."""
        if not self.wandb.login(prompt=False, verify=False):
            return ", as nobody is logged in (wandb login)"
        try:
            self._start("online")
        except Exception as error:
            self.leave()
            self._remove("run")
            return f", as the server does not answer ({' '.join(str(error).split())[:200]})"
        return None

    def _start(self, how: str) -> None:
        environ, identity = os.environ, self.identity
        variables = {k: f"WANDB_{k.removeprefix('x')}".upper() for k in PRIVATE}
        private = {k: v for k, v in PRIVATE.items() if variables[k] not in environ}
        self.run = self.wandb.init(
            project=self.settings.project or environ.get("WANDB_PROJECT") or "moco_dist",
            entity=self.settings.entity or environ.get("WANDB_ENTITY"),
            id=identity["id"],
            name=environ.get("WANDB_NAME") or identity["name"],
            group=environ.get("WANDB_RUN_GROUP") or identity["group"],
            job_type=environ.get("WANDB_JOB_TYPE") or identity["job_type"],
            resume="allow",
            config=self.content,
            settings=self.wandb.Settings(
                mode=how,
                root_dir=str(self.place),
                silent=True,
                allow_val_change=True,
                init_timeout=INIT_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
                x_disable_viewer=True,
                **private,
            ),
        )
        self._note(Path(self.run.settings.sync_dir))
        for axis in ("step", "epoch"):
            self.run.define_metric(axis)
            self._defined.add(axis)

    def _remove(self, kind: str, kept: Path | None = None) -> None:
        """Remove the folders of this run's other launches, and none of another run's.

        In a folder that WANDB_DIR shares, only those that this run has noted are its own: another
        run may have the same id.
        """
        noted = self._noted()
        for folder in (self.place / "wandb").glob(f"{kind}-*"):
            own = folder.is_relative_to(self.directory.absolute()) or str(folder) in noted
            if own and folder != kept and (folder / f"run-{self.identity['id']}.wandb").exists():
                shutil.rmtree(folder, ignore_errors=True)

    def _note(self, folder: Path) -> None:
        """Note a folder of this launch as this run's own."""
        there = [place for place in self._noted() if os.path.exists(place)]
        replace(self._notes, json.dumps({"folders": [*there, str(folder)]}) + "\n")

    def _noted(self) -> list[str]:
        found = record.read_object(self._notes).get("folders")
        return list(map(str, found)) if isinstance(found, list) else []

    def row(self, step: int, metrics: Mapping[str, float], known: bool) -> None:
        """Log the metrics after `step` steps with their pictures; `known` ones only count."""
        for name, value in metrics.items():
            figures = self._figures.setdefault(name, {})
            best = min if "loss" in name else max
            if name.startswith(EVALUATIONS) and math.isfinite(value):
                figures[best.__name__] = best(value, figures.get(best.__name__, value))
            figures["last"] = value
        if known:
            return
        row = {"step": step, **metrics, **self._pictures(step)}
        for name in row.keys() - self._defined:
            axis = "epoch" if name.startswith(EVALUATIONS) else "step"
            # A sweep wants numbers: without a summary of ours, it is the last one.
            summary = None if self.sweep else ",".join(self._figures.get(name, ["none"]))
            self.run.define_metric(name, step_metric=axis, summary=summary)
            self._defined.add(name)
        self.run.log(row, step=step, commit=True)

    def _pictures(self, step: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in sorted((self.directory / "media" / f"step_{step:08d}").glob("*.*")):
            if path.suffix == ".png":
                found[f"media/{path.stem}"] = self.wandb.Image(str(path))
            elif path.suffix == ".json":
                content = json.loads(path.read_text())
                pair = content["counts"], content["edges"]
                found[f"media/{path.stem}"] = self.wandb.Histogram(np_histogram=pair)
        return found

    def conclude(self, results: Mapping[str, float], encoder: Path | None) -> None:
        """Add the final figures to the summary, and upload the encoder."""
        self.run.summary.update(dict(results))
        if encoder:
            artifact = self.wandb.Artifact(f"encoder-{self.identity['id']}", type="model")
            for path in sorted(encoder.iterdir()):
                artifact.add_file(str(path), policy="immutable")
            self.run.log_artifact(artifact)

    def finish(self, status: int) -> None:
        """End the run as finished, failed or, if it can be resumed, preempted."""
        axes = ("step", "epoch")
        figures = {k: v for k, v in self._figures.items() if k not in axes}
        last = {k: v["last"] for k, v in figures.items()}
        self.run.summary.update(last if self.sweep else figures)
        if status == StoppedError.exit_status:
            self.run.mark_preempting()
        folder = self.run.settings.sync_dir
        try:
            self.run.finish(exit_code=status)
        except TimeoutError:
            self.say(f"W&B: not all was uploaded in time; upload it by: wandb sync {folder}")
        self.wandb.teardown()  # here in bounded time; at the exit of the process nothing bounds it

    def leave(self) -> None:
        """Forget the session, so that the exit of this process does not wait for it."""
        with suppress(BaseException):
            self.wandb.teardown()
