"""A small terminal: runs a command in a pseudo-terminal and keeps the screen that a person sees."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# What rich sends: cursor up, erase line, colours, cursor shown or hidden.
CODE = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])")
ROOT = Path(__file__).parent.parent


class Screen:
    """The lines that a terminal of `width` columns has shown, with those that scrolled away."""

    def __init__(self, width: int) -> None:
        self.width, self.lines, self.cursor = width, [""], True
        self._row, self._column = 0, 0

    def write(self, text: str) -> None:
        """Take what a program sends; AssertionError for a code that is not known here."""
        while text:
            if found := CODE.match(text):
                self._obey(*found.groups())
                text = text[found.end() :]
                continue
            character, text = text[0], text[1:]
            assert character != "\x1b", repr(text[:20])
            if character == "\r":
                self._column = 0
            elif character == "\n":
                self._down()
            else:
                self._put(character)

    def _obey(self, private: str, number: str, letter: str) -> None:
        if letter == "A":
            self._row = max(0, self._row - int(number or 1))
        elif letter == "K":
            assert number == "2"
            self.lines[self._row] = ""
        elif private:
            assert number == "25"
            self.cursor = letter == "h"
        else:
            assert letter == "m"

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self.lines):
            self.lines.append("")

    def _put(self, character: str) -> None:
        if self._column == self.width:
            self._column = 0
            self._down()
        line = self.lines[self._row].ljust(self._column)
        self.lines[self._row] = line[: self._column] + character + line[self._column + 1 :]
        self._column += 1


def run(
    command: Sequence[str],
    width: int = 80,
    until: Callable[[Screen], bool] = lambda screen: False,
    keys: bytes = b"",
    timeout: float = 600,
) -> tuple[int, Screen]:
    """Return exit status and screen of a command in a terminal; `keys` are typed at `until`."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    environment |= {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"}
    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    screen, rest, typed = Screen(width), b"", False
    deadline = time.monotonic() + timeout
    while True:
        if time.monotonic() > deadline:
            process.kill()
            raise TimeoutError("\n".join(screen.lines))
        if not select.select([master], [], [], 0.2)[0]:
            continue
        try:
            rest += os.read(master, 65536)
        except OSError:  # the other side is closed
            break
        if not rest:
            break
        # Only whole characters and codes.
        end = rest.rfind(b"\x1b") if re.search(rb"\x1b[^A-Za-z]*$", rest) else len(rest)
        try:
            text = rest[:end].decode()
        except UnicodeDecodeError as error:
            end = error.start
            text = rest[:end].decode()
        rest = rest[end:]
        screen.write(text)
        if not typed and keys and until(screen):
            os.write(master, keys)
            typed = True
    os.close(master)
    return process.wait(timeout=30), screen
