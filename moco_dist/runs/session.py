"""A run from start to end: Accelerator, run directory, lock, saves, stops, status."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from moco_dist.config import yaml_files
from moco_dist.config.probe import ProbeConfig
from moco_dist.config.recipe import PretrainConfig
from moco_dist.distributed import comms, faults, peers, stopping
from moco_dist.distributed.stopping import StopRequests
from moco_dist.errors import ConfigError, DataError, NumbersError, StoppedError, output_errors
from moco_dist.runs import checkpoint, identity, launch, saving
from moco_dist.runs.environment import environment, keep_freed_memory
from moco_dist.runs.lock import RunLock
from moco_dist.runs.saving import Saver
from moco_dist.runs.status import note_outcome, replace, write_status

logger = logging.getLogger(__name__)

# Seconds by which NCCL's watchdog, which aborts a process without a word, comes later than our own.
WATCHDOG = 60.0
# What ends a run with the state after a whole step on all processes.
EndedError = StoppedError | NumbersError | DataError

# Names and values of what depends on the length of a run: a function of the epochs and a step.
Schedule = Callable[[int, int], Mapping[str, float]]

# The locks that this process holds.
_held: dict[Path, RunLock] = {}


@dataclass(frozen=True)
class Session:
    """A run apart from what it trains."""

    accelerator: Accelerator
    settings: PretrainConfig | ProbeConfig
    # The run directory, runs/<name>.
    directory: Path
    # The newest whole checkpoint; None in a new run.
    resumed: checkpoint.Checkpoint | None
    finished: bool
    stop: StopRequests
    saver: Saver
    run_id: str

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return cast(torch.device, self.accelerator.device)

    def close(self) -> None:
        """Release the run directory; a command does so at its end."""
        self.stop.on_end(0, "", False)

    def stop_for(self, request: int) -> None:
        """Raise, on all processes, the error for `request`, on which all agree."""
        if request == stopping.FAILED:
            faults.agree()
            peers.from_main(self.saver.finish)
        elif request:
            raise stopping.error(request, f"at step {peers.me.step}").on_all()

    def request(self) -> int:
        """Return the request to this process, 0 for none."""
        failed = self.saver.failed or faults.pending()
        return stopping.FAILED if failed else self.stop.poll()

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        wait: bool,
    ) -> None:
        """Save the state after `step` steps in the background, or `wait` until it is on disk.

        In the background the tensors must not change until `saver.copied` has returned. The id and
        the configuration of the run join the `state`.
        """
        state = {**state, "run_id": self.run_id, "config": yaml_files.to_dict(self.settings)}
        self.stop.saving = wait or comms.is_main()  # the previous save may need long
        if comms.is_main():
            self.saver.start(step, model, optimizer, state)
        if wait:
            peers.from_main(self.saver.finish)
        self.stop.saving = False

    def pause(self, doing: str) -> None:
        """Raise StoppedError on all processes if one was asked to stop; a collective."""
        peers.me.mark(peers.me.step, doing)
        asked = self.request()
        if comms.world_size() > 1:  # a process alone has no reason to wait for its device
            asked = max(comms.all_gather(torch.tensor([asked], device=self.device)).tolist())
        self.stop_for(asked)


def join(settings: PretrainConfig | ProbeConfig) -> Accelerator:
    """Return the Accelerator of this process, with PyTorch set up, once all processes have met.

    Raises ConfigError if the device or the number of processes is not that of `settings`, and
    UserError if `settings` differ between processes.
    """
    machine = settings.runtime
    if machine.device == "cuda" and not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise ConfigError(
            f"runtime.device=cuda, but PyTorch sees no GPU on {platform.node()} "
            f"(CUDA_VISIBLE_DEVICES={visible}); check its driver with nvidia-smi, use another "
            "machine, or give runtime.device=cpu"
        )
    spare = WATCHDOG if comms.uses_gpus(machine.device == "cpu") else 0.0
    accelerator = launch.accelerator(
        machine.device, machine.timeout_seconds, settings.precision, spare, machine.gradients
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if not comms.is_main():
        logging.disable(logging.WARNING)
    # PyTorch's own choice for convolutions would be TF32.
    torch.backends.cudnn.allow_tf32 = settings.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = settings.precision == "tf32"
    torch.backends.cudnn.benchmark = not machine.deterministic
    if machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # It would fill every new tensor first; nothing here reads one unwritten.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    peers.me.join(machine.timeout_seconds)
    wanted, got = machine.processes, comms.world_size()
    if wanted not in (0, got):
        raise ConfigError(
            f"runtime.processes={wanted} and {got} took part; start that many (on CPUs: "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes "
            f"{wanted} -m ...)"
        )
    peers.same_everywhere("the configuration", yaml_files.flat(yaml_files.to_dict(settings)))
    return accelerator


def start(
    settings: PretrainConfig | ProbeConfig,
    stop: StopRequests | None = None,
    encoder: str | None = None,
) -> Session:
    """Join the processes, open the run directory and find its newest checkpoint; a collective.

    `encoder` is the id of the run that a probe measures.
    """
    stop, machine, accelerator = stop or StopRequests(), settings.runtime, join(settings)
    directory = Path(settings.output).expanduser() / settings.name
    lock = peers.together(lambda: _take(directory, stop) if comms.is_main() else None)
    watched, end = (directory, launch.job_end()) if comms.is_main() else (None, None)
    stop.limit(watched, machine.max_hours, machine.grace_seconds, end)
    resumed = checkpoint.newest(directory, set_aside=True)
    finished = peers.from_main(lambda: _require_same(directory, settings, resumed))
    state = resumed.state if resumed else None
    run_id = peers.from_main(lambda: identity.run_id(directory, settings.name, state, encoder))
    saver = Saver(directory, settings.checkpoint, unless=lock.check if lock else lambda: None)
    if resumed:
        saver.place = resumed.step, resumed.state.get("evaluated")
    # When another process has failed, a save in flight can still be finished.
    stop.flush = partial(saver.join, machine.grace_seconds)
    return Session(accelerator, settings, directory, resumed, finished, stop, saver, run_id)


def _take(directory: Path, stop: StopRequests) -> RunLock:
    """Become the only writer of the run directory until the run ends."""
    with output_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    # A Python program may start several runs, and one that failed has left its lock behind.
    if before := _held.pop(directory.resolve(), None):
        before.release()
    lock = _held[directory.resolve()] = RunLock(directory)

    def end(status: int, text: str, again: bool) -> None:
        if status == 0 or not (directory / "DONE").exists():  # refusing a finished run leaves it so
            with suppress(OSError):
                write_status(directory, status, peers.me.step, text, again)
        note_outcome(status, peers.me.step, text, again)
        lock.release()

    stop.on_end = end
    saving.clean(directory)
    return lock


def _require_same(
    directory: Path, settings: PretrainConfig | ProbeConfig, resumed: checkpoint.Checkpoint | None
) -> bool:
    """Return whether the run is done; ConfigError if it has another configuration."""
    if resumed and (changed := yaml_files.changed_keys(resumed.piece("config"), settings)):
        raise ConfigError(
            f"{directory} holds a run with another configuration ({'; '.join(changed)}); "
            "restore that configuration to resume the run, or choose name=... for a new one"
        )
    return (directory / "DONE").exists()


def begin(session: Session, schedule: Schedule = lambda epochs, step: {}) -> str:
    """Record this launch in the run directory; from here on signals are obeyed between steps.

    Returns a sentence, which was also given as a warning, if the run has another length than
    before and so goes on at another place of its `schedule`, and otherwise an empty text.
    """
    session.stop.raise_at_once()
    session.stop.at_once = False
    try:
        session.pause("starting")
    except StoppedError as error:
        end_early(session, error, "nothing has begun")
    peers.me.training = True

    run, (change, jump) = session.directory, _changed_length(session, schedule)
    if jump:
        logger.warning(jump)

    @output_errors(run)
    def write() -> None:
        (run / "DONE").unlink(missing_ok=True)
        text = yaml_files.to_yaml(session.settings)
        comments = [*_comments(run / "config.yaml"), *change] if session.resumed else []
        replace(
            run / "config.yaml", "".join(f"{line}\n" for line in dict.fromkeys(comments)) + text
        )
        replace(run / "environment.json", json.dumps(environment(), indent=1))
        write_status(run, None, peers.me.step, "")

    peers.from_main(write)
    return jump


def _changed_length(session: Session, schedule: Schedule) -> tuple[list[str], str]:
    """Return a comment for config.yaml if this launch changes the length of the run.

    Also a sentence if the step then has other settings than in a run of the length before.
    """
    saved, now = session.resumed, session.settings.epochs
    if not saved or (before := saved.piece("config")["epochs"]) == now:
        return [], ""
    step = saved.step
    last, planned, new = schedule(before, step - 1), schedule(before, step), schedule(now, step)
    jumps = [f"{k} from {last[k]:.3g} to {new[k]:.3g}" for k in new if new[k] != planned[k]]
    sentence = (
        f"epochs={now} was {before} until step {step}, so {' and '.join(jumps)} in one step; this "
        f"run will differ from one of {now} epochs from the start, for which give name=...; "
        "config.yaml notes it"
    )
    comment = f"# epochs was {before} before; it is {now} from step {step} on"
    return [comment], sentence if jumps else ""


def _comments(path: Path) -> list[str]:
    """Return the comments at the head of a configuration, which earlier launches wrote."""
    with suppress(OSError, ValueError):
        return list(takewhile(lambda line: line.startswith("# "), path.read_text().splitlines()))
    return []


def end_early(session: Session, error: EndedError, place: str) -> NoReturn:
    """Raise `error` on all processes with `place`, which says what is saved; note its details."""

    @output_errors(session.directory)
    def write() -> None:
        (session.directory / "STOP").unlink(missing_ok=True)  # it has been obeyed
        if isinstance(error, NumbersError):
            text = json.dumps(dict(error.details), indent=1)
            replace(session.directory / "not_finite.json", text + "\n")

    peers.from_main(write)
    resumes = "" if isinstance(error, NumbersError) else "; the same command resumes from there"
    ended = type(error)(f"{error}: {place}{resumes}")
    ended.again = error.again
    raise ended.on_all() from error


def finish(session: Session, results: dict[str, Any]) -> None:
    """Mark the run as done, with its results as JSON in DONE."""
    content = json.dumps(results, indent=1) + "\n"
    write = output_errors(session.directory)(lambda: replace(session.directory / "DONE", content))
    peers.from_main(write)
