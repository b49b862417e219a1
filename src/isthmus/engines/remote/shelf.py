"""Where an engine finds a version that was written for it: in a folder that both see, or on a small server of ours."""

from __future__ import annotations

import secrets
import shutil
import socket
import tempfile
import threading
import weakref
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from isthmus.engines import EngineError


class Shelf:
    """`exchange` is a folder that the engine at `url` sees too. Without one, versions are served under a path that
    nobody can guess, at the address of this machine from which the engine is reached."""

    def __init__(self, exchange: Path | None, url: str):
        self._exchange, self._url = exchange, url
        self._served: tuple[Path, str] | None = None

    @property
    def folder(self) -> Path:
        """Where versions are written."""
        return self._exchange.absolute() if self._exchange is not None else self._open()[0]

    def source(self, version: Path) -> str:
        """How the engine names a version that was written there."""
        return str(version) if self._exchange is not None else f"{self._open()[1]}/{version.name}"

    def keep_only(self, used: Path) -> None:
        """Remove the versions before."""
        for folder in used.parent.glob("weight_v*"):
            if folder != used:
                shutil.rmtree(folder, ignore_errors=True)

    def _open(self) -> tuple[Path, str]:
        if self._served is None:
            root, secret = Path(tempfile.mkdtemp(prefix="isthmus-weights-")), secrets.token_urlsafe(24)
            (root / secret).mkdir()
            server = _serve(root, _own_address(self._url))
            host, port = server.server_address[:2]
            weakref.finalize(self, _close, server, root)
            self._served = root / secret, f"http://{host!s}:{port}/{secret}"
        return self._served


class _Files(SimpleHTTPRequestHandler):
    """Files by their name alone."""

    def list_directory(self, path):  # pyright: ignore[reportIncompatibleMethodOverride]
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _serve(root: Path, address: str) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer((address, 0), partial(_Files, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _close(server: ThreadingHTTPServer, root: Path) -> None:
    server.shutdown()
    server.server_close()
    shutil.rmtree(root, ignore_errors=True)


def _own_address(url: str) -> str:
    """That of the interface from which an engine is reached."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=10.0) as connection:
            return connection.getsockname()[0]
    except OSError as error:
        raise EngineError(f"the engine at {url} cannot be reached: {error}") from error
