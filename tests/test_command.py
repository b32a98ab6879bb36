"""A command ends once, with its exit status, whatever comes as it exits."""

from __future__ import annotations

import subprocess
import sys

# Fails, and is sent SIGTERM as soon as its exit begins.
SCRIPT = """
import os, signal
from moco_dist.runs import command
from moco_dist.config.recipe import PretrainConfig

end = command._end

def signalled(error, stop):
    if not isinstance(error, command.StoppedError):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass
    end(error, stop)

command._end = signalled

def run(config, stop):
    raise RuntimeError("lost another process")

command.main(PretrainConfig, run, None)
"""


def test_a_signal_during_the_exit_is_no_traceback() -> None:
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 75, result
    assert result.stderr == "stopped by SIGTERM before the first step\n"


# As threads of a library do now and then, libc aborts the process while it ends Python.
ABORTED = """
import atexit, ctypes
from moco_dist.runs import command
from moco_dist.config.recipe import PretrainConfig

libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)

def run(config, stop):
    atexit.register(print, "a library has ended")
    print("done", end=" ")

command.main(PretrainConfig, run, None, [])
"""


def test_a_run_that_is_done_is_not_failed_by_a_library_that_ends_badly() -> None:
    result = subprocess.run([sys.executable, "-c", ABORTED], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "done a library has ended\n"), result
    plain = ABORTED.replace("command.main(PretrainConfig, run, None, [])", "run(None, None)")
    result = subprocess.run([sys.executable, "-c", plain], capture_output=True, text=True)
    assert result.returncode == -6, result  # without the command it is
