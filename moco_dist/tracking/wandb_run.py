"""The run at Weights & Biases: online or offline, one id for its life, nothing secret in it.

`wandb sync` of a folder replaces what another folder with the same id has sent. So a start that is
offline writes the whole history into its folder, from metrics.jsonl, and removes the folders of the
starts before it; one that is online sends what the server lacks.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelerate import Accelerator
from accelerate.tracking import WandBTracker

from moco_dist.config.running import TrackingConfig
from moco_dist.errors import StoppedError

if TYPE_CHECKING:
    import wandb

# Seconds that the server has to answer at the start, and to take the rest at the end.
INIT_SECONDS, FINISH_SECONDS = 10.0, 30.0
# Seconds between two looks at the file; wandb writes to it each 15 seconds.
LOOK_SECONDS = 60.0

# What would say more than the metrics do; each can be asked for by W&B's variable of that name.
PRIVATE: dict[str, Any] = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "host": "",
    "label_disable": True,
    "program": "",
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}
# Metrics whose best says something; the training loss is lowest while the queue is empty.
EVALUATIONS = ("knn/", "probe/", "control/")


@dataclass(frozen=True)
class Identity:
    """What W&B calls the run; runs of a group stand together."""

    id: str
    name: str
    group: str
    job: str


def mode(settings: TrackingConfig) -> str:
    """Return auto, online, offline or disabled: what is configured, or else WANDB_MODE."""
    if settings.wandb != "auto":
        return settings.wandb
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return "disabled"
    asked = os.environ.get("WANDB_MODE", "")
    return {"dryrun": "offline", "run": "online", "shared": "online"}.get(asked, asked) or "auto"


def shareable(content: Any) -> Any:
    """Return a configuration with only the last part of each absolute path, and of those with ~."""
    if isinstance(content, Mapping):
        return {key: shareable(value) for key, value in content.items()}
    if isinstance(content, str) and (content.startswith("~") or Path(content).is_absolute()):
        return Path(content).name
    return content


class WandbRun:
    """A service for a feed (see `feed.py`); its methods run in the thread of that feed."""

    name = "W&B"
    anew = False

    def __init__(
        self,
        accelerator: Accelerator,
        settings: TrackingConfig,
        directory: Path,
        identity: Identity,
        content: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.accelerator, self.settings, self.directory = accelerator, settings, directory
        self.identity, self.say = identity, say
        self.content = shareable(content)
        self.place = Path(os.environ.get("WANDB_DIR") or directory).absolute()
        self._defined: set[str] = set()
        # Bytes of metrics so far, and at the last look at the file.
        self._sent = self._due = 0
        self._looked = time.monotonic()
        # Best and last of each metric, over all starts of the run.
        self._figures: dict[str, dict[str, float]] = {}
        self._tracker: Any = None

    @property
    def run(self) -> wandb.Run:
        """The run itself, as wandb has it."""
        run: wandb.Run = self._tracker.run
        return run

    def begin(self) -> int:
        """Start online, or offline if that can't be; return the first step to log."""
        if not os.environ.get("WANDB_MODE"):  # wandb takes an empty one for a mistake
            os.environ.pop("WANDB_MODE", None)
        # It reports wandb's own errors to its makers, with names of this machine.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError(
                f"{error}; pip install wandb, or tracking.wandb=disabled to do without"
            ) from error
        # Its log lies in the run's folder too: where that is full, each line would be a traceback.
        logging.raiseExceptions = False
        folder = self.place / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):  # wandb would choose a folder in /tmp
            raise PermissionError(f"{folder} can't be written")
        wish, offline_as = mode(self.settings), ""
        # `login` looks at the mode of the session, which may be another than the run's.
        session: Literal["online", "offline"] = "offline" if wish == "offline" else "online"
        wandb.setup(
            wandb.Settings(
                silent=True, x_disable_viewer=True, mode=session, x_service_wait=INIT_SECONDS
            )
        )
        if wish != "offline":
            if not wandb.login(prompt=False, verify=False):
                offline_as = "as nobody is logged in (wandb login)"
            else:
                try:
                    self._start("online")
                except Exception as error:
                    reason = " ".join(str(error).split())[:200]
                    offline_as = f"as the server does not answer ({reason})"
                    self.kill()
                    self.leave()
                    self._remove("run")
        if wish == "offline" or offline_as:
            self._start("offline")
            kept = Path(self.run.settings.sync_dir)
            self._remove("offline-run", kept)
            reason = f", {offline_as}" if offline_as else ""
            off = "; tracking.wandb=disabled does without" if wish == "auto" else ""
            self.anew = True
            self.say(f"W&B: offline{reason}; upload it later by: wandb sync {kept}{off}")
            return 0
        self._remove("offline-run")  # uploaded later, one would replace what is there by then
        self.say(f"W&B: {self.run.url}")
        return int(self.run.starting_step)

    def _start(self, how: Literal["online", "offline"]) -> None:
        import wandb

        private = {k: v for k, v in PRIVATE.items() if f"WANDB_{_variable(k)}" not in os.environ}
        identity, environ = self.identity, os.environ
        tracker = WandBTracker(
            self.settings.project or environ.get("WANDB_PROJECT") or "moco_dist",
            entity=self.settings.entity or environ.get("WANDB_ENTITY"),
            id=identity.id,
            name=environ.get("WANDB_NAME") or identity.name,
            group=environ.get("WANDB_RUN_GROUP") or identity.group,
            job_type=environ.get("WANDB_JOB_TYPE") or identity.job,
            resume="allow",
            config=self.content,
            settings=wandb.Settings(
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
        tracker.start()
        self._tracker = tracker
        self.accelerator.trackers.append(tracker)
        for axis in ("step", "epoch"):
            self.run.define_metric(axis)
            self._defined.add(axis)

    def _remove(self, kind: str, kept: Path | None = None) -> None:
        """Remove the folders of this run's other starts of a kind; wandb adds -1 to equal names."""
        for pattern in (f"{kind}-*-{self.identity.id}", f"{kind}-*-{self.identity.id}-*"):
            for folder in (self.place / "wandb").glob(pattern):
                if folder != kept:
                    shutil.rmtree(folder, ignore_errors=True)

    def row(self, step: int, metrics: Mapping[str, float], known: bool) -> None:
        """Log what holds after `step` steps, with its pictures; what is `known` counts only."""
        for name, value in metrics.items():
            figures = self._figures.setdefault(name, {})
            best = min if "loss" in name else max
            if name.startswith(EVALUATIONS) and math.isfinite(value):
                figures[best.__name__] = best(value, figures.get(best.__name__, value))
            figures["last"] = value
        if known:
            return
        pictures = self._pictures(step)
        for name in (*metrics, *pictures):
            self._define(name)
        self._tracker.log({"step": step, **metrics, **pictures}, step=step, commit=True)
        self._sent += len(json.dumps(metrics))
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._check_file(self._due)
            self._looked, self._due = time.monotonic(), self._sent

    def _check_file(self, size: int) -> None:
        """Raise OSError if the file of the run has fewer bytes: wandb itself says nothing then."""
        path = Path(self.run.settings.sync_file)
        if path.stat().st_size < size:
            raise OSError(f"{path} is incomplete; is its disk full?")

    def _define(self, name: str) -> None:
        """Give a metric its axis when it first comes, and its figures in the summary."""
        if name in self._defined:
            return
        self._defined.add(name)
        axis = "epoch" if name.startswith(EVALUATIONS) else "step"
        summary = ",".join(self._figures.get(name, ["none"]))
        self.run.define_metric(name, step_metric=axis, summary=summary)

    def _pictures(self, step: int) -> dict[str, Any]:
        import wandb

        found: dict[str, Any] = {}
        for path in sorted((self.directory / "media" / f"step_{step:08d}").glob("*.*")):
            if path.suffix == ".png":
                found[f"media/{path.stem}"] = wandb.Image(str(path))
            elif path.suffix == ".json":
                content = json.loads(path.read_text())
                pair = content["counts"], content["edges"]
                found[f"media/{path.stem}"] = wandb.Histogram(np_histogram=pair)
        return found

    def conclude(self, results: Mapping[str, float], encoder: Path | None) -> None:
        """Add the final figures to the summary, and upload the encoder."""
        import wandb

        self.run.summary.update(dict(results))
        if encoder:
            artifact = wandb.Artifact(f"encoder-{self.identity.id}", type="model")
            for path in sorted(encoder.iterdir()):
                artifact.add_file(str(path), policy="immutable")
            self.run.log_artifact(artifact)

    def finish(self, status: int) -> None:
        """End the run as finished, failed, or, where it can be resumed, preempted."""
        import wandb

        # wandb has lost the best of the starts before this one.
        axes = ("step", "epoch")
        self.run.summary.update({k: v for k, v in self._figures.items() if k not in axes})
        if status == StoppedError.exit_status:
            self.run.mark_preempting()
        folder = self.run.settings.sync_dir
        try:
            self.run.finish(exit_code=status)
        except TimeoutError:
            self.say(f"W&B: not all was uploaded in time; upload it by: wandb sync {folder}")
        wandb.teardown()  # now, as at the exit of the process it would be unbounded
        self._check_file(self._sent)

    def kill(self) -> None:
        """End wandb's own process: whatever waits for it gets an error."""
        with suppress(Exception):  # a detail of wandb, which has no word for this
            import wandb

            wandb.setup()._connection._proc._process.kill()  # type: ignore[union-attr]

    def leave(self) -> None:
        """Forget the session, so that the exit of this process doesn't come back to it."""
        with suppress(BaseException):
            import wandb

            wandb.teardown()


def _variable(setting: str) -> str:
    """Return the name of a setting in W&B's variables, without WANDB_."""
    return setting.replace("x_", "_", 1).upper() if setting.startswith("x_") else setting.upper()
