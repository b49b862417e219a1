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
from isthmus.engines.local.prepare import (
    Prepared,
    chat_prompt,
    check_prompt_tokens,
    encode_text,
    prepare_chat,
    prepare_completion,
)
from isthmus.engines.local.protocol import (
    ApiError,
    Ask,
    ChatAsk,
    CompletionAsk,
    DetokenizeAsk,
    TokenizeAsk,
    TokenizeChatAsk,
    check_options,
    envelope,
    load,
    parse,
    read,
    usage,
)
from isthmus.engines.local.responses import (
    chat_choice,
    chat_opening,
    chat_piece,
    completion_choice,
    completion_piece,
    echo,
    prompt_logprobs,
)
from isthmus.engines.local.service import Service
from isthmus.errors import IsthmusError

MAX_BODY_BYTES = 64 << 20
STATIC = Path(__file__).parent / "static"
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
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
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
        exchange = await self._exchange(ask, prepare_completion(self.service, ask))
        if ask.stream:
            return _event_stream(self._completion_chunks(ask, exchange))
        choices = await _unless_disconnected(request, exchange.choices())
        vocabulary, prompts = self.service.vocabulary, exchange.prompts
        shown = [
            completion_choice(ask, vocabulary, prompts[c.index // ask.n], c, exchange.prompt_tokens[c.index // ask.n])
            for c in choices
        ]
        return JSONResponse(self._envelope("text_completion") | {"choices": shown, "usage": self._count(exchange)})

    async def chat(self, request: Request) -> Response:
        ask = parse(ChatAsk, await _json_body(request))
        self._check(ask)
        exchange = await self._exchange(ask, prepare_chat(self.service, ask))
        if ask.stream:
            return _event_stream(self._chat_chunks(ask, exchange))
        choices = await _unless_disconnected(request, exchange.choices())
        body = self._envelope("chat.completion") | {
            "choices": [chat_choice(ask, self.service.vocabulary, choice) for choice in choices],
            "usage": self._count(exchange),
        }
        if ask.prompt_logprobs is not None:
            tokens = exchange.prompt_tokens[0] or []
            body["prompt_logprobs"] = prompt_logprobs(self.service.vocabulary, tokens, ask.prompt_logprobs)
        if ask.return_token_ids:
            body["prompt_token_ids"] = exchange.prompts[0]
        return JSONResponse(body)

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text or of a conversation, in vLLM's shape."""
        content = load(await _json_body(request))
        if "messages" in content:
            ask = read(TokenizeChatAsk, content)
            self._check_model(ask.model)
            tokens = chat_prompt(self.service, ask, with_tools=bool(ask.tools))
        else:
            ask = read(TokenizeAsk, content)
            self._check_model(ask.model)
            tokens = encode_text(self.service, ask.prompt, "prompt")
        texts = [self.service.vocabulary.text_of(token) for token in tokens] if ask.return_token_strs else None
        body = {"count": len(tokens), "max_model_len": self.service.core.length, "tokens": tokens, "token_strs": texts}
        return JSONResponse(body)

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, special ones included, in vLLM's shape."""
        ask = parse(DetokenizeAsk, await _json_body(request))
        self._check_model(ask.model)
        check_prompt_tokens(self.service, [ask.tokens], "tokens")
        return JSONResponse({"prompt": self.service.tokenizer.decode(ask.tokens, skip_special=False)})

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
        for index in range(exchange.size if ask.echo else 0):
            text = echo(ask, vocabulary, exchange.prompts[index // ask.n], index)
            shown = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
            yield head | {"choices": [shown]} | _no_usage(ask)
        async for piece in exchange.pieces():
            shown = completion_piece(ask, vocabulary, piece, offsets[piece.index])
            offsets[piece.index] += sum(len(vocabulary.text_of(token)) for token in piece.drawn.tokens)
            if shown["text"] or len(piece.drawn) or piece.choice:
                yield head | {"choices": [shown]} | _no_usage(ask)
        if ask.include_usage:
            yield head | {"choices": [], "usage": self._count(exchange)}

    async def _chat_chunks(self, ask: ChatAsk, exchange: Exchange) -> AsyncIterator[dict[str, Any]]:
        head = self._envelope("chat.completion.chunk")
        for index in range(exchange.size):
            yield head | {"choices": [chat_opening(index)]} | _no_usage(ask)
        async for piece in exchange.pieces():
            shown = chat_piece(ask, self.service.vocabulary, piece)
            if shown is not None:
                yield head | {"choices": [shown]} | _no_usage(ask)
        if ask.include_usage:
            yield head | {"choices": [], "usage": self._count(exchange)}

    async def _exchange(self, ask: Ask, prepared: Prepared) -> Exchange:
        constraint = None
        if prepared.grammar is not None:
            constraint = await run_in_threadpool(prepared.constraint, self.service)
        exchange = Exchange(self.service, ask, prepared, constraint)
        self.metrics.prompt_tokens.inc(sum(map(len, prepared.prompts)))
        return exchange

    def _check(self, ask: Ask) -> None:
        check_options(ask)
        self._check_model(ask.model)
        if self.service.core.waiting >= self.service.max_waiting:
            raise ApiError("too many requests are waiting; try again in a second", status=503, code="overloaded")

    def _check_model(self, asked: str | None) -> None:
        known = self.service.identity.model
        if asked is not None and asked != known:
            message = f"the model {asked!r} does not exist here; this server has {known!r}"
            raise ApiError(message, status=404, param="model", code="model_not_found")

    def _count(self, exchange: Exchange) -> dict[str, Any]:
        reasoning = exchange.reasoning_tokens if isinstance(exchange.ask, ChatAsk) else None
        prompt_tokens = sum(map(len, exchange.prompts))
        return usage(prompt_tokens, exchange.generated, exchange.cached_tokens, reasoning)

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
        return FileResponse(STATIC / name, headers={"Cache-Control": "no-cache"})

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
