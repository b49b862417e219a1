"""The gate before the routes: who may come in, how much is taken on, and what is remembered of each request.

It also knows whether the server is ready, paused or draining, and can end what still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Collection, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from isthmus.engines.local.api.access_log import AccessLog
from isthmus.engines.local.api.browsers import check_host
from isthmus.engines.local.api.keys import ANYONE, Keyring, Level
from isthmus.engines.local.api.limits import TOO_MANY_REQUESTS, TOO_MANY_TOKENS, KeyBudget, KeyLimits, Rate, Refused
from isthmus.engines.local.api.metrics import Metrics
from isthmus.engines.local.api.numbers import Numbers
from isthmus.engines.local.api.protocol import ApiError
from isthmus.engines.local.api.service import Service
from isthmus.engines.local.api.visit import CURRENT, Visit
from isthmus.engines.local.core.scheduler import Finished, Token

REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
GENERATING = "/v1/"


class Gate:
    """What all requests of a server have in common. Follows visits, to know how fast the engine is.

    Without user keys only some names are answered to: see browsers.py. `sample_rate` and `prompt_rate` are the samples
    and prompt tokens that ended lately; `held` counts the requests that stand before a closed gate. `numbers` knows
    whether the weights in use are damaged, `damaged` is what a canary has found.
    """

    def __init__(
        self,
        service: Service,
        metrics: Metrics,
        keys: Keyring,
        limits: KeyLimits,
        log: AccessLog,
        numbers: Numbers,
        hosts: Collection[str] = (),
    ):
        self.numbers = numbers
        self.hosts = hosts
        self.service, self.metrics, self.keys, self.limits, self.log = service, metrics, keys, limits, log
        self.draining, self.damaged = False, False
        self.visits: list[Visit] = []
        self.generating = 0
        self.held = 0
        self._open = asyncio.Event()
        self._open.set()
        self._budgets: dict[str, KeyBudget] = {}
        self._totals: dict[str, dict[str, int]] = {}
        self.sample_rate, self.prompt_rate = Rate(), Rate()

    @property
    def state(self) -> str:
        """`ready`, or why this server should get no requests now."""
        if self.service.core.failure is not None:
            return "failed"
        if self.draining:
            return "draining"
        if self.service.core.paused or self.closed:
            return "paused"
        return "damaged" if self.damaged or self.numbers.broken else "ready"

    def middleware(self, app: ASGIApp, levels: Mapping[str, Level]) -> ASGIApp:
        """The application behind the gate. Routes that `levels` does not name are for users."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await self._serve(app, levels.get(scope["path"], Level.USER), scope, receive, send)
            else:
                await app(scope, receive, send)

        return guarded

    @property
    def unfinished(self) -> int:
        """Samples that were taken on and have not ended."""
        return sum(visit.unfinished for visit in self.visits)

    def check_line(self, samples: int = 1) -> None:
        """Raise Refused (503) if so many more samples would be too many in the line.

        A request with more samples than the line holds is taken if nothing waits.
        """
        limit, waiting = self.service.max_waiting, self._waiting_samples()
        if waiting + min(samples, limit) > limit or not limit:
            reason = f"{waiting} samples wait already"
            self._reject_line(TOO_MANY_REQUESTS, reason, self.sample_rate, waiting + min(samples, limit or 1) - limit)

    def admit(self, prompts: list[list[int]], n: int) -> None:
        """Take prompts on for the current visit. Raises Refused: 503 if the line is full, 429 if the budget is used."""
        visit = CURRENT.get()
        tokens, limit = sum(map(len, prompts)), self.service.max_waiting_tokens
        self.check_line(len(prompts) * n)
        waiting = self._waiting_tokens()
        if limit is not None and waiting and waiting + tokens > limit:
            reason = f"{waiting} prompt tokens wait already"
            self._reject_line(TOO_MANY_TOKENS, reason, self.prompt_rate, waiting + tokens - limit)
        try:
            self._budget(visit).take_prompts(tokens)
        except Refused as refusal:
            self.metrics.rejected(refusal.reason)
            raise
        visit.admitted(prompts, n)

    def token(self, visit: Visit, token: Token) -> None:
        """Called from the engine's thread."""

    def finished(self, visit: Visit, sample: Finished) -> None:
        """Called from the engine's thread."""
        self.sample_rate.add(1)
        self.prompt_rate.add(len(visit.prompts[sample.choice // visit.n]))
        self._budget(visit).take_generated(len(sample.tokens))

    def drain(self) -> None:
        """Take nothing new on; what runs goes on."""
        self.draining = True
        self.open()

    def end_all(self, reason: str) -> None:
        """End every request that runs, each with an error that says why. Called from any thread."""
        for visit in list(self.visits):
            visit.refusal = reason
            if visit.request is not None:
                self.service.core.end(visit.request)

    @property
    def closed(self) -> bool:
        """Whether new requests are held back."""
        return not self._open.is_set()

    def close(self) -> None:
        """Hold new requests back until `open`."""
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def usage(self) -> dict[str, dict[str, int]]:
        """Requests, tokens and refusals of each key since the start."""
        return {name: dict(total) for name, total in sorted(self._totals.items())}

    async def _serve(self, app: ASGIApp, level: Level, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        visit = Visit(scope["method"], scope["path"], given if REQUEST_ID.fullmatch(given) else None, ANYONE)
        visit.followers = [self.metrics, self, self.numbers]
        generates = scope["method"] == "POST" and scope["path"].startswith(GENERATING)
        send = self._noting(visit, generates, send)
        entered = False
        self.visits.append(visit)
        token = CURRENT.set(visit)
        try:
            try:
                if not self.keys.has_users:
                    check_host(headers.get("host"), self.hosts)
                self._check_key(visit, headers.get("authorization", ""), level)
                if generates and self.draining:
                    raise self._refusal_of_drain()
                if generates:
                    self._budget(visit).enter()
                    entered = True
                    self.generating += 1
                    await self._wait_until_open()
            except ApiError as error:
                if isinstance(error, Refused):
                    self.metrics.rejected(error.reason)
                await refuse(error)(scope, receive, send)
            else:
                await app(scope, receive, send)
        except asyncio.CancelledError:
            raise
        except BaseException:
            visit.status = 500
            raise
        finally:
            CURRENT.reset(token)
            self.visits.remove(visit)
            if entered:
                self.generating -= 1
                self._budget(visit).leave()
            loop = asyncio.get_running_loop()
            visit.end(lambda visit: _soon(loop, lambda: self._remember(visit, level)))

    def _check_key(self, visit: Visit, authorization: str, level: Level) -> None:
        key = self.keys.admit(authorization, level)
        if key is not None:
            visit.key_name = key.name

    async def _wait_until_open(self) -> None:
        """While the server is paused for those that run to end, new requests stand here."""
        if not self.closed:
            return
        if self.held >= self.service.max_waiting:
            raise Refused(
                "the server is paused and enough requests wait", status=503, reason=TOO_MANY_REQUESTS, after_s=1
            )
        self.held += 1
        try:
            await self._open.wait()
        finally:
            self.held -= 1
        if self.draining:
            raise self._refusal_of_drain()

    def _refusal_of_drain(self) -> Refused:
        return Refused(
            "this server is about to stop and takes no new requests", status=503, reason="draining", after_s=1
        )

    def _noting(self, visit: Visit, limited: bool, send: Send) -> Send:
        """Sends, and notes the status; the answer carries the request's id and what its key has left."""

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = visit.id
                if limited:
                    for name, value in self._budget(visit).headers().items():
                        headers[name] = value
            await send(message)
            if message.get("more_body"):
                # Others have their turn between two pieces, and a lost connection is noticed before the next one.
                await asyncio.sleep(0)

        return noted

    def _remember(self, visit: Visit, level: Level) -> None:
        total = self._totals.setdefault(
            visit.key_name, {"requests": 0, "refused": 0, "prompt_tokens": 0, "completion_tokens": 0}
        )
        if level > Level.PUBLIC:
            total["requests"] += 1
            total["refused"] += visit.status in (429, 503)
            total["prompt_tokens"] += visit.prompt_tokens
            total["completion_tokens"] += visit.generated_tokens
        if level > Level.PUBLIC or visit.status >= 400:
            self.log.visit(visit, self.service.tokenizer.decode)

    def _budget(self, visit: Visit) -> KeyBudget:
        if visit.key_name not in self._budgets:
            self._budgets[visit.key_name] = KeyBudget(self.limits)
        return self._budgets[visit.key_name]

    def _waiting_samples(self) -> int:
        """Samples that were taken on and do not run: the core's own line lags behind by one step."""
        return max(0, self.unfinished - self.service.core.running)

    def _waiting_tokens(self) -> int:
        """Prompt tokens of the samples that wait: the last ones, since the core takes them in order."""
        left, tokens = self._waiting_samples(), 0
        for visit in reversed(self.visits):
            if left <= 0:
                break
            last = range(visit.expected - min(left, visit.unfinished), visit.expected)
            tokens += sum(len(visit.prompts[place // visit.n]) for place in last)
            left -= len(last)
        return tokens

    def _reject_line(self, reason: str, message: str, rate: Rate, excess: int) -> None:
        self.metrics.rejected(reason)
        raise Refused(f"{message}; try again later", status=503, reason=reason, after_s=rate.seconds_for(excess))


def refuse(error: ApiError) -> Response:
    """The answer that an error becomes."""
    note_error(error)
    headers = dict(error.headers) if isinstance(error, Refused) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["Connection"] = "close"
    if error.status == 503:
        headers.setdefault("Retry-After", "1")
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


def note_error(error: ApiError) -> None:
    """Remember why the current visit went wrong: the code of the error, since its message may quote the request."""
    visit = CURRENT.get(None)
    if visit is not None:
        visit.error = error.code or ("server_error" if error.status >= 500 else "invalid_request")


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Run a call on the loop, if it still turns: at the very end of a server the engine outlives it."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
