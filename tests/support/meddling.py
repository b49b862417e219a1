"""A proxy before an engine that meddles with answers: what a network or a sick server does to a trainer."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

COMPLETIONS = "/v1/completions"
HEALTH = "/health"
CLOSING = struct.pack("ii", 1, 0)
"""SO_LINGER without waiting: closing resets the connection."""


class Meddler:
    """Hands everything on to `target`. With a `fault` the answers to `routes` are spoilt, `times` of them, or all if
    that is None; routes of None are all but that of the health. `cut` closes every connection unheard.

    `completions` counts the prompts that were asked through it, `struck` the answers that were spoilt. `watch` hears of
    each request before it is handed on. `delay_s` is how late each answer is. With the fault `stale` the engine at
    `shadow`, which has its key, writes in the target's name.
    """

    def __init__(self, target: str):
        self.target, self.fault, self.url, self.completions = target, "", "", 0
        self.routes: Collection[str] | None = (COMPLETIONS,)
        self.times: int | None = None
        self.struck, self.delay_s, self.timeout_s = 0, 0.0, 60.0
        self.shadow: str = ""
        self.watch: Callable[[str], None] = lambda _path: None
        self._version = 0
        self._lock = threading.Lock()

    def heal(self) -> None:
        self.fault, self.routes, self.times, self.delay_s = "", (COMPLETIONS,), None, 0.0

    def fault_of(self, path: str) -> str:
        """What is done to this answer; "" for nothing."""
        with self._lock:
            route = path.partition("?")[0]
            meant = route != HEALTH if self.routes is None else route in self.routes
            if not self.fault or not (meant or self.fault == "cut") or self.times == 0:
                return ""
            self.times = None if self.times is None else self.times - 1
            self.struck += 1
            return self.fault

    def spoil(self, fault: str, status: int, content: bytes) -> tuple[int, bytes, int]:
        """(status, content, announced length)."""
        if fault == "error":
            return 500, b'{"error": {"message": "out of memory"}}', 39
        if fault == "truncated":
            return status, content[: len(content) // 2], len(content)
        if fault == "garbage":
            return status, b"<html>", 6
        if fault == "another shape":
            return status, b'{"choices": [{"index": 0}]}', 27
        if fault == "old version":
            content = _with_version(content, 1)
        if fault == "version before":
            content = _with_version(content, self._version - 1)
        if fault == "stale":
            content = _with_version(content, self._version)
        return status, content, len(content)

    def told(self, path: str) -> None:
        """Remember the version that the engine is to use."""
        parts = urlsplit(path)
        if parts.path in ("/finish_weight_update", "/update_weights"):
            self._version = int(parse_qs(parts.query).get("version", [self._version])[0])


def _with_version(content: bytes, version: int) -> bytes:
    """An answer that says this version in every place where it says one."""
    answer: Any = json.loads(content)
    for choice in answer.get("choices", []):
        choice["weight_versions"] = [version, version]
        choice.pop("token_versions", None)
    if "version" in answer:
        answer["version"] = version
    return json.dumps(answer).encode()


@contextlib.contextmanager
def meddling(target: str) -> Iterator[Meddler]:
    meddler = Meddler(target)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.hand_on(b"")

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            meddler.told(self.path)
            self.hand_on(self.rfile.read(length))

        def hand_on(self, body: bytes) -> None:
            meddler.watch(self.path)
            fault = meddler.fault_of(self.path)
            if fault == "cut":
                self.connection.close()
                return
            if self.path == COMPLETIONS:
                meddler.completions += len(json.loads(body)["prompt"])
            status, content = self.ask(meddler.shadow if fault == "stale" else meddler.target, body)
            if status is None:
                self.connection.close()
                return
            if meddler.delay_s and not self.path.startswith(HEALTH):
                time.sleep(meddler.delay_s)
            status, content, length = meddler.spoil(fault, status, content)
            with contextlib.suppress(OSError):  # who asked need not wait for the answer
                self.answer(status, content[: len(content) // 2] if fault == "broken off" else content, length)
            if fault == "broken off":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, CLOSING)
                self.connection.close()
            self.close_connection = True

        def answer(self, status: int, content: bytes, length: int) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

        def ask(self, target: str, body: bytes) -> tuple[int | None, bytes]:
            connection = http.client.HTTPConnection(urlsplit(target).netloc, timeout=meddler.timeout_s)
            headers = {name: self.headers[name] for name in ("Authorization", "Content-Type") if name in self.headers}
            try:
                connection.request(self.command, self.path, body or None, headers)
                answer = connection.getresponse()
                return answer.status, answer.read()
            except (OSError, http.client.HTTPException):
                return None, b""
            finally:
                connection.close()

        def finish(self) -> None:
            with contextlib.suppress(OSError):
                super().finish()

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 1024  # servers that take one prompt a request are asked for hundreds at once

    server = Server(("127.0.0.1", 0), Handler)
    meddler.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield meddler
    finally:
        server.shutdown()
        server.server_close()
