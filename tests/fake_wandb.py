"""A W&B server of a hundred lines on loopback: keeps the history that W&B's own program sends, and may fall silent."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeWandb(ThreadingHTTPServer):
    """history: the rows as they arrived; uploads: names of files; is_mute: takes every request and never answers it."""

    daemon_threads = True

    def __init__(self, *, is_mute: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.is_mute = is_mute
        self.swallows_answers = False  # to rows of history: they are kept, but the sender never hears of it
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.upserted: list[dict[str, Any]] = []
        self.uploads: list[str] = []
        self.bodies: list[bytes] = []
        self.operations: list[str] = []
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: Any) -> None:
        pass  # W&B's program hangs up when it is ended

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def close(self) -> None:
        self.is_mute = False
        self.released.set()
        self.shutdown()
        self.server_close()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            for name, part in json.loads(body).get("files", {}).items():
                if name == "wandb-history.jsonl":
                    rows = [json.loads(line) for line in part["content"]]
                    self.history = self.history[: part["offset"]] + rows
                if name == "wandb-summary.json":
                    self.summary |= json.loads(part["content"][-1])
            return {}
        if path != "/graphql":
            return {}
        request = json.loads(body)
        name, given = request.get("operationName"), request.get("variables", {})
        self.operations.append(str(name))
        if name == "RunResumeStatus":
            tail = [json.dumps(self.history[-1])] if self.history else []
            bucket = {"id": "b", "name": given["name"], "summaryMetrics": json.dumps(self.summary), "displayName": "d",
                      "tags": [], "logLineCount": 0, "historyLineCount": len(self.history), "eventsLineCount": 0,
                      "notes": "", "historyTail": json.dumps(tail), "eventsTail": "[]", "config": "{}",
                      "wandbConfig": json.dumps({"t": 1})}  # fmt: skip
            return {"data": {"model": {"id": "m", "name": "p", "entity": {"id": "e", "name": "me"},
                                       "bucket": bucket if self.upserted else None}}}  # fmt: skip
        if name == "UpsertBucket":
            self.upserted.append(given)
            project = {"id": "m", "name": given["project"] or "p", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": given["name"] or "n", "displayName": given["displayName"], "description": "",
                      "config": "{}", "sweepName": None, "historyLineCount": len(self.history), "project": project}  # fmt: skip
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": len(self.upserted) == 1}}}
        if "viewer" in request["query"]:
            return {"data": {"viewer": {"id": "u", "username": "me", "entity": "me", "email": "", "flags": "{}", "admin": False,
                                        "teams": {"edges": []}}}}  # fmt: skip
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in given["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        return {"errors": [{"message": f"{name} is not known here"}]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeWandb

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.bodies.append(body)
        if self.server.is_mute:
            self.server.released.wait()
            return
        content = json.dumps(self.server.answer(self.path, body)).encode()
        if self.server.swallows_answers and self.path.endswith("/file_stream"):
            self.server.released.wait()
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_PUT(self) -> None:
        self.server.uploads.append(self.path.removeprefix("/upload/"))
        self.do_POST()

    do_GET = do_POST
