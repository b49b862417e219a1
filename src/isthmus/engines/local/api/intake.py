"""What comes in: bodies are read within limits, measured before anything parses them, and parsed off the event loop.

A reader of JSON holds the interpreter while it reads. So what it is given is bounded, and long bodies are read one at
a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import anyio
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request

from isthmus.engines.local.api.limits import Refused
from isthmus.engines.local.api.protocol import ApiError

MAX_BODY_BYTES = 16 << 20
MAX_UNFINISHED_BYTES = 256 << 20
MAX_KEYS, MAX_VALUES, MAX_NESTING = 20_000, 2_000_000, 128
BODY_S = 120.0
LONG_BODY_BYTES = 128 << 10
WORKERS = 4
"""Threads that read bodies and prepare prompts, short ones and, in one more thread, long ones."""
_SCANNED_AT_ONCE = 1 << 18
_OPENING, _CLOSING = (ord("{"), ord("[")), (ord("}"), ord("]"))

ResultType = TypeVar("ResultType")


@dataclass(frozen=True)
class Measure:
    """How much there is in a text that should be JSON."""

    keys: int
    values: int
    depth: int


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


def check_measure(body: bytes) -> None:
    """Refuse what is not worth parsing. Raises ApiError (400)."""
    found = measure(body)
    for count, most, what in (
        (found.keys, MAX_KEYS, "keys"),
        (found.values, MAX_VALUES, "values"),
        (found.depth, MAX_NESTING, "levels of nesting"),
    ):
        if count > most:
            raise ApiError(f"the body has more than {most:,} {what}; send it in several requests", code="too_large")


def measure(body: bytes) -> Measure:
    """Keys, values and depth of a text that should be JSON, without parsing it."""
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    keys, values, depth, deepest, inside = 0, 0, 0, 0, False
    for block in _blocks(plain):
        quotes = np.cumsum(block == ord('"'), dtype=np.int64) + inside
        inside = bool(quotes[-1] & 1)
        outside = block[(quotes & 1) == 0]
        opened, closed = np.isin(outside, _OPENING), np.isin(outside, _CLOSING)
        keys += int(np.count_nonzero(outside == ord(":")))
        values += int(np.count_nonzero(outside == ord(","))) + int(np.count_nonzero(opened))
        levels = np.cumsum(opened.astype(np.int8) - closed.astype(np.int8), dtype=np.int64)
        if len(levels):
            deepest, depth = max(deepest, depth + int(levels.max())), depth + int(levels[-1])
    return Measure(keys, values, deepest)


def _blocks(content: bytes) -> Iterator[NDArray[np.uint8]]:
    whole = np.frombuffer(content, dtype=np.uint8)
    for start in range(0, len(whole), _SCANNED_AT_ONCE):
        yield whole[start : start + _SCANNED_AT_ONCE]


def _announced(request: Request, most: int) -> int:
    length = int(request.headers.get("content-length", 0))
    _check_size(length, most)
    return length


def _check_size(length: int, most: int) -> None:
    if length > most:
        raise ApiError(f"the body is longer than {most} bytes", status=413)
