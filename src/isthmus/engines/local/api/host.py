"""Running an application in the foreground, on a port that was taken before anything slow was done."""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from isthmus.engines.local.api.server import Server
from isthmus.errors import IsthmusError

DRAIN_S = 30.0
LAST_WORDS_S = 5
REQUEST_S = 20.0
UNREAD_S = 120.0
MAX_DISCARDED_BYTES = 32 << 20
"""Of a body that is refused: read on so far, for a client reads the answer only when it has sent all, and bytes that
nobody has read break its connection."""
TURN_S = 0.001
"""A thread of Python gives way to another after so long: the event loop waits for its turn many times in one answer."""
STOPPED = "the server was stopped before this request was done"


class _Transport:
    """A transport whose `close` is the connection's to carry out."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]):
        self._transport, self.close = transport, close

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _Connection(H11Protocol):
    """A connection that ends if a request's line and headers, or a body that nobody reads, take over `REQUEST_S`, or if
    its client reads nothing of an answer for `UNREAD_S`.

    Bodies that are read are the handler's to wait for, and silence between two requests is uvicorn's. Where an answer
    ends the connection before the body is here, up to `MAX_DISCARDED_BYTES` of it are read and thrown away.
    """

    _end_of_patience: asyncio.TimerHandle | None = None
    _end_of_writing: asyncio.TimerHandle | None = None
    _discarded: int | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._wire = transport
        super().connection_made(_Transport(transport, self._close))  # pyright: ignore[reportArgumentType]
        self._end_of_patience = self.loop.call_later(REQUEST_S, transport.close)

    def data_received(self, data: bytes) -> None:
        if self._discarded is not None:
            self._discarded += len(data)
            if self._discarded > MAX_DISCARDED_BYTES:
                self._wire.close()
            return
        super().data_received(data)
        if not self._is_owed_more():
            self._stop_waiting()
        elif self._end_of_patience is None:
            self._end_of_patience = self.loop.call_later(REQUEST_S, self._wire.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._end_of_writing = self.loop.call_later(UNREAD_S, self._wire.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching_the_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_watching_the_reader()
        super().connection_lost(exc)

    def _close(self) -> None:
        """End the connection; first read what is still to come of a body, with the answer's end already sent."""
        if self._discarded is not None or self.conn.their_state is not h11.SEND_BODY or self._wire.is_closing():
            self._wire.close()
            return
        self._discarded = 0
        self._wire.write_eof()
        self.flow.resume_reading()
        if self._end_of_patience is None:
            self._end_of_patience = self.loop.call_later(REQUEST_S, self._wire.close)

    def _is_owed_more(self) -> bool:
        """Whether the client has begun a request that no handler works on."""
        is_idle = self.cycle is None or self.cycle.response_complete
        return is_idle and self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def _stop_watching_the_reader(self) -> None:
        if self._end_of_writing is not None:
            self._end_of_writing.cancel()
            self._end_of_writing = None

    def _stop_waiting(self) -> None:
        if self._end_of_patience is not None:
            self._end_of_patience.cancel()
            self._end_of_patience = None


class _Host(uvicorn.Server):
    """uvicorn with a word when it is ready, an end when the core fails, and a drain before the end.

    The first SIGTERM or Ctrl-C begins the drain: new requests are refused, and those that run have `drain_s` seconds.
    The second one ends the drain, a third one everything.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server: Server,
        on_ready: Callable[[], None],
        drain_s: float,
        on_drain: Callable[[int], None],
    ):
        super().__init__(config)
        self._server, self._on_ready, self._drain_s, self._on_drain = server, on_ready, drain_s, on_drain
        self._signals = 0
        self._drain_ends: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 2:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._server.service.core.failure is not None or self._is_drained()

    def _is_drained(self) -> bool:
        if not self._signals:
            return False
        gate, now = self._server.gate, time.monotonic()
        if self._drain_ends is None:
            self._drain_ends = now + self._drain_s
            gate.log.event("drain", running=gate.generating, seconds=self._drain_s)
            gate.drain()
            self._on_drain(gate.generating)
        if gate.generating and now < self._drain_ends and self._signals < 2:
            return False
        gate.end_all(STOPPED)
        return True


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


def configuration(server: Server, log_level: str = "warning") -> uvicorn.Config:
    """How uvicorn runs a server."""
    return uvicorn.Config(
        server.app(),
        http=_Connection,
        log_level=log_level,
        access_log=False,
        timeout_graceful_shutdown=LAST_WORDS_S,
        ws="none",
    )


def run_app(
    server: Server,
    listener: socket.socket,
    *,
    on_ready: Callable[[], None],
    drain_s: float = DRAIN_S,
    on_drain: Callable[[int], None] = lambda running: None,
) -> None:
    """Serve until SIGTERM, Ctrl-C or a failure of the core; what runs then has `drain_s` seconds to end.

    `on_drain` is told how many requests run when that begins.
    """
    _keep_turns_short()
    try:
        _Host(configuration(server), server, on_ready, drain_s, on_drain).run(sockets=[listener])
    finally:
        server.service.core.stop()
        server.log.close()


def _keep_turns_short() -> None:
    """Threads take short turns, and a search for garbage, which stops everyone, leaves out what is loaded and stays."""
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(TURN_S)


def _explain(error: OSError, host: str, port: int, flag: str) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is taken by another program. Choose another with {flag} (0 takes a free one)."
    if error.errno == errno.EACCES:
        return f"port {port} needs more rights than this user has. Choose one above 1023 with {flag}."
    return f"cannot listen on {host}:{port}: {error.strerror or error}."
