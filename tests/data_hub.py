"""A stand-in for the Hugging Face hub on the loopback, as far as data sets are read from it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# The only commit of each repository.
COMMIT = "1" * 40


@contextlib.contextmanager
def serving(root: Path) -> Iterator[str]:
    """Serve the data sets ROOT/OWNER/NAME; yield the address for HF_ENDPOINT."""

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path.removeprefix("/api").removeprefix("/datasets/")
            owner, name, verb, _, inner = [*path.split("/", 4), "", "", "", ""][:5]
            repository = root / owner / name
            place = repository / inner
            if not name or not repository.is_dir():
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif verb == "resolve" and place.is_file():
                content = place.read_bytes()
                self.answer(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
            elif verb == "tree" and place.is_dir():
                self.answer(200, json.dumps([entry(repository, each) for each in place.iterdir()]))
            elif verb == "revision":
                files = [str(file.relative_to(repository)) for file in repository.rglob("*.*")]
                siblings = [{"rfilename": file} for file in files]
                about = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings, "tags": []}
                self.answer(200, json.dumps(about))
            else:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

        def answer(
            self, status: int, content: bytes | str, headers: dict[str, str] | None = None
        ) -> None:
            content = content.encode() if isinstance(content, str) else content
            self.send_response(status)
            for key, value in {"X-Repo-Commit": COMMIT, **(headers or {})}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(repository: Path, path: Path) -> dict[str, Any]:
    """Return what the hub says of a file or folder."""
    kind = "directory" if path.is_dir() else "file"
    size = 0 if path.is_dir() else path.stat().st_size
    return {"type": kind, "oid": "0" * 40, "size": size, "path": str(path.relative_to(repository))}
