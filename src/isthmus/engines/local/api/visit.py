"""One HTTP request from its arrival until its answer and its samples have ended: what limits, metrics and log read."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Protocol

from isthmus.engines.local.core.scheduler import Finished, Request, Token


class Follower(Protocol):
    """Who wants to know what happens to the samples of a visit. Called from the engine's thread."""

    def token(self, visit: Visit, token: Token) -> None: ...

    def finished(self, visit: Visit, sample: Finished) -> None: ...


class Visit:
    """A request on its way. `status` is that of the answer, 499 if the client left before it was known."""

    def __init__(
        self, method: str = "", route: str = "", id: str | None = None, key_name: str = "", began: float = 0.0
    ):
        self.method, self.route, self.key_name = method, route, key_name
        self.id = id or secrets.token_hex(16)
        self.began = began or time.monotonic()
        self.status, self.error, self.refusal = 499, None, None
        self.stream = False
        self.prompts: list[list[int]] = []
        self.n = 1
        self.samples: list[Finished] = []
        self.request: Request | None = None
        self.followers: list[Follower] = []
        self.last_token_s: dict[int, float] = {}
        self._lock = threading.Lock()
        self._answered = False
        self._on_end: Callable[[Visit], None] | None = None

    status: int
    error: str | None
    refusal: str | None
    """Why the server ended the request itself; the error that its client reads."""

    @property
    def expected(self) -> int:
        """How many samples this request has or will have."""
        return len(self.prompts) * self.n

    @property
    def unfinished(self) -> int:
        """How many of these have not ended."""
        return self.expected - len(self.samples)

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def generated_tokens(self) -> int:
        return sum(len(sample.tokens) for sample in self.samples)

    def versions(self) -> tuple[int | None, int | None]:
        """The weights that wrote the first and the last token; they differ if an update came between."""
        if not self.samples:
            return None, None
        return min(sample.version for sample in self.samples), max(sample.last_version for sample in self.samples)

    def first_token_s(self) -> float | None:
        """Seconds from the submission to the first token of any sample."""
        seen = [sample.first_token_s for sample in self.samples if sample.tokens]
        return round(min(seen), 6) if seen else None

    def admitted(self, prompts: list[list[int]], n: int) -> None:
        """The server takes these prompts on, with `n` samples each."""
        self.prompts, self.n = prompts, n

    def submitted(self, request: Request | None) -> None:
        """The core is given the samples of this request; None if it has not taken them."""
        self.request, self.stream = request, request is not None and request.stream

    def tell(self, event: Token | Finished) -> None:
        """What the core says about a sample. Called from the engine's thread."""
        if isinstance(event, Token):
            for follower in self.followers:
                follower.token(self, event)
            return
        for follower in self.followers:
            follower.finished(self, event)
        with self._lock:
            self.samples.append(event)
            ended = self._answered and not self.unfinished
        if ended:
            self._tell_end()

    def end(self, on_end: Callable[[Visit], None]) -> None:
        """The answer has ended. `on_end` is called now, or from the engine's thread when the last sample has."""
        with self._lock:
            self._answered, self._on_end = True, on_end
            ended = self.request is None or not self.unfinished
        if ended:
            self._tell_end()

    def _tell_end(self) -> None:
        """The request, which may hold much, is let go."""
        assert self._on_end is not None
        self.request = None
        self._on_end(self)


CURRENT: ContextVar[Visit] = ContextVar("visit")
"""The visit that the running handler answers."""
