"""A command of the package: from its arguments to its exit status."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn, TextIO, TypeVar

from moco_dist.config import yaml_files
from moco_dist.distributed import comms, peers, stopping
from moco_dist.distributed.stopping import StopRequests
from moco_dist.errors import (
    PeerError,
    StoppedError,
    UnavailableError,
    UserError,
    escape_output,
    machine_error,
    output_errors,
)
from moco_dist.runs import launch
from moco_dist.runs.status import note_outcome

Schema = TypeVar("Schema")

COMMANDS = """\
  accelerate launch -m moco_dist.pretrain configs/pretrain/cifar10.yaml [file.yaml | key=value ...]
  accelerate launch -m moco_dist.probe configs/probe/cifar10.yaml encoder=runs/cifar10 [...]

For one process, replace "accelerate launch" by "python". For several on CPUs, replace it by
"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2".

"""
KEYS = """\
moco_dist/config explains each key. Files and overrides apply from left to right to these defaults:
"""

OTHERS_SECONDS = 5.0  # in which a launcher ends the others when the first process has failed
# The environment variable with the folder for the output of all processes but the first.
LOGS = "MOCO_DIST_LOGS"
_console: TextIO | None = None


def main(
    schema: type[Schema],
    run: Callable[[Schema, StopRequests], None],
    purpose: str | None,
    arguments: list[str] | None = None,
    commands: str = COMMANDS,
) -> None:
    """Load the configuration from `arguments`, call `run`, and exit with its status.

    With --help, print the `purpose`, the `commands` and all keys instead.
    """
    escape_output()
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        about = f"{str(purpose).strip()}\n\n{commands}{KEYS}"
        print(f"{about}\n{yaml_files.to_yaml(schema())}", end="")
        return
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    logging.captureWarnings(True)
    warnings.formatwarning = lambda message, category, filename, lineno, line=None: (
        f"{category.__name__}: {' '.join(str(message).split())} ({filename}:{lineno})"
    )
    # Threads of a library can abort a process that ends Python, after all its work is done, and the
    # launcher then calls the run failed. What libraries register from here on still runs before.
    done: list[bool] = []
    atexit.register(lambda: leave(0) if done else None)
    stop = StopRequests()
    peers.me.give_up = partial(_end, stop=stop)
    if _first():
        stop.on_end = lambda status, text, again: note_outcome(status, peers.me.step, text, again)
    try:
        try:
            stop.listen()
            _redirect()
            run(yaml_files.load(schema, arguments), stop)
        except BaseException as error:
            _end(error, stop)
    except BaseException as error:  # a signal during the end, which happens once
        _end(error, stop)
    stop.on_end(0, "", False)
    peers.me.part()
    comms.shutdown()
    done.append(True)
    sys.exit(0)


def leave(status: int) -> None:
    """Exit at once, without ending Python and its libraries one by one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _first() -> bool:
    return launch.number() == 0


def _redirect() -> None:
    """Redirect the output of processes other than the first into files of the folder `LOGS`."""
    global _console
    if (folder := os.environ.get(LOGS)) and not _first():
        with output_errors(Path(folder)):
            Path(folder).mkdir(parents=True, exist_ok=True)
            path = Path(folder, f"process_{launch.number()}.log")
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        _console = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
        for stream in (1, 2):
            os.dup2(log, stream)


def _end(error: BaseException, stop: StopRequests) -> NoReturn:
    """Print on one process why the run ends, and exit with the status for it.

    Destroying the process group could hang, so it is left as it is.
    """
    me = peers.me
    while not me.ending.acquire(blocking=False):
        time.sleep(1)  # another thread is ending the process
    if stop.request and not me.training and not (isinstance(error, UserError) and error.shared):
        # During startup a signal ends some processes before others, which then lose them.
        error = stopping.error(stop.request, "before the first step")
    elif comms.world_size() > 1 and comms.lost_connection(error):
        error = PeerError(me.blame())
    elif not isinstance(error, UserError):
        error = machine_error(error) or error
    status, text, again, speaks = UserError.exit_status, str(error), True, True
    if isinstance(error, UserError):
        status, again = error.exit_status, error.again
        lost = isinstance(error, PeerError) and not error.shared
        if lost:
            speaks = me.speaks()
        # The first process reports signals, and errors on which all agree, for all of them.
        elif error.shared or isinstance(error, StoppedError):
            speaks = _first()
        elif comms.world_size() == 1 and not _first() and not isinstance(error, UnavailableError):
            # The first one most likely fails alike, and its launcher then ends this process; one
            # that is still here has an error of its own.
            time.sleep(OTHERS_SECONDS)
        me.leave(None if lost or error.shared else text, speaks)
    else:
        text = f"{type(error).__name__}: {' '.join(text.split())}"
        me.leave(text, speaks)
        traceback.print_exception(error)
        text = (
            f"process {comms.rank()} (host {socket.gethostname()}, pid {os.getpid()}) failed at "
            f"step {me.step}, {me.doing}: {text}; a fault of moco_dist or of the machine; the "
            "last checkpoint stands"
        )
    if speaks:
        prefix = "" if isinstance(error, StoppedError) else "error: "
        for stream in filter(None, (sys.stderr, _console)):
            with suppress(OSError):  # the terminal may be gone
                print(f"{prefix}{text}", file=stream, flush=True)
    stop.flush()
    stop.on_end(status, text, again)
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(status)
