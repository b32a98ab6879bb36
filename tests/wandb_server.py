"""A W&B server on loopback: what a run, `wandb sync`, `sweep` and `agent` of wandb 0.31 ask."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import yaml

PROJECT = {"id": "p", "name": "project", "entity": {"id": "e", "name": "me"}}
DAY = "2026-01-01T00:00:00"
LISTED = dict[str, object](__typename="Project", id="p", name="moco_dist", entityName="me")
LISTED |= {"createdAt": DAY, "isBenchmark": False, "user": None}
LAST = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}


class WandbServer:
    """Runs by their ids, with history, summary and configuration."""

    def __init__(self) -> None:
        self.lines: dict[str, dict[str, dict[int, str]]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        # Configurations of sweeps by their ids, and the places in their grids that are begun.
        self.sweeps: dict[str, dict[str, Any]] = {}
        self.begun: dict[str, list[str]] = {}
        self.reports: list[dict[str, Any]] = []
        self.mute = False  # while set, nothing is answered
        outer = self

        class Handler(_Handler):
            server_state = outer

        self._http = _Server(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.environment = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "a" * 40}
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def history(self, run: str) -> list[dict[str, Any]]:
        """Return the rows of a run in the order of their places."""
        lines = self.lines.get(run, {}).get("wandb-history.jsonl", {})
        return [json.loads(lines[place]) for place in sorted(lines)]

    def summary(self, run: str) -> dict[str, Any]:
        """Return the newest summary of a run."""
        summary = self.lines.get(run, {}).get("wandb-summary.json", {})
        found: dict[str, Any] = json.loads(summary[0]) if summary else {}
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def answer(self, path: str, body: bytes) -> Any:
        """Return the answer to a POST."""
        if path == "/graphql":
            question = json.loads(body)
            operation = question.get("operationName") or re.findall(r"\w+", question["query"])[1]
            return {"data": self._graphql(operation, question.get("variables") or {})}
        if path.endswith("/file_stream"):
            run = path.split("/")[-2]
            content = json.loads(body)
            for name, part in (content.get("files") or {}).items():
                lines = self.lines.setdefault(run, {}).setdefault(name, {})
                for place, line in enumerate(part["content"], start=part["offset"]):
                    lines[place] = line
            if "exitcode" in content:
                self.runs[run]["exit"] = content["exitcode"]
            if content.get("preempting"):
                self.runs[run]["preempting"] = True
        return {}

    def _graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        if operation == "RunResumeStatus":
            run = variables["name"]
            return {"model": {"id": "m", "name": "p", "bucket": self._resumable(run)}}
        if operation == "UpsertBucket":
            run = variables["name"]
            kept = {key: value for key, value in variables.items() if value is not None}
            self.runs.setdefault(run, {}).update(kept)
            bucket = {"id": run, "name": run, "displayName": run, "description": ""}
            bucket |= {"config": "{}", "project": PROJECT, "sweepName": None}
            bucket |= {"historyLineCount": len(self.history(run))}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            place = f"{self.url}/upload/{variables['run']}"
            files = [{"name": n, "uploadUrl": f"{place}/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if operation == "UpsertSweep":
            name = f"sweep{len(self.sweeps)}"
            self.sweeps[name] = yaml.safe_load(variables["config"])
            sweep = {"name": name, "project": PROJECT}
            return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}
        if operation == "SweepWithRuns":
            name = variables["sweep"]
            config = yaml.safe_dump(self.sweeps[name])
            sweep = {"id": name, "name": name, "config": config, "runs": {"edges": []}}
            return {"project": {"sweep": sweep}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": variables["sweep"]}}}
        if operation == "Heartbeat":
            commands = [] if json.loads(variables["runState"]) else [self._next(variables["id"])]
            answer = {"agent": {"id": "a"}, "commands": json.dumps(commands)}
            return {"agentHeartbeat": answer}
        if operation == "ProjectInternalId":
            return {"project": {"id": "p", "internalId": "1"}}
        if operation == "GetProjects":
            return {"models": {"edges": [{"node": LISTED, "cursor": ""}], "pageInfo": LAST}}
        if operation == "upsertView":
            self.reports.append(variables)
            view = {name: variables[name] for name in ("name", "type", "spec", "displayName")}
            view |= {"id": "r", "description": "", "project": LISTED, "updatedAt": DAY}
            return {"upsertView": {"view": view, "inserted": True}}
        viewer = {
            "id": "v",
            "flags": "{}",
            "entity": "me",
            "username": "me",
            "teams": {"edges": []},
        }
        return {"serverInfo": {"features": []}, "viewer": viewer}

    def _next(self, sweep: str) -> dict[str, Any]:
        """Return what an agent does next: the next run of the grid, or the end."""
        config, begun = self.sweeps[sweep], self.begun.setdefault(sweep, [])
        axes = {k: v.get("values", [v.get("value")]) for k, v in config["parameters"].items()}
        grid = list(itertools.product(*axes.values()))
        if len(begun) == len(grid):
            return {"type": "exit"}
        args = {k: {"value": v} for k, v in zip(axes, grid[len(begun)], strict=True)}
        begun.append(f"{sweep}run{len(begun)}")
        program = config.get("program", "")
        return {"type": "run", "run_id": begun[-1], "program": program, "args": args}

    def _resumable(self, run: str) -> dict[str, Any] | None:
        if run not in self.runs:
            return None
        rows = self.history(run)
        counts = {
            f"{kind}LineCount": len(self.lines.get(run, {}).get(name, {}))
            for kind, name in (("history", "wandb-history.jsonl"), ("events", "wandb-events.jsonl"))
        }
        tail = [json.dumps(row) for row in rows[-1:]]
        names = {"id": run, "name": run, "displayName": run, "tags": [], "wandbConfig": '{"t": 1}'}
        tails = {"historyTail": json.dumps(tail), "eventsTail": "[]", "logLineCount": 0}
        found = {"summaryMetrics": json.dumps(self.summary(run))}
        return {**counts, **names, **tails, **found, "config": self.runs[run].get("config", "{}")}


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that leave."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: WandbServer

    def do_POST(self) -> None:
        body = self._body()
        if self.server_state.mute:
            threading.Event().wait(60)
        self._send(self.server_state.answer(self.path, body))

    def do_PUT(self) -> None:
        self._body()
        self._send({})

    def do_GET(self) -> None:
        self._send({})

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _send(self, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
