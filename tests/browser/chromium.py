"""A headless Chromium, driven over a pipe by the DevTools protocol without another library."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--remote-debugging-pipe"),
)
SECONDS = 120.0


class Chromium:
    """One page of a browser; `events` holds the browser's messages that are no answers."""

    def __init__(self, profile: Path) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()

        def as_3_and_4() -> None:
            # The browser reads from 3 and writes to 4. Both ends are duplicated first, because
            # they may themselves be 3 or 4.
            copies = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(copies[0], 3)
            os.dup2(copies[1], 4)

        self._process = subprocess.Popen(
            ["chromium", *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=as_3_and_4,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out, self._rest = ours_in, ours_out, b""
        self._number, self._session = 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = session["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        os.close(self._in)
        os.close(self._out)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return the answer to a command of the protocol."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                found: dict[str, Any] = answer["result"]
                return found
            self.events.append(answer)
        raise AssertionError(f"{method}: no answer in {SECONDS:.0f} s")

    def _messages(self) -> Iterator[dict[str, Any]]:
        until = time.monotonic() + SECONDS
        while (left := until - time.monotonic()) > 0:
            message, end, rest = self._rest.partition(b"\0")
            if end:
                self._rest = rest
                yield json.loads(message)
            elif select.select([self._in], [], [], left)[0]:
                read = os.read(self._in, 1 << 20)
                assert read, "the browser ended"
                self._rest += read

    def open(self, url: str) -> None:
        """Go to a page and wait until it and its pictures are loaded."""
        self.ask("Page.navigate", url=url)
        for event in self._messages():
            self.events.append(event)
            if event.get("method") == "Page.loadEventFired":
                break
        self.script("Promise.all([...document.images].map(image => image.decode()))")

    def script(self, expression: str) -> Any:
        """Return the value of an expression in the page."""
        wanted: dict[str, Any] = {"awaitPromise": True, "returnByValue": True}
        found = self.ask("Runtime.evaluate", expression=expression, **wanted)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def show_as(self, width: int, height: int, scheme: str, phone: bool = False) -> None:
        """Show the page light or dark in a window with these sizes in CSS pixels."""
        size: dict[str, Any] = {"width": width, "height": height}
        size["deviceScaleFactor"] = 2 if phone else 1
        self.ask("Emulation.setDeviceMetricsOverride", **size, mobile=phone)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.ask("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path: Path) -> None:
        """Save the whole page as a PNG."""
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def told(self, method: str) -> list[dict[str, Any]]:
        """Return the parameters of all events of this name."""
        return [event["params"] for event in self.events if event.get("method") == method]
