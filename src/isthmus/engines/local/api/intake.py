"""What comes in: bodies are read within limits, measured before anything parses them, and parsed off the event loop.

A reader of JSON holds the interpreter while it reads. So what it is given is bounded, and long bodies are read one at
a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import anyio
import anyio.to_thread
from starlette.requests import Request

from isthmus.engines.local.api.limits import Refused
from isthmus.engines.local.api.measure import TooLarge, check_measure
from isthmus.engines.local.api.protocol import ApiError

MAX_BODY_BYTES = 16 << 20
MAX_UNFINISHED_BYTES = 256 << 20
BODY_S = 120.0
LONG_BODY_BYTES = 128 << 10
WORKERS = 4
"""Threads that read bodies and prepare prompts, short ones and, in one more thread, long ones."""
ResultType = TypeVar("ResultType")


class Intake:
    """Reads bodies. `held` are the bytes of all bodies of requests that are not parsed yet."""

    def __init__(self) -> None:
        self.held = 0
        self._short, self._long = anyio.CapacityLimiter(WORKERS), anyio.CapacityLimiter(1)

    @contextlib.asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, which counts as held inside this context.

        Raises ApiError: 413 if it is too long, 408 if it does not come, 503 if too much is held already.
        """
        counted = 0
        try:
            counted = self._hold(_announced(request, MAX_BODY_BYTES))
            body = bytearray()
            try:
                async with asyncio.timeout(BODY_S):
                    async for part in request.stream():
                        body += part
                        _check_size(len(body), MAX_BODY_BYTES)
                        counted += self._hold(max(0, len(body) - counted))
            except TimeoutError:
                raise ApiError(f"the body was not here after {BODY_S:g} s", status=408) from None
            yield bytes(body)
        finally:
            self.held -= counted

    async def off_the_loop(self, length: int, work: Callable[[], ResultType]) -> ResultType:
        """What `work` returns, done in a thread; work for so many bytes waits for other that is long."""
        limiter = self._long if length > LONG_BODY_BYTES else self._short
        return await anyio.to_thread.run_sync(work, limiter=limiter)

    async def one_at_a_time(self, work: Callable[[], ResultType]) -> ResultType:
        """What `work`, which holds the interpreter for long, returns."""
        return await anyio.to_thread.run_sync(work, limiter=self._long)

    def _hold(self, more: int) -> int:
        if more and self.held and self.held + more > MAX_UNFINISHED_BYTES:
            raise Refused(
                "too many bodies are on their way; try again later", status=503, reason="unfinished_bodies", after_s=1
            )
        self.held += more
        return more


async def weights_body(request: Request, most: int) -> bytes:
    """The body of an administrator's request, of up to `most` bytes. Raises ApiError (413)."""
    _announced(request, most)
    body = bytearray()
    async for part in request.stream():
        body += part
        _check_size(len(body), most)
    return bytes(body)


def check_body(body: bytes) -> None:
    """Refuse what is not worth parsing. Raises ApiError (400)."""
    try:
        check_measure(body)
    except TooLarge as error:
        raise ApiError(f"the body has {error}; send it in several requests", code="too_large") from None


def _announced(request: Request, most: int) -> int:
    length = int(request.headers.get("content-length", 0))
    _check_size(length, most)
    return length


def _check_size(length: int, most: int) -> None:
    if length > most:
        raise ApiError(f"the body is longer than {most} bytes", status=413)
