"""A hub on loopback: what huggingface_hub 2.4 asks to create, commit to and read repositories.

Files of more than `LARGE` bytes are sent by Git LFS, so HF_HUB_DISABLE_XET must be set.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

import yaml

LARGE = 10_000
TOKENS = {"hf_writes": "me", "hf_reads": "reader"}


@dataclass
class Repository:
    """A repository with its commits, of which each is all files at that point."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit with these files; return its id."""
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits.append((oid, files))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit of a revision, None if there is none."""
        found = [each for each in self.commits if revision in ("main", each[0])]
        return found[-1] if found else None


class HubServer:
    """Repositories by OWNER/NAME; `fails` maps a part of a path to a status and a message."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.fails: dict[str, tuple[int, str]] = {}
        self.ignored: set[str] = set()
        outer = self

        class Handler(_Handler):
            hub = outer

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.environment = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1"}
        self.environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "hf_writes"}
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def created(self, content: Any, user: str) -> tuple[int, Any]:
        """Answer a request for a new repository."""
        name = f"{content['organization'] or user}/{content['name']}"
        if user == "reader" or name.partition("/")[0] not in (user, "team"):
            return 403, f"You don't have the rights to create a model under the namespace {name}"
        if name in self.repositories:
            return 409, "You already created this model repo"
        made = self.repositories[name] = Repository(content["visibility"] == "private")
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return 200, {"url": f"{self.url}/{name}", "name": name}

    def committed(self, repository: Repository, name: str, lines: bytes) -> tuple[int, Any]:
        """Answer a commit, each line of which is a JSON object with key and value."""
        head, files = repository.commits[-1]
        files = dict(files)
        for line in lines.splitlines():
            content = json.loads(line)
            key, value = content["key"], content["value"]
            if key == "header" and value.get("parentCommit") not in (None, head):
                return 412, "A commit has happened since. Please refresh and try again."
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files)
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_GET(self) -> None:
        self._answer(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    do_PUT = do_POST

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _answer(self, body: bytes) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        for part, (status, message) in self.hub.fails.items():
            if part in path:
                self._send(status, message)
                return
        user = TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if path == "/api/whoami-v2":
            self._send(*((200, {"name": user, "orgs": [{"name": "team"}]}) if user else (401, "")))
        elif path == "/api/repos/create":
            assert user
            self._send(*self.hub.created(json.loads(body), user))
        elif path == "/api/validate-yaml":
            _, header, _ = json.loads(body)["content"].split("---\n", 2)
            assert isinstance(yaml.safe_load(header)["tags"], list)
            self._send(200, {"errors": [], "warnings": []})
        elif put := re.fullmatch("/upload/(.+)", path):
            assert hashlib.sha256(body).hexdigest() == put[1]
            self.hub.objects[put[1]] = body
            self._send(200, {})
        else:
            self._of_repository(path, body, user)

    def _of_repository(self, path: str, body: bytes, user: str | None) -> None:
        asked = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+?)(\.git/.*|/.*)?", path)
        name, rest = (asked[1], asked[2] or "") if asked else ("", "")
        repository = self.hub.repositories.get(name)
        if not repository or (repository.private and not user):
            self._send(404 if user else 401, "Repository not found", "RepoNotFound")
        elif rest.endswith("objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [{"upload": {"href": f"{self.hub.url}/upload/{o['oid']}"}} for o in objects]
            found = [o | {"actions": a} for o, a in zip(objects, upload, strict=True)]
            self._send(200, {"transfer": "basic", "objects": found})
        elif rest.startswith("/preupload/"):
            ignored = self.hub.ignored
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] > LARGE else "regular",
                    "shouldIgnore": file["path"] in ignored,
                }
                for file in json.loads(body)["files"]
            ]
            self._send(200, {"files": modes})
        elif rest.startswith("/commit/"):
            self._send(*self.hub.committed(repository, name, body))
        elif rest.startswith("/resolve/"):
            _, _, revision, file = rest.split("/", 3)
            self._file(repository, revision, file)
        else:
            self._info(repository, name, rest)

    def _info(self, repository: Repository, name: str, rest: str) -> None:
        """Answer what a repository holds, as information or as a tree."""
        asked = re.fullmatch("(?:/(tree|revision)/([^/]+).*)?", rest)
        found = repository.at(asked[2] or "main") if asked else None
        if not asked or not found:
            self._send(404, "Revision not found", "RevisionNotFound")
        elif asked[1] == "tree":
            self._send(
                200,
                [
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for p, c in found[1].items()
                ],
            )
        else:
            siblings = [{"rfilename": p, "size": len(c)} for p, c in found[1].items()]
            about = {"id": name, "sha": found[0], "private": repository.private}
            self._send(200, about | {"siblings": siblings})

    def _file(self, repository: Repository, revision: str, file: str) -> None:
        found = repository.at(revision)
        content = found[1].get(file) if found else None
        if content is None:
            self._send(404, "Entry not found", "EntryNotFound")
            return
        assert found
        self._send(200, content, commit=found[0])

    def _send(self, status: int, content: Any, code: str = "", commit: str = "") -> None:
        answer = {"error": content} if status >= 400 else content
        data = content if isinstance(content, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if commit:
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        if status >= 400:
            self.send_header("X-Error-Message", str(content))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
