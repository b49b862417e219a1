"""From a request on the wire to samples of the core, and from their tokens to finished choices."""

from __future__ import annotations

import asyncio
import math
import secrets
import weakref
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from isthmus.engines import EngineError
from isthmus.engines.kept import Kept
from isthmus.engines.local.api.prepare import Prepared
from isthmus.engines.local.api.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ApiError,
    Ask,
    ChatAsk,
    CompletionAsk,
    too_long,
)
from isthmus.engines.local.api.service import Service
from isthmus.engines.local.api.text import Beginning, Call, ChannelledText, Delta, PlainText, Rules, Writer
from isthmus.engines.local.api.visit import Visit
from isthmus.engines.local.core.grammar import GrammarConstraint
from isthmus.engines.local.core.scheduler import (
    Constraint,
    Finished,
    Listener,
    PromptToken,
    Request,
    Token,
    TopLogprobs,
)

MOST_UNREAD, MOST_UNREAD_OF_CHOICE = 1024, 64
"""Events that may wait for their client, of a request, or of each of its choices if that is more."""


@dataclass
class Drawn:
    """Tokens with their log-probabilities; `top` has the alternatives of each, or nothing if none were asked for."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TopLogprobs] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, step: Token) -> None:
        self.tokens.append(step.token)
        self.logprobs.append(step.logprob)
        self.top.append(step.top)


@dataclass(frozen=True)
class Choice:
    """A finished choice. `stop_reason` is the stop string or token of `stop_token_ids` that ended it, if one did."""

    index: int
    reasoning: str
    content: str
    calls: list[Call]
    drawn: Drawn
    finish_reason: str
    stop_reason: str | int | None
    version: int
    last_version: int
    versions: list[int] | None = None
    routes: NDArray[np.int16] | None = None
    kept: Kept | None = None


@dataclass(frozen=True)
class Piece:
    """What a stream shows next of one choice: new text and calls, their tokens, and at the end the whole choice.

    `first_call` is the index of the first of the calls in it.
    """

    index: int
    parts: list[Delta | Call]
    drawn: Drawn
    choice: Choice | None = None
    first_call: int = 0


class Exchange:
    """One request on its way through the core. `visit` hears what happens to its samples."""

    def __init__(
        self, service: Service, ask: Ask, prepared: Prepared, visit: Visit, constraint: Constraint | None = None
    ):
        self.service, self.ask, self.prompts, self.visit = service, ask, prepared.prompts, visit
        self._calls = prepared.calls
        self._thinking: Beginning = prepared.thinking
        self._constraint, self._wanted_by = constraint, prepared.wanted_by
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Token | Finished] = asyncio.Queue()
        self.rules = self._rules()
        self._writers: dict[int, Writer] = {}
        self._drawn = [Drawn() for _ in range(self.size)]
        self._parts: list[list[Delta | Call]] = [[] for _ in range(self.size)]
        self._called = [0] * self.size
        self._cached = [0] * len(self.prompts)
        self.prompt_tokens: list[list[PromptToken] | None] = [None] * len(self.prompts)
        self._request = self._make_request()
        self._delivered, self._taken, self._held = 0, 0, False

    @property
    def size(self) -> int:
        """Number of choices."""
        return len(self.prompts) * self.ask.n

    @property
    def has_more(self) -> bool:
        """Whether the next piece would come at once."""
        return not self._events.empty()

    @property
    def generated(self) -> int:
        """Tokens generated so far, of all choices."""
        return sum(map(len, self._drawn))

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of thinking so far, of all choices."""
        return sum(writer.reasoning_tokens for writer in self._writers.values())

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompts that came from the prefix cache, each prompt counted once."""
        return sum(self._cached)

    async def choices(self) -> list[Choice]:
        """All choices in order, when the last is done."""
        finished = [piece.choice async for piece in self.pieces() if piece.choice is not None]
        return sorted(finished, key=lambda choice: choice.index)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The stream. Whoever leaves it early aborts what still runs. Raises ApiError if the core fails."""
        open_choices = self.size
        self._submit()
        try:
            while open_choices:
                event = await self._next_event()
                if isinstance(event, Finished):
                    open_choices -= 1
                    yield self._finish(event)
                elif not self._writer(event.choice).stopped:
                    yield self._advance(event)
        finally:
            if open_choices:
                self.service.core.end(self._request)

    def _make_request(self) -> Request:
        ask, service = self.ask, self.service
        echoed = ask.logprobs if isinstance(ask, CompletionAsk) and ask.echo else None
        routes = isinstance(ask, CompletionAsk) and ask.return_routed_experts
        if routes and not service.core.records_routes:
            raise ApiError(
                "the experts of tokens are not noted here: start the server with --record-routes, and with a model "
                "that has experts",
                param="return_routed_experts",
            )
        prompt_logprobs = max((count for count in (ask.prompt_logprobs, echoed) if count is not None), default=None)
        return Request(
            self.prompts,
            _listener(self),
            token_limit(service, ask, self.prompts),
            n=ask.n,
            temperature=service.default_temperature if ask.temperature is None else ask.temperature,
            top_p=ask.top_p,
            top_k=min(max(ask.top_k, 0), service.architecture.vocab_size),
            min_p=ask.min_p,
            presence_penalty=ask.presence_penalty,
            frequency_penalty=ask.frequency_penalty,
            repetition_penalty=ask.repetition_penalty,
            logit_bias=ask.logit_bias,
            stop_tokens=self._stop_tokens,
            ignore_eos=ask.ignore_eos,
            min_tokens=ask.min_tokens,
            seed=secrets.randbits(63) if ask.seed is None else ask.seed,
            seeds=ask.seeds if isinstance(ask, CompletionAsk) else None,
            top_logprobs=alternatives(ask),
            prompt_logprobs=prompt_logprobs,
            constraint=self._constraint,
            stream=ask.stream or bool(ask.stop) or (self._calls is not None and not self._calls.parallel),
            routes=routes,
            kept=isinstance(ask, CompletionAsk) and ask.return_sampling_mask,
            owner=self.visit.key_name,
        )

    def _submit(self) -> None:
        self.visit.submitted(self._request)
        try:
            self.service.core.submit(self._request)
        except EngineError as error:
            self.visit.submitted(None)
            raise ApiError(str(error), status=503) from None

    def deliver(self, event: Token | Finished) -> None:
        """Called from the engine's thread. A request whose events nobody takes is held: its client does not read."""
        self._delivered += 1
        if not self._held and self._delivered - self._taken > max(MOST_UNREAD, MOST_UNREAD_OF_CHOICE * self.size):
            self._held = True
            self.service.core.hold(self._request)
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def _next_event(self) -> Token | Finished:
        if self.has_more:
            await asyncio.sleep(0)
        event = await self._events.get()
        self._taken += 1
        if self._held and self._events.empty():
            self._held = False
            self.service.core.release(self._request)
        return event

    def _advance(self, step: Token) -> Piece:
        writer = self._writer(step.choice)
        parts = writer.push(step.token)
        self._drawn[step.choice].add(step)
        if writer.stopped:
            self.service.core.end(self._request, step.choice, "stop")
        return self._piece(step.choice, parts, Drawn([step.token], [step.logprob], [step.top]))

    def _finish(self, end: Finished) -> Piece:
        writer = self._writer(end.choice)
        self._raise_if_failed(end, writer)
        if not self._request.stream:
            self._drawn[end.choice] = Drawn(end.tokens, end.logprobs, end.top)
            self._parts[end.choice] = writer.push_all(end.tokens)
        prompt, sample = divmod(end.choice, self.ask.n)
        if sample == 0:
            self._cached[prompt], self.prompt_tokens[prompt] = end.cached_tokens, end.prompt_tokens
        piece = self._piece(end.choice, writer.finish(), Drawn())
        return replace(piece, choice=self._choice(end, writer))

    def _piece(self, index: int, parts: list[Delta | Call], drawn: Drawn) -> Piece:
        self._parts[index] += parts
        earlier = self._called[index]
        self._called[index] += sum(isinstance(part, Call) for part in parts)
        return Piece(index, parts, drawn, first_call=earlier)

    def _raise_if_failed(self, end: Finished, writer: Writer) -> None:
        if isinstance(self._constraint, GrammarConstraint) and self._constraint.failures:
            reason = self._constraint.failures[0]
            raise ApiError(
                f"the answer's format became too costly to follow: {reason}",
                param=self._wanted_by,
                code="format_too_complex",
            )
        if end.finish_reason == "error" and not writer.stopped:
            if all(map(math.isfinite, end.logprobs)):
                raise ApiError("the engine could not follow the answer's format; its log says why", status=500)
            raise ApiError("the model's output is not a number: its weights are damaged", status=500)
        if end.finish_reason == "abort":
            raise ApiError(self.visit.refusal or "the engine stopped before this request was done", status=503)

    def _choice(self, end: Finished, writer: Writer) -> Choice:
        texts, calls = {"reasoning": "", "content": ""}, []
        for part in self._parts[end.choice]:
            if isinstance(part, Call):
                calls.append(part)
            else:
                texts[part.channel] += part.text
        reason = "stop" if writer.stopped else end.finish_reason
        return Choice(
            end.choice,
            texts["reasoning"],
            texts["content"],
            calls,
            self._drawn[end.choice],
            "tool_calls" if calls and reason == "stop" else reason,
            writer.stop or end.stop_token,
            end.version,
            end.last_version,
            end.versions,
            end.routes,
            end.kept,
        )

    @property
    def _stop_tokens(self) -> frozenset[int]:
        """Those of the request, and the further ends that the model has, unless it is to go on beyond its ends."""
        return frozenset(self.ask.stop_token_ids) | (frozenset() if self.ask.ignore_eos else self.service.other_ends)

    def _rules(self) -> Rules:
        ask = self.ask
        ends = self._stop_tokens | (frozenset() if ask.ignore_eos else {self.service.tokenizer.eos_id})
        return Rules(
            ask.stop,
            keep_stop=ask.include_stop_str_in_output,
            ends=frozenset() if ask.include_stop_str_in_output else ends,
            skip_special=ask.skip_special_tokens,
            shown=frozenset() if self._calls is None else self._calls.marks,
        )

    def _writer(self, choice: int) -> Writer:
        """What writes a choice, made when its first token comes: a request may have thousands."""
        if choice not in self._writers:
            self._writers[choice] = self._new_writer(self.prompts[choice // self.ask.n])
        return self._writers[choice]

    def _new_writer(self, prompt: list[int]) -> Writer:
        vocabulary = self.service.vocabulary
        if not isinstance(self.ask, ChatAsk):
            return PlainText(vocabulary, self.rules, prompt)
        reader = None if self._calls is None else self._calls.reader()
        return ChannelledText(vocabulary, self.rules, self._thinking, reader)


def _listener(exchange: Exchange) -> Listener:
    """Tells a visit, and its exchange for as long as somebody waits for that; it does not keep it."""
    visit, known = exchange.visit, weakref.ref(exchange)

    def tell(event: Token | Finished) -> None:
        visit.tell(event)
        if (waited_for := known()) is not None:
            waited_for.deliver(event)

    return tell


def token_limit(service: Service, ask: Ask, prompts: list[list[int]]) -> int:
    """Tokens that each choice may have. Raises ApiError (400) if a prompt is empty or does not leave room for them."""
    length = service.core.length
    field = "messages" if isinstance(ask, ChatAsk) else "prompt"
    longest = max(map(len, prompts), default=0)
    if not prompts or min(map(len, prompts)) == 0:
        raise ApiError("a prompt must have at least one token", param=field, code="invalid_value")
    if longest >= length:
        least = 1 if isinstance(ask, ChatAsk) else DEFAULT_COMPLETION_TOKENS
        raise too_long(length, longest, least if ask.limit is None else ask.limit, field, field)
    limit = ask.limit if ask.limit is not None else _default_limit(service, ask, length - longest)
    if ask.min_tokens > limit:
        raise ApiError(f"min_tokens is {ask.min_tokens}, and at most {limit} are generated", param="min_tokens")
    if longest + limit > length:
        raise too_long(length, longest, limit, field, ask.limit_name)
    return limit


def alternatives(ask: Ask) -> int:
    """How many likeliest tokens to report beside each drawn one."""
    if isinstance(ask, ChatAsk):
        return ask.top_logprobs or 0
    return (ask.logprobs or 0) if isinstance(ask, CompletionAsk) else 0


def _default_limit(service: Service, ask: Ask, room: int) -> int:
    if isinstance(ask, ChatAsk):
        return min(room, service.default_tokens or room)
    return min(room, DEFAULT_COMPLETION_TOKENS)
