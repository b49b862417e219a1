"""The HTTP face of an engine: OpenAI's completions and chat, health and metrics, and its administrator's routes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from isthmus import __version__
from isthmus.engines.local.api.access_log import AccessLog
from isthmus.engines.local.api.admission import Gate, note_error, refuse
from isthmus.engines.local.api.answers import Choice, Exchange
from isthmus.engines.local.api.browsers import cross_origin
from isthmus.engines.local.api.canary import Canary, CanaryReport
from isthmus.engines.local.api.intake import Intake, check_body, weights_body
from isthmus.engines.local.api.keys import ADMIN, Key, Keyring, Level
from isthmus.engines.local.api.limits import KeyLimits
from isthmus.engines.local.api.memory import give_back
from isthmus.engines.local.api.metrics import Metrics
from isthmus.engines.local.api.numbers import Numbers
from isthmus.engines.local.api.openapi import EVENTS, JSON, TEXT, Handler, Operation, document, file_operation
from isthmus.engines.local.api.prepare import (
    Prepared,
    chat_prompt,
    check_prompt_tokens,
    encode_text,
    prepare_chat,
    prepare_completion,
)
from isthmus.engines.local.api.protocol import (
    ApiError,
    Ask,
    AskType,
    ChatAsk,
    CompletionAsk,
    DetokenizeAsk,
    FinishUpdateQuery,
    PauseQuery,
    StartUpdateQuery,
    TokenizeAsk,
    TokenizeChatAsk,
    UpdateWeightsQuery,
    check_options,
    envelope,
    load,
    parse,
    read,
    usage,
)
from isthmus.engines.local.api.response_ask import ResponseAsk, in_its_own_words
from isthmus.engines.local.api.response_items import ResponseWriter
from isthmus.engines.local.api.responses import (
    chat_choice,
    chat_opening,
    chat_piece,
    completion_choice,
    completion_piece,
    echo,
    prompt_logprobs,
)
from isthmus.engines.local.api.service import Service
from isthmus.engines.local.api.token_names import TextPlaces
from isthmus.engines.local.api.visit import CURRENT
from isthmus.engines.local.api.weights import WeightUpdates
from isthmus.errors import IsthmusError
from isthmus.formats.files.bundle import Bundle

NO_LIMITS = KeyLimits()
POLL_S = 0.02
TIDY_EVERY_S = 5.0
LONG_ANSWER_TOKENS, SHORT_BODY_BYTES, JOINED_BYTES = 2000, 2048, 16 << 10
STATIC = Path(__file__).parents[1] / "page"
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
REPORT_HEADERS = PAGE_HEADERS | {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
}
ResultType = TypeVar("ResultType")


@dataclass(frozen=True)
class CanaryPlan:
    """When golden prompts are replayed, how far they may drift (nats), and where the sealed bundle is read again.

    Without `sealed_bundle` an alarm changes nothing. Without `every_s` canaries run only when asked for.
    """

    every_s: float | None
    bound: float
    sealed_bundle: Callable[[], Bundle] | None = None
    tell: Callable[[CanaryReport], None] = lambda _report: None


class Server:
    """The routes of one service.

    Pages of `origins` may ask it, and without user keys it answers under its addresses and `hosts`. The routes of
    administrators exist if there is an admin key: the one in `keys`, or `admin_key`. `report` is the dossier of the run
    that is served; it need not be written yet.
    """

    def __init__(
        self,
        service: Service,
        *,
        admin_key: str | None = None,
        keys: Keyring | None = None,
        limits: KeyLimits = NO_LIMITS,
        log: AccessLog | None = None,
        canary: CanaryPlan | None = None,
        page: bool = False,
        origins: Sequence[str] = (),
        hosts: Collection[str] = (),
        report: Path | None = None,
    ):
        self.service = service
        self.log = log or AccessLog(None)
        self.metrics, self.intake = Metrics(service, lambda: self.log.failure is not None), Intake()
        keys = keys or Keyring([])
        self.keys = Keyring([*keys.keys, Key.of(ADMIN, admin_key)]) if admin_key else keys
        numbers = Numbers(service, self._note_no_number)
        self.gate = Gate(service, self.metrics, self.keys, limits, self.log, numbers, hosts)
        self._origins = origins
        self.updates = WeightUpdates(service)
        self.canary = self._canary(canary) if canary and service.golden and service.golden.answers else None
        self._canary_every_s = canary.every_s if canary else None
        self._page, self._report = page, report
        self._began = int(time.time())
        self._end_of_pause: asyncio.TimerHandle | None = None
        self._document: dict[str, Any] = {}

    def app(self) -> Starlette:
        """The ASGI application. Its end stops the core."""
        operations = self._operations()
        self._document = document(operations, users_need_keys=self.keys.has_users)
        routes = [Route(one.path, one.handler, methods=[one.method]) for one in operations]
        handlers: dict[Any, Any] = {
            ApiError: _refuse,
            IsthmusError: _refuse_plainly,
            HTTPException: _refuse_route,
            ClientDisconnect: _gone,
        }
        gate = Middleware(self.gate.middleware, {one.path: one.level for one in operations})
        return Starlette(
            routes=routes,
            exception_handlers=handlers,
            lifespan=self._lifespan,
            middleware=[*cross_origin(self._origins), gate],
        )

    def _operations(self) -> list[Operation]:
        user, public = Level.USER, Level.PUBLIC
        busy, streams, tokenizes = (429, 500, 503), (JSON, EVENTS), (TokenizeAsk, TokenizeChatAsk)
        operations = [
            Operation(user, "POST", "/v1/completions", self.completions, (CompletionAsk,), gives=streams, also=busy),
            Operation(user, "POST", "/v1/chat/completions", self.chat, (ChatAsk,), gives=streams, also=busy),
            Operation(user, "POST", "/v1/responses", self.respond, (ResponseAsk,), gives=streams, also=busy),
            Operation(user, "GET", "/v1/models", self.models),
            Operation(user, "GET", "/v1/models/{model:path}", self.model, also=(404,)),
            Operation(user, "POST", "/tokenize", self.tokenize, tokenizes, also=(503,)),
            Operation(user, "POST", "/detokenize", self.detokenize, (DetokenizeAsk,), also=(503,)),
            Operation(user, "GET", "/metrics", self.prometheus, gives=(TEXT,)),
            Operation(public, "GET", "/health", self.health, also=(503,)),
            Operation(public, "GET", "/ready", self.ready, also=(503,)),
            Operation(public, "GET", "/ping", self.ping, gives=(), also=(503,)),
            Operation(public, "GET", "/version", self.version),
            Operation(public, "GET", "/openapi.json", self.openapi),
        ]
        if self.keys.has_admin:
            operations += self._admin_operations()
        if self._report is not None:
            operations.append(Operation(user, "GET", "/report", self.report, gives=("text/html",), also=(404,)))
        if self._page:
            operations.append(Operation(public, "GET", "/examples", self.examples, form="array"))
            operations.append(file_operation("/", "index.html", _file("index.html")))
            names = sorted(path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.is_file())
            operations += [file_operation(f"/{name}", name, _file(name)) for name in names]
        return operations

    def _admin_operations(self) -> list[Operation]:
        def post(path: str, handler: Handler, **more: Any) -> Operation:
            return Operation(Level.ADMIN, "POST", path, handler, **more)

        def get(path: str, handler: Handler, **more: Any) -> Operation:
            return Operation(Level.ADMIN, "GET", path, handler, **more)

        update, refused = UpdateWeightsQuery, (400, 409)
        return [
            post("/pause", self.pause, query=PauseQuery),
            post("/resume", self.resume),
            post("/start_weight_update", self.start_weight_update, query=StartUpdateQuery, also=refused),
            post("/update_weights", self.update_weights, query=update, takes_bytes=True, also=refused),
            post("/finish_weight_update", self.finish_weight_update, query=FinishUpdateQuery, also=refused),
            post("/abort_weight_update", self.abort_weight_update),
            get("/weight_info", self.weight_info),
            get("/weight_checksums", self.weight_checksums),
            get("/usage", self.usage),
            get("/canary", self.canary_report, also=(404,)),
            post("/canary/run", self.run_canary, also=(404,)),
        ]

    async def completions(self, request: Request) -> Response:
        """Texts or token ids go on."""

        def understand(body: bytes) -> tuple[CompletionAsk, Prepared]:
            ask = parse(CompletionAsk, body)
            self._check(ask)
            return ask, prepare_completion(self.service, ask)

        ask, prepared = await self._understood(request, understand)
        exchange = await self._exchange(request, ask, prepared)
        if ask.stream:
            return _event_stream(self._completion_chunks(ask, exchange), exchange)
        choices = await _unless_disconnected(request, exchange.choices())
        return await self._written(exchange, lambda: self._whole_completion(ask, exchange, choices))

    async def chat(self, request: Request) -> Response:
        """A turn of a conversation."""

        def understand(body: bytes) -> tuple[ChatAsk, Prepared]:
            ask = parse(ChatAsk, body)
            self._check(ask)
            return ask, prepare_chat(self.service, ask)

        ask, prepared = await self._understood(request, understand, renders=True)
        exchange = await self._exchange(request, ask, prepared)
        if ask.stream:
            return _event_stream(self._chat_chunks(ask, exchange), exchange)
        choices = await _unless_disconnected(request, exchange.choices())
        return await self._written(exchange, lambda: self._whole_chat(ask, exchange, choices))

    async def respond(self, request: Request) -> Response:
        """A turn of a conversation, in the shape of OpenAI's Responses API. Nothing of it is kept."""

        def understand(body: bytes) -> tuple[ResponseAsk, ChatAsk, Prepared]:
            asked = parse(ResponseAsk, body)
            template = self.service.tokenizer.tool_template if asked.tools else self.service.tokenizer.template
            try:
                ask = read(ChatAsk, asked.chat(with_thinking=template.reads_reasoning or template.cuts_thinking))
                self._check(ask)
                return asked, ask, prepare_chat(self.service, ask)
            except ApiError as error:
                raise in_its_own_words(error) from None

        asked, ask, prepared = await self._understood(request, understand, renders=True)
        try:
            exchange = await self._exchange(request, ask, prepared)
            writer = ResponseWriter(asked, exchange, ask.model or self.service.identity.model)
            if ask.stream:
                return _event_stream(writer.events(), exchange, named=True)
            return JSONResponse(await _unless_disconnected(request, writer.whole()))
        except ApiError as error:
            raise in_its_own_words(error) from None

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text or of a conversation, in vLLM's shape."""

        def understand(body: bytes) -> tuple[TokenizeAsk | TokenizeChatAsk, list[int]]:
            content = load(body)
            if "messages" in content:
                ask = read(TokenizeChatAsk, content)
                self._check_model(ask.model)
                return ask, chat_prompt(self.service, ask, with_tools=bool(ask.tools))
            ask = read(TokenizeAsk, content)
            self._check_model(ask.model)
            return ask, encode_text(self.service, ask.prompt, "prompt", raw=ask.add_special_tokens)

        ask, tokens = await self._understood(request, understand, renders=True)
        texts = [self.service.vocabulary.text_of(token) for token in tokens] if ask.return_token_strs else None
        body = {"count": len(tokens), "max_model_len": self.service.core.length, "tokens": tokens, "token_strs": texts}
        return JSONResponse(body)

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids, special ones included, in vLLM's shape."""

        def understand(body: bytes) -> str:
            ask = parse(DetokenizeAsk, body)
            self._check_model(ask.model)
            check_prompt_tokens(self.service, [ask.tokens], "tokens")
            return self.service.tokenizer.decode(ask.tokens, skip_special=False)

        return JSONResponse({"prompt": await self._understood(request, understand)})

    async def models(self, _request: Request) -> Response:
        """The one model that is served, under each of its names."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.service.names]})

    async def model(self, request: Request) -> Response:
        """The model of that name."""
        name = request.path_params["model"]
        self._check_model(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._began,
            "owned_by": "isthmus",
            "root": self.service.identity.model,
            "parent": None,
            "max_model_len": self.service.core.length,
        }

    async def health(self, _request: Request) -> Response:
        """What is served, and whether the engine works."""
        core, identity = self.service.core, self.service.identity
        body = {
            "status": "ok" if core.failure is None else "failed",
            "engine": "isthmus",
            "model": identity.model,
            "format": identity.format,
            "seal": identity.seal,
            "state": identity.state,
            "signer": identity.signer,
            "checks": dict(self.service.seal_checks),
            "sealed_weights": self.service.is_sealed,
            "report": self._report is not None and self._report.is_file(),
            "pool": identity.pool,
            "rehearsal": self._rehearsal(),
            "kernels": core.kernels,
            "bits": core.bits,
            "records_routes": core.records_routes,
            "weight_version": core.version,
            "max_model_len": core.length,
            "thinks": self.service.thinks,
            "holds_turns": self.service.holds_turns,
            "running": core.running,
            "waiting": core.waiting,
        }
        return JSONResponse(body, status_code=200 if core.failure is None else 503)

    async def prometheus(self, _request: Request) -> Response:
        """Metrics in Prometheus' format, under vLLM's names."""
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, _request: Request) -> Response:
        """This document."""
        return JSONResponse(self._document)

    async def examples(self, _request: Request) -> Response:
        """Prompts to try."""
        return JSONResponse(self.service.examples)

    async def report(self, _request: Request) -> Response:
        """The dossier of the run that is served."""
        if self._report is None or not self._report.is_file():
            raise ApiError("this run has no dossier yet; `isthmus report` writes it", status=404)
        return FileResponse(self._report, headers=REPORT_HEADERS)

    async def ready(self, _request: Request) -> Response:
        """Whether requests should be sent here."""
        state = self.gate.state
        trouble = {} if self.log.failure is None else {"access_log": self.log.failure}
        return JSONResponse({"status": state, **trouble}, status_code=200 if state == "ready" else 503)

    async def ping(self, _request: Request) -> Response:
        """Whether the engine works."""
        return Response(status_code=200 if self.service.core.failure is None else 503)

    async def version(self, _request: Request) -> Response:
        """The version of this software."""
        return JSONResponse({"version": __version__})

    async def pause(self, request: Request) -> Response:
        """Stop between two steps. See docs/serving.md for the modes."""
        query = _query(PauseQuery, request)
        if query.mode == "wait":
            await _unless_disconnected(request, self._let_all_finish())
        await run_in_threadpool(self.service.core.pause)
        self._cancel_end_of_pause()
        if query.seconds is not None:
            self._end_of_pause = asyncio.get_running_loop().call_later(query.seconds, self._resume)
        self.log.event("pause", mode=query.mode, seconds=query.seconds)
        return JSONResponse({"paused": True, "running": self.service.core.running})

    async def resume(self, _request: Request) -> Response:
        """End a pause."""
        self._resume()
        return JSONResponse({"paused": False})

    async def weight_info(self, _request: Request) -> Response:
        """The weights in use, the open update, and what became of the last one."""
        info = await run_in_threadpool(self.updates.info)
        return JSONResponse(info | {"paused": self.service.core.paused})

    async def weight_checksums(self, _request: Request) -> Response:
        """What is held of every tensor, by checksums that do not depend on its layout (vllm_plugin/checksums.py)."""
        return JSONResponse(await run_in_threadpool(self.updates.checksums))

    async def start_weight_update(self, request: Request) -> Response:
        """The version and what it changes stand in the query; nothing is sent yet."""
        query = _query(StartUpdateQuery, request)
        status = await self._change_weights(
            self.updates.start,
            query.version,
            query.mode,
            base_version=query.base_version,
            format_name=query.format,
            abort=query.abort == "true",
        )
        return JSONResponse({"update": status})

    async def update_weights(self, request: Request) -> Response:
        """The body is what updates/wire.py packs; its `sha256` stands in the query.

        Within a started update it is one part of the new weights, otherwise all of them, and takes their `version`.
        """
        query = _query(UpdateWeightsQuery, request)
        _check_encoding(request)
        version, sha256 = query.version, query.sha256
        payload = await weights_body(request, self.updates.largest_message)
        if version is None or self.updates.knows(version):
            return JSONResponse({"update": await self._change_weights(self.updates.add, payload, sha256, version)})
        return JSONResponse(await self._take_weights(self.updates.at_once, payload, version, sha256))

    async def finish_weight_update(self, request: Request) -> Response:
        """Check everything that was sent and take it into use between two steps."""
        query = _query(FinishUpdateQuery, request)
        return JSONResponse(await self._take_weights(self.updates.finish, query.version, query.sha256))

    async def abort_weight_update(self, _request: Request) -> Response:
        """Give up the open update."""
        return JSONResponse(await self._change_weights(self.updates.abort))

    async def usage(self, _request: Request) -> Response:
        """Requests, refusals and tokens of each key."""
        return JSONResponse({"keys": self.gate.usage()})

    async def canary_report(self, _request: Request) -> Response:
        """The last canary."""
        last = self._require_canary().last
        return JSONResponse({"last": last.shown() if last else None})

    async def run_canary(self, _request: Request) -> Response:
        """Run a canary now."""
        report = await run_in_threadpool(self._require_canary().run)
        return JSONResponse({"last": report.shown()})

    async def _change_weights(
        self, change: Callable[..., dict[str, Any]], *args: Any, **options: Any
    ) -> dict[str, Any]:
        try:
            return await run_in_threadpool(change, *args, **options)
        except IsthmusError as error:
            self.metrics.refused_updates.inc()
            self.log.event("weight update refused", reason=str(error), version=self.service.core.version)
            raise

    async def _take_weights(self, change: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
        revision = self.service.revision
        taken = await self._change_weights(change, *args)
        if self.service.revision != revision:
            self.metrics.weight_updates.inc()
            self.log.event("weight update", version=taken["version"], sha256=taken["sha256"])
        return taken

    async def _let_all_finish(self) -> None:
        """Hold new requests back until none runs. If this is cancelled, they go on."""
        self.gate.close()
        try:
            while self.gate.unfinished or self.service.core.running or self.service.core.waiting:
                await asyncio.sleep(POLL_S)
        except asyncio.CancelledError:
            self.gate.open()
            raise

    def _resume(self) -> None:
        self._cancel_end_of_pause()
        self.service.core.resume()
        self.gate.open()
        self.log.event("resume")

    def _cancel_end_of_pause(self) -> None:
        if self._end_of_pause is not None:
            self._end_of_pause.cancel()
            self._end_of_pause = None

    def _canary(self, plan: CanaryPlan) -> Canary:
        assert self.service.golden is not None

        def tell(report: CanaryReport) -> None:
            self._note_canary(report)
            plan.tell(report)

        def roll_back(reason: str) -> None:
            assert plan.sealed_bundle is not None
            self.roll_back(plan.sealed_bundle, reason)

        return Canary(
            self.service,
            self.service.golden,
            bound=plan.bound,
            roll_back=roll_back if plan.sealed_bundle else None,
            tell=tell,
            quiet=lambda: self.gate.state != "ready",
        )

    def _note_canary(self, report: CanaryReport) -> None:
        self.metrics.canary_ran(report.outcome)
        self.metrics.canary_drift.set(float("nan") if report.drift is None else report.drift)
        self.metrics.canary_alarm.set(report.outcome == "drift")
        self.gate.damaged = report.outcome == "drift" and report.rolled_back
        self.log.event("canary", **report.shown())

    def _note_no_number(self, reason: str) -> None:
        """Called from a thread of its own."""
        self.log.event("not_a_number", reason=reason)
        if self.canary is not None:
            self.canary.alarm(reason)

    def roll_back(self, sealed_bundle: Callable[[], Bundle], reason: str) -> None:
        """Bring the sealed weights back. What runs or waits ends with an error; what comes later has these."""
        bundle, core = sealed_bundle(), self.service.core
        was_paused = core.paused
        core.pause()
        try:
            self.gate.end_all("the weights were found damaged and the sealed ones were brought back; send it again")
            self.updates.replace(lambda: self.service.restore(bundle), reason)
        finally:
            if not was_paused:
                core.resume()
        self.metrics.rollbacks.inc()
        self.log.event("rollback", reason=reason, version=core.version)

    def _require_canary(self) -> Canary:
        if self.canary is None:
            raise ApiError("no canaries here: this bundle has no golden answers, or they are switched off", status=404)
        return self.canary

    async def _written(self, exchange: Exchange, content: Callable[[], dict[str, Any]]) -> Response:
        """An answer in one piece; a long one is written off the event loop."""
        if exchange.generated < LONG_ANSWER_TOKENS:
            return JSONResponse(content())
        return await self.intake.one_at_a_time(lambda: JSONResponse(content()))

    def _whole_completion(self, ask: CompletionAsk, exchange: Exchange, choices: list[Choice]) -> dict[str, Any]:
        vocabulary, prompts = self.service.vocabulary, exchange.prompts
        shown = [
            completion_choice(ask, vocabulary, prompts[p], c, exchange.rules, exchange.prompt_tokens[p])
            for c, p in ((choice, choice.index // ask.n) for choice in choices)
        ]
        return self._envelope("text_completion", ask) | {"choices": shown, "usage": self._count(exchange)}

    def _whole_chat(self, ask: ChatAsk, exchange: Exchange, choices: list[Choice]) -> dict[str, Any]:
        body = self._envelope("chat.completion", ask) | {
            "choices": [chat_choice(ask, self.service.vocabulary, choice) for choice in choices],
            "usage": self._count(exchange),
        }
        if ask.prompt_logprobs is not None:
            tokens = exchange.prompt_tokens[0] or []
            body["prompt_logprobs"] = prompt_logprobs(self.service.vocabulary, tokens, ask.prompt_logprobs)
        if ask.return_token_ids:
            body["prompt_token_ids"] = exchange.prompts[0]
        return body

    async def _completion_chunks(self, ask: CompletionAsk, exchange: Exchange) -> AsyncIterator[dict[str, Any]]:
        head, vocabulary = self._envelope("text_completion", ask), self.service.vocabulary
        starts = [0] * exchange.size
        for index in range(exchange.size if ask.echo else 0):
            text = echo(ask, vocabulary, exchange.prompts[index // ask.n], index)
            starts[index] = len(text)
            shown = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
            yield head | {"choices": [shown]} | self._running_usage(exchange)
        places = [TextPlaces(vocabulary, exchange.rules, start) for start in starts]
        async for piece in exchange.pieces():
            shown = completion_piece(ask, vocabulary, piece, places[piece.index])
            if shown["text"] or len(piece.drawn) or piece.choice:
                yield head | {"choices": [shown]} | self._running_usage(exchange)
        if ask.include_usage:
            yield head | {"choices": [], "usage": self._count(exchange)}

    async def _chat_chunks(self, ask: ChatAsk, exchange: Exchange) -> AsyncIterator[dict[str, Any]]:
        head = self._envelope("chat.completion.chunk", ask)
        for index in range(exchange.size):
            yield head | {"choices": [chat_opening(index)]} | self._running_usage(exchange)
        async for piece in exchange.pieces():
            shown = chat_piece(ask, self.service.vocabulary, piece)
            if shown is not None:
                yield head | {"choices": [shown]} | self._running_usage(exchange)
        if ask.include_usage:
            yield head | {"choices": [], "usage": self._count(exchange)}

    async def _exchange(self, request: Request, ask: Ask, prepared: Prepared) -> Exchange:
        await _check_presence(request)
        constraint = None
        if prepared.grammar is not None:
            constraint = await self.intake.one_at_a_time(lambda: prepared.constraint(self.service))
        exchange = Exchange(self.service, ask, prepared, CURRENT.get(), constraint)
        self.gate.admit(prepared.prompts, ask.n)
        return exchange

    async def _understood(
        self, request: Request, understand: Callable[[bytes], ResultType], *, renders: bool = False
    ) -> ResultType:
        """What `understand` makes of the body of a request. Raises ApiError.

        It is done off the event loop where it takes longer than going there: for long bodies, and where it `renders` a
        conversation.
        """
        _check_json(request)

        def work() -> ResultType:
            check_body(body)
            return understand(body)

        async with self.intake.body(request) as body:
            if renders or len(body) > SHORT_BODY_BYTES:
                return await self.intake.off_the_loop(len(body), work)
            return work()

    def _check(self, ask: Ask) -> None:
        check_options(ask)
        self._check_model(ask.model)
        self.gate.check_line()

    def _check_model(self, asked: str | None) -> None:
        known = self.service.names
        if asked is not None and asked not in known:
            message = f"the model {asked!r} does not exist here; this server has {', '.join(map(repr, known))}"
            raise ApiError(message, status=404, param="model", code="model_not_found")

    def _count(self, exchange: Exchange) -> dict[str, Any]:
        reasoning = exchange.reasoning_tokens if isinstance(exchange.ask, ChatAsk) else None
        prompt_tokens = sum(map(len, exchange.prompts))
        return usage(prompt_tokens, exchange.generated, exchange.cached_tokens, reasoning)

    def _running_usage(self, exchange: Exchange) -> dict[str, Any]:
        """The usage in a chunk before the last: that so far if it is wanted, else null if a last one will come."""
        if exchange.ask.continuous_usage:
            return {"usage": self._count(exchange)}
        return {"usage": None} if exchange.ask.include_usage else {}

    def _envelope(self, kind: str, ask: Ask) -> dict[str, Any]:
        return envelope(kind, ask.model or self.service.identity.model, self.service.fingerprint, ask.request_id)

    def _rehearsal(self) -> dict[str, Any] | None:
        identity = self.service.identity
        if identity.rehearsed is None:
            return None
        return {"chip": identity.rehearsed, "statement": identity.statement, "operators": self.service.rehearsal}

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        tidying = asyncio.create_task(self._tidy())
        if self.canary is not None and self._canary_every_s is not None:
            self.canary.start(self._canary_every_s)
        yield
        tidying.cancel()
        if self.canary is not None:
            self.canary.stop()
        await run_in_threadpool(self.service.core.stop)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_EVERY_S)
            await run_in_threadpool(self.updates.expire)
            await run_in_threadpool(give_back)


def _file(name: str) -> Handler:
    async def send(_request: Request) -> Response:
        return FileResponse(STATIC / name, headers=PAGE_HEADERS)

    return send


def _check_encoding(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = f"the body is compressed ({encoding[:40]}), and this server reads none that is: send it as it is"
        raise ApiError(message, status=415, code="unsupported_content_encoding")


def _check_json(request: Request) -> None:
    _check_encoding(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/json":
        raise ApiError(f"send Content-Type: application/json (this request has {kind or 'none'!r})", status=415)


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


async def _check_presence(request: Request) -> None:
    """Raise ClientDisconnect for one that has left meanwhile; the event loop takes two turns to see it."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    if await request.is_disconnected():
        raise ClientDisconnect


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event_stream(chunks: AsyncIterator[dict[str, Any]], exchange: Exchange, *, named: bool = False) -> Response:
    """Server-sent events: of chat and completions, or `named` by their types. What is there at once is sent at once."""
    events = _joined(_named_events(chunks) if named else _events(chunks), exchange)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _joined(events: AsyncIterator[bytes], exchange: Exchange) -> AsyncIterator[bytes]:
    waiting = b""
    async for event in events:
        waiting += event
        if len(waiting) > JOINED_BYTES or not exchange.has_more:
            yield waiting
            waiting = b""
    if waiting:
        yield waiting


async def _named_events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """The last of them says how it ended, a failure too."""
    try:
        async for chunk in chunks:
            yield f"event: {chunk['type']}\n".encode() + _event(chunk)
    except ApiError as error:
        note_error(error)


async def _events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """The status is already sent, so a failure half way is an event too."""
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except ApiError as error:
        note_error(error)
        yield _event(error.body())
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _query(kind: type[AskType], request: Request) -> AskType:
    """The parameters of the query. Raises ApiError (400) that names the first at fault."""
    given = request.query_params.multi_items()
    fields = dict(given)
    if len(fields) < len(given):
        raise ApiError("a parameter stands twice in the query")
    return read(kind, fields)


async def _refuse(_request: Request, error: ApiError) -> Response:
    return refuse(error)


async def _refuse_plainly(_request: Request, error: IsthmusError) -> Response:
    return refuse(ApiError(str(error)))


async def _refuse_route(_request: Request, error: HTTPException) -> Response:
    answer = refuse(ApiError(error.detail, status=error.status_code))
    answer.headers.update(error.headers or {})
    return answer


async def _gone(_request: Request, _error: ClientDisconnect) -> Response:
    return Response(status_code=499)
