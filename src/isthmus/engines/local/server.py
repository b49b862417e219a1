"""The HTTP face of an engine: OpenAI's completions and chat, health, metrics, and weight updates for its trainer."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from isthmus.engines.local.answers import Exchange
from isthmus.engines.local.metrics import Metrics
from isthmus.engines.local.protocol import (
    ApiError,
    Ask,
    ChatAsk,
    CompletionAsk,
    check_options,
    envelope,
    parse,
    usage,
)
from isthmus.engines.local.responses import (
    chat_choice,
    chat_opening,
    chat_piece,
    completion_choice,
    completion_piece,
)
from isthmus.engines.local.service import Service
from isthmus.errors import IsthmusError

MAX_BODY_BYTES = 64 << 20
STATIC = Path(__file__).parent / "static"
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
Handler = Callable[[Request], Awaitable[Response]]
ResultType = TypeVar("ResultType")


class Server:
    """The routes of one service. With `admin_key`, its bearer may exchange the weights."""

    def __init__(self, service: Service, *, admin_key: str | None = None, page: bool = False):
        self.service = service
        self.metrics = Metrics(service.core, service.identity.model)
        self._admin_key = admin_key
        self._page = page

    def app(self) -> Starlette:
        """The ASGI application. Its end stops the core."""
        routes = [
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.prometheus),
        ]
        if self._admin_key is not None:
            routes += [
                Route("/update_weights", self.update_weights, methods=["POST"]),
                Route("/weight_info", self.weight_info),
            ]
        if self._page:
            routes += [Route("/examples", self.examples), Route("/", _file("index.html"))]
            routes += [Route(f"/{path.name}", _file(path.name)) for path in sorted(STATIC.iterdir())]
        handlers: dict[Any, Any] = {
            ApiError: _refuse,
            IsthmusError: _refuse_plainly,
            HTTPException: _refuse_route,
            ClientDisconnect: _gone,
        }
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    async def completions(self, request: Request) -> Response:
        ask = parse(CompletionAsk, await _json_body(request))
        self._check(ask)
        encode = self.service.tokenizer.encode
        prompts = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in ask.prompts]
        self._check_tokens(prompts)
        exchange = self._exchange(ask, prompts)
        if ask.stream:
            return _event_stream(self._completion_chunks(ask, exchange))
        choices = await _unless_disconnected(request, exchange.choices())
        shown = [completion_choice(ask, self.service.vocabulary, prompts[c.index // ask.n], c) for c in choices]
        return JSONResponse(self._envelope("text_completion") | {"choices": shown, "usage": self._count(exchange)})

    async def chat(self, request: Request) -> Response:
        ask = parse(ChatAsk, await _json_body(request))
        self._check(ask)
        prompt = self._chat_prompt(ask)
        exchange = self._exchange(ask, [prompt])
        if ask.stream:
            return _event_stream(self._chat_chunks(ask, exchange))
        choices = await _unless_disconnected(request, exchange.choices())
        body = self._envelope("chat.completion") | {
            "choices": [chat_choice(ask, self.service.vocabulary, choice) for choice in choices],
            "usage": self._count(exchange),
        }
        if ask.return_token_ids:
            body["prompt_token_ids"] = prompt
        return JSONResponse(body)

    async def models(self, _request: Request) -> Response:
        identity = self.service.identity
        model = {
            "id": identity.model,
            "object": "model",
            "created": 0,
            "owned_by": "isthmus",
            "max_model_len": self.service.core.length,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, _request: Request) -> Response:
        core, identity = self.service.core, self.service.identity
        body = {
            "status": "ok" if core.failure is None else "failed",
            "engine": "isthmus",
            "model": identity.model,
            "format": identity.format,
            "seal": identity.seal,
            "pool": identity.pool,
            "rehearsal": self._rehearsal(),
            "weight_version": core.version,
            "max_model_len": core.length,
            "running": core.running,
            "waiting": core.waiting,
        }
        return JSONResponse(body, status_code=200 if core.failure is None else 503)

    async def prometheus(self, _request: Request) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def examples(self, _request: Request) -> Response:
        return JSONResponse(self.service.examples)

    async def weight_info(self, request: Request) -> Response:
        self._authorise(request)
        service = self.service
        body = {
            "version": service.core.version,
            "sha256": service.weights_sha256,
            "format": service.identity.format,
            "tensors": len(service.layout),
        }
        return JSONResponse(body)

    async def update_weights(self, request: Request) -> Response:
        """The body is what formats/wire.py packs; `version` and `sha256` stand in the query."""
        self._authorise(request)
        version, sha256 = _query_integer(request, "version"), request.query_params.get("sha256")
        if not sha256:
            raise ApiError("sha256 is missing from the query", param="sha256")
        payload = await request.body()
        try:
            await run_in_threadpool(self.service.update, payload, version, sha256)
        except IsthmusError:
            self.metrics.refused_updates.inc()
            raise
        self.metrics.weight_updates.inc()
        return JSONResponse({"version": self.service.core.version, "sha256": self.service.weights_sha256})

    async def _completion_chunks(self, ask: CompletionAsk, exchange: Exchange) -> AsyncIterator[dict[str, Any]]:
        head, vocabulary = self._envelope("text_completion"), self.service.vocabulary
        offsets = [0] * exchange.size
        async for piece in exchange.pieces():
            shown = completion_piece(ask, vocabulary, piece, offsets[piece.index])
            offsets[piece.index] += sum(len(vocabulary.text_of(step.token)) for step in piece.steps)
            if shown["text"] or piece.steps or piece.choice:
                yield head | {"choices": [shown]} | _no_usage(ask)
        if ask.include_usage:
            yield head | {"choices": [], "usage": self._count(exchange)}

    async def _chat_chunks(self, ask: ChatAsk, exchange: Exchange) -> AsyncIterator[dict[str, Any]]:
        head = self._envelope("chat.completion.chunk")
        for index in range(exchange.size):
            yield head | {"choices": [chat_opening(index)]} | _no_usage(ask)
        async for piece in exchange.pieces():
            shown = chat_piece(ask, self.service.vocabulary, piece)
            yield head | {"choices": [shown]} | _no_usage(ask)
        if ask.include_usage:
            yield head | {"choices": [], "usage": self._count(exchange)}

    def _exchange(self, ask: Ask, prompts: list[list[int]]) -> Exchange:
        exchange = Exchange(self.service, ask, prompts)
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        return exchange

    def _check(self, ask: Ask) -> None:
        check_options(ask)
        known = self.service.identity.model
        if ask.model is not None and ask.model != known:
            message = f"the model {ask.model!r} does not exist here; this server has {known!r}"
            raise ApiError(message, status=404, param="model", code="model_not_found")
        if self.service.core.waiting >= self.service.max_waiting:
            raise ApiError("too many requests are waiting; try again in a second", status=503, code="overloaded")

    def _check_tokens(self, prompts: list[list[int]]) -> None:
        size = self.service.architecture.vocab_size
        for prompt in prompts:
            if prompt and not 0 <= min(prompt) <= max(prompt) < size:
                raise ApiError(
                    f"prompt: token ids must be between 0 and {size - 1}", param="prompt", code="invalid_value"
                )

    def _chat_prompt(self, ask: ChatAsk) -> list[int]:
        try:
            return self.service.tokenizer.chat([message.plain() for message in ask.messages])
        except IsthmusError as error:
            raise ApiError(str(error), param="messages", code="invalid_value") from None

    def _count(self, exchange: Exchange) -> dict[str, int]:
        return usage(sum(map(len, exchange.prompts)), exchange.generated)

    def _envelope(self, kind: str) -> dict[str, Any]:
        return envelope(kind, self.service.identity.model, self.service.fingerprint)

    def _rehearsal(self) -> dict[str, Any] | None:
        identity = self.service.identity
        if identity.rehearsed is None:
            return None
        return {"chip": identity.rehearsed, "statement": identity.statement, "operators": self.service.rehearsal}

    def _authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._admin_key}".encode()):
            raise ApiError("this route needs the admin key as a bearer token", status=401, code="invalid_api_key")

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(self.service.core.stop)


def _file(name: str) -> Handler:
    async def send(_request: Request) -> Response:
        return FileResponse(STATIC / name, headers=PAGE_HEADERS)

    return send


async def _json_body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/json":
        raise ApiError(f"send Content-Type: application/json (this request has {kind or 'none'!r})", status=415)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(f"the body is longer than {MAX_BODY_BYTES} bytes", status=413)
    return bytes(body)


async def _unless_disconnected(request: Request, work: Awaitable[ResultType]) -> ResultType:
    """The result of `work`; if the client goes away first, the work is cancelled."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event_stream(chunks: AsyncIterator[dict[str, Any]]) -> Response:
    return StreamingResponse(_events(chunks), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Server-sent events. The status is already sent, so a failure half way is an event too."""
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except ApiError as error:
        yield _event(error.body())
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _no_usage(ask: Ask) -> dict[str, None]:
    return {"usage": None} if ask.include_usage else {}


def _query_integer(request: Request, name: str) -> int:
    try:
        return int(request.query_params[name])
    except (KeyError, ValueError):
        raise ApiError(f"{name} in the query must be an integer", param=name) from None


async def _refuse(_request: Request, error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _refuse_plainly(_request: Request, error: IsthmusError) -> Response:
    return JSONResponse(ApiError(str(error)).body(), status_code=400)


async def _refuse_route(_request: Request, error: HTTPException) -> Response:
    return JSONResponse(ApiError(error.detail, status=error.status_code).body(), status_code=error.status_code)


async def _gone(_request: Request, _error: ClientDisconnect) -> Response:
    return Response(status_code=499)
