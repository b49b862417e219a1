"""Running an application in the foreground, on a port that was taken before anything slow was done."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from isthmus.engines.local.engine import Core
from isthmus.errors import IsthmusError

GRACE_S = 5


class _Host(uvicorn.Server):
    """uvicorn with a word when it is ready, and an end when the core fails."""

    def __init__(self, config: uvicorn.Config, core: Core, on_ready: Callable[[], None]):
        super().__init__(config)
        self._core, self._on_ready = core, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._core.failure is not None


def bind(host: str, port: int, flag: str) -> socket.socket:
    """Take a port. Raises IsthmusError that names it and the `flag` that changes it if it is not free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(512)
    except OSError as error:
        listener.close()
        raise IsthmusError(_explain(error, host, port, flag)) from None
    return listener


def run_app(app: Starlette, listener: socket.socket, core: Core, on_ready: Callable[[], None]) -> None:
    """Serve until SIGTERM, Ctrl-C or a failure of the core; running streams get a few seconds to end.

    uvicorn repeats the signal that ended it; where that means KeyboardInterrupt, the end is already a clean one.
    """
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S, ws="none")
    try:
        with contextlib.suppress(KeyboardInterrupt):
            _Host(config, core, on_ready).run(sockets=[listener])
    finally:
        core.stop()


def _explain(error: OSError, host: str, port: int, flag: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken by another program. Choose another with {flag} (0 takes a free one)."
    if error.errno == errno.EACCES:
        return f"port {port} needs more rights than this user has. Choose one above 1023 with {flag}."
    return f"cannot listen on {host}:{port}: {error.strerror or error}."
