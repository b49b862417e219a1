"""A proxy before an engine that meddles with answers: what a network or a sick server does to a trainer."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class Meddler:
    """Hands everything on to `target`. With a `fault` the answers to /v1/completions are spoilt; `completions` counts
    the prompts that were asked through it."""

    def __init__(self, target: str):
        self.target, self.fault, self.url, self.completions = target, "", "", 0

    def spoil(self, status: int, content: bytes) -> tuple[int, bytes, int]:
        """(status, content, announced length)."""
        if self.fault == "error":
            return 500, b'{"error": {"message": "out of memory"}}', 39
        if self.fault == "truncated":
            return status, content[: len(content) // 2], len(content)
        if self.fault == "garbage":
            return status, b"<html>", 6
        if self.fault == "another shape":
            return status, b'{"choices": [{"index": 0}]}', 27
        if self.fault == "old version":
            answer = json.loads(content)
            for choice in answer["choices"]:
                choice["weight_versions"] = [1, 1]
                choice.pop("token_versions", None)
            content = json.dumps(answer).encode()
        return status, content, len(content)


@contextlib.contextmanager
def meddling(target: str) -> Iterator[Meddler]:
    meddler = Meddler(target)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.hand_on(b"")

        def do_POST(self) -> None:
            self.hand_on(self.rfile.read(int(self.headers.get("Content-Length", 0))))

        def hand_on(self, body: bytes) -> None:
            if meddler.fault == "cut":
                self.connection.close()
                return
            asked = self.path == "/v1/completions"
            if asked:
                meddler.completions += len(json.loads(body)["prompt"])
            connection = http.client.HTTPConnection(urlsplit(meddler.target).netloc, timeout=60)
            headers = {name: self.headers[name] for name in ("Authorization", "Content-Type") if name in self.headers}
            try:
                connection.request(self.command, self.path, body or None, headers)
                answer = connection.getresponse()
                status, content = answer.status, answer.read()
            except (OSError, http.client.HTTPException):
                self.connection.close()
                return
            finally:
                connection.close()
            length = len(content)
            if asked:
                status, content, length = meddler.spoil(status, content)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    meddler.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield meddler
    finally:
        server.shutdown()
        server.server_close()
