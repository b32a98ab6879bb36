"""Reasons a command stops early, each with a one-sentence message and an exit status."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

# Exit statuses, after sysexits.h, and the word for each in status.json.
STATES = {
    0: "done",
    1: "faults found",
    65: "data",
    66: "missing",
    69: "unavailable",
    70: "internal",
    71: "machine",
    73: "in use",
    74: "output",
    75: "stopped",
    77: "denied",
    78: "configuration",
    130: "interrupted",
}


class UserError(Exception):
    """A reason to stop that a user can act on; its text has the value, the rule and the fix."""

    exit_status = 70
    shared = False
    # Whether the same command, started again by a machine, is likely to succeed.
    again = False

    def on_all(self) -> Self:
        """Return this error marked as raised on all processes: only the first one prints it."""
        self.shared = True
        return self


class ConfigError(UserError):
    """A key, type, value or combination that the configuration does not allow (EX_CONFIG)."""

    exit_status = 78


class FaultsError(UserError):
    """Findings of the doctor that will stop or spoil the run."""

    exit_status = 1


class DataError(UserError):
    """Data or a checkpoint that exists but can't be used (EX_DATAERR)."""

    exit_status = 65


class MissingError(UserError):
    """A data set, checkpoint or file that was named but doesn't exist (EX_NOINPUT)."""

    exit_status = 66


class UnavailableError(UserError):
    """Another process, a port or a service that can't be reached (EX_UNAVAILABLE)."""

    exit_status = 69
    again = True


class DeniedError(UserError):
    """A service that needs a login, or a right that this login doesn't have (EX_NOPERM)."""

    exit_status = 77


class MachineError(UserError):
    """A limit of the machine that is reached: open files, memory, processes (EX_OSERR)."""

    exit_status = 71
    again = True


class OutputError(UserError):
    """A file or folder that can't be written (EX_IOERR)."""

    exit_status = 74


class InUseError(UserError):
    """A run directory that another job is writing (EX_CANTCREAT)."""

    exit_status = 73


class PeerError(UserError):
    """Another process of the run that died, stalled or is at another step (EX_SOFTWARE)."""

    again = True


class NumbersError(UserError):
    """A loss, gradient or key that is not finite, found before it reached any state."""

    # The content of not_finite.json: step, figures, samples.
    details: Mapping[str, Any] = MappingProxyType({})


class StoppedError(UserError):
    """The run was asked to stop, by a signal, a file or a clock (EX_TEMPFAIL: resume it)."""

    exit_status = 75
    again = True


class InterruptedRunError(StoppedError):
    """The run was asked to stop by SIGINT, as Ctrl-C sends it."""

    exit_status = 130
    again = False


# Limits of a machine: error numbers, words, and the fix. PyTorch and safetensors pass the words of
# the system on in errors of their own.
_LIMITS = (
    (
        (errno.EMFILE, errno.ENFILE),
        ("too many open files",),
        "open files is reached; raise it with `ulimit -n 65536`, or lower data.workers",
    ),
    (
        (errno.ENOMEM,),
        ("out of memory", "can't allocate memory", "cannot allocate memory"),
        "memory is reached; lower batch_size, data.size or data.memory_gb, raise "
        "runtime.micro_batches, or use another machine",
    ),
    (
        (errno.EAGAIN,),
        ("can't start new thread", "resource temporarily unavailable"),
        "processes and threads is reached; raise it with `ulimit -u`, or lower data.workers and "
        "OMP_NUM_THREADS",
    ),
)


def machine_error(error: BaseException | None) -> MachineError | None:
    """Return what limit of the machine an error, or one of its causes, is about; None if none."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        number = errno.ENOMEM if isinstance(error, MemoryError) else number
        text = str(error).lower() if isinstance(error, OSError | RuntimeError) else ""
        for numbers, words, fix in _LIMITS:
            if number in numbers or any(word in text for word in words):
                reason = shown(" ".join(str(error).split()) or type(error).__name__)
                return MachineError(f"this machine's limit of {fix} ({reason})")
        error = error.__cause__ or error.__context__
    return None


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number and its noun, as in "no images", "1 image"; `many` is a plural without s."""
    return f"{number or 'no':{',' if number else ''}} {one if number == 1 else many or one + 's'}"


def shown(value: object, limit: int = 300) -> str:
    """Return `value` for a message: on one line, printable, cut to 60 characters above `limit`."""
    text = str(value)
    cut = f"{text[:60]}... ({len(text)} characters)" if len(text) > limit else text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def escape_output() -> None:
    """Print what a console can't show as escapes: names in other scripts, and those of no script.

    Python would end the command with an error at such a letter.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn a failure to write into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(
            f"{path}: can't be written ({reason}); free it, or choose output=FOLDER"
        ) from error
