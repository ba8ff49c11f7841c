"""The board's web server: a handful of addresses, all read-only, for the browsers of this machine."""

import errno
import json
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from cifarlab.board.live import LiveRuns
from cifarlab.config import InputError
from cifarlab.report.page import assemble, read_own

PORT = 8338
TRIED = 20  # ports from that one on, when it is taken and none was asked for
MOST_KEYS = 200


class Board(ThreadingHTTPServer):
    """Serves the runs in `folder` at http://host:port/; `serve_forever` until `shutdown`.

    Answers only what asks for it by its own name, so that no page of the web reaches it through a name that leads here
    (DNS rebinding). Reads nothing but the runs in the folder, and writes nothing.

    Raises InputError when the port is taken, or the address is none of this machine's.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        self.runs = LiveRuns(folder)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        tried = [port] if port else [*range(PORT, PORT + TRIED), 0]
        for number in tried:
            try:
                super().__init__((host, number), _Handler)
                break
            except OSError as error:
                if number == tried[-1] or error.errno not in _TAKEN:
                    where = f"{host}:{port}" if port else host
                    raise InputError(f"no board can be served at {where} ({error.strerror}): choose another --port, or a --host "
                                     "of this machine") from None  # fmt: skip
        self.host = host

    @property
    def url(self) -> str:
        host = self.host if _is_named(self.host) else "localhost"
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/"

    @property
    def is_open(self) -> bool:
        """Whether other machines can reach it."""
        return not _is_loopback(self.host)

    def is_meant(self, host: str) -> bool:
        """Whether a request's Host names this server: itself, this machine, or, where it is open to others, any bare address."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in ("localhost", self.host.lower()) or _is_loopback(name):
            return True
        return self.is_open and (name == socket.gethostname().lower() or _is_address(name))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle is no news; all else is said in one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"cifarlab board: {type(error).__name__}: {error}", file=sys.stderr)


_TAKEN = (errno.EADDRINUSE, errno.EACCES, 10013)  # in use, or a port that is not for everybody (10013: so on Windows)


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return name == "localhost" or (_is_address(name) and ip_address(name).is_loopback)


def _is_named(host: str) -> bool:
    return not (_is_address(host) and ip_address(host).is_unspecified)


class _Handler(BaseHTTPRequestHandler):
    server: Board
    server_version, sys_version = "cifarlab", ""
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        try:
            if not self.server.is_meant(self.headers.get("Host", "")):
                self._answer(HTTPStatus.FORBIDDEN, "text/plain", "This board answers to its own address only.")
                return
            url = urlsplit(self.path)
            found = self._find(url.path, parse_qs(url.query, max_num_fields=100))
        except InputError as error:  # a damaged run
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", str(error))
        except Exception as error:
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain", f"{type(error).__name__}: {error}")
        else:
            if found is None:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", "There is no such run here.")
            else:
                self._answer(HTTPStatus.OK, *found)

    do_HEAD = do_GET

    def _find(self, path: str, query: dict[str, list[str]]) -> tuple[str, str] | None:
        """(type, content) of an address, or None."""
        runs, html, as_json = self.server.runs, "text/html", "application/json"
        if path == "/":
            table = [("runs", "All runs", read_own("board.html", "board"))]
            return html, assemble("cifarlab", [], table, follow=read_own("board.js", "board"), has_charts=False)
        if path == "/runs.json":
            return as_json, json.dumps(runs.table(), ensure_ascii=False)
        if path == "/compare":
            page: str | None = runs.side_by_side(query.get("run", []))
            return None if page is None else (html, page)
        kind, _, name = path.lstrip("/").partition("/")
        if kind == "run":
            page = runs.page(unquote(name), read_own("live.js", "board"))
            return None if page is None else (html, page)
        if kind == "news":
            known = frozenset(",".join(query.get("have", [])).split(",")[:MOST_KEYS])
            news = runs.news(unquote(name), known)
            return None if news is None else (as_json, news)
        return None

    def _answer(self, status: HTTPStatus, kind: str, content: str) -> None:
        body = content.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)), "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin",
            "X-Frame-Options": "DENY",
        }.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass  # the terminal is for the one line that says where to look


def serve(folder: Path, host: str, port: int) -> None:
    """Serves until Ctrl-C, and says where."""
    with Board(folder, host, port) as board:
        warning = " (other machines can read it too)" if board.is_open else ""
        print(f"board of {folder}: {board.url}{warning}\nCtrl-C ends it", flush=True)
        try:
            board.serve_forever()
        except KeyboardInterrupt:
            print()
