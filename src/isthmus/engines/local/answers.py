"""From a request on the wire to samples of the core, and from their tokens to finished choices."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

from isthmus.engines import EngineError
from isthmus.engines.local.protocol import DEFAULT_COMPLETION_TOKENS, ApiError, Ask, ChatAsk, CompletionAsk
from isthmus.engines.local.scheduler import Finished, Request, Token
from isthmus.engines.local.service import Service
from isthmus.engines.local.text import ChannelledText, Delta, PlainText
from isthmus.engines.local.visit import Visit


@dataclass(frozen=True)
class Choice:
    """A finished choice. `steps` has its tokens with log-probabilities and alternatives."""

    index: int
    reasoning: str
    content: str
    steps: list[Token]
    finish_reason: str
    version: int
    last_version: int

    @property
    def tokens(self) -> list[int]:
        return [step.token for step in self.steps]


@dataclass(frozen=True)
class Piece:
    """What a stream shows next of one choice: new text, the tokens it comes from, and at the end the whole choice."""

    index: int
    deltas: list[Delta]
    steps: list[Token]
    choice: Choice | None = None


class Exchange:
    """One request on its way through the core. `visit` hears what happens to its samples."""

    def __init__(self, service: Service, ask: Ask, prompts: list[list[int]], visit: Visit):
        self.service, self.ask, self.prompts, self.visit = service, ask, prompts, visit
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Token | Finished] = asyncio.Queue()
        self._writers = [self._writer(prompts[index // ask.n]) for index in range(len(prompts) * ask.n)]
        self._steps: list[list[Token]] = [[] for _ in self._writers]
        self._deltas: list[list[Delta]] = [[] for _ in self._writers]
        self._request = Request(
            prompts,
            self._deliver,
            token_limit(service, ask, prompts),
            n=ask.n,
            temperature=service.default_temperature if ask.temperature is None else ask.temperature,
            top_p=ask.top_p,
            seed=secrets.randbits(63) if ask.seed is None else ask.seed,
            seeds=ask.seeds if isinstance(ask, CompletionAsk) else None,
            top_logprobs=alternatives(ask),
            stream=ask.stream or bool(ask.stop),
        )

    @property
    def size(self) -> int:
        """Number of choices."""
        return len(self._writers)

    @property
    def generated(self) -> int:
        """Tokens generated so far, of all choices."""
        return sum(map(len, self._steps))

    async def choices(self) -> list[Choice]:
        """All choices in order, when the last is done."""
        finished = [piece.choice async for piece in self.pieces() if piece.choice is not None]
        return sorted(finished, key=lambda choice: choice.index)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The stream. Whoever leaves it early aborts what still runs. Raises ApiError if the core fails."""
        open_choices = set(range(len(self._writers)))
        self._submit()
        try:
            while open_choices:
                event = await self._events.get()
                if event.choice not in open_choices:
                    continue
                piece = self._finish(event) if isinstance(event, Finished) else self._advance(event)
                if piece.choice is not None:
                    open_choices.remove(piece.index)
                yield piece
        finally:
            if open_choices:
                self.service.core.end(self._request)

    def _submit(self) -> None:
        try:
            self.service.core.submit(self._request)
        except EngineError as error:
            raise ApiError(str(error), status=503) from None
        self.visit.submitted(self._request)

    def _deliver(self, event: Token | Finished) -> None:
        """Called from the engine's thread."""
        self.visit.tell(event)
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _advance(self, step: Token) -> Piece:
        writer = self._writers[step.choice]
        deltas = writer.push(step.token)
        self._steps[step.choice].append(step)
        self._deltas[step.choice] += deltas
        if not writer.stopped:
            return Piece(step.choice, deltas, [step])
        self.service.core.end(self._request, step.choice, "stop")
        return Piece(step.choice, deltas, [step], self._choice(step.choice, "stop", step.version))

    def _finish(self, end: Finished) -> Piece:
        if end.finish_reason == "error":
            raise ApiError("the model's output is not a number: its weights are damaged", status=500)
        if end.finish_reason == "abort":
            raise ApiError(self.visit.refusal or "the engine stopped before this request was done", status=503)
        if not self._request.stream:
            self._take_all(end)
        writer = self._writers[end.choice]
        rest = writer.finish()
        self._deltas[end.choice] += rest
        reason = "stop" if writer.stopped else end.finish_reason
        return Piece(end.choice, rest, [], self._choice(end.choice, reason, end.last_version))

    def _take_all(self, end: Finished) -> None:
        """The tokens of a choice that was not streamed, as if they arrived one by one."""
        tops = end.top or [[]] * len(end.tokens)
        self._steps[end.choice] = [
            Token(end.choice, token, logprob, top, end.version)
            for token, logprob, top in zip(end.tokens, end.logprobs, tops, strict=True)
        ]
        self._deltas[end.choice] = self._writers[end.choice].push_all(end.tokens)

    def _choice(self, index: int, reason: str, last_version: int) -> Choice:
        texts = {"reasoning": "", "content": ""}
        for delta in self._deltas[index]:
            texts[delta.channel] += delta.text
        steps = self._steps[index]
        first_version = steps[0].version if steps else last_version
        return Choice(index, texts["reasoning"], texts["content"], steps, reason, first_version, last_version)

    def _writer(self, prompt: list[int]) -> ChannelledText | PlainText:
        vocabulary = self.service.vocabulary
        if isinstance(self.ask, ChatAsk):
            return ChannelledText(vocabulary, self.ask.stop, vocabulary.opens_thinking(prompt))
        return PlainText(vocabulary, self.ask.stop)


def token_limit(service: Service, ask: Ask, prompts: list[list[int]]) -> int:
    """Tokens that each choice may have. Raises ApiError (400) if a prompt is empty or does not leave room for them."""
    length = service.core.length
    field = "messages" if isinstance(ask, ChatAsk) else "prompt"
    longest = max(map(len, prompts), default=0)
    if not prompts or min(map(len, prompts)) == 0:
        raise ApiError("a prompt must have at least one token", param=field, code="invalid_value")
    if longest >= length:
        raise ApiError(
            f"this model's sequences have at most {length} tokens, and the prompt has {longest}; shorten it",
            param=field,
            code="context_length_exceeded",
        )
    limit = ask.limit if ask.limit is not None else _default_limit(service, ask, length - longest)
    if longest + limit > length:
        raise ApiError(
            f"this model's sequences have at most {length} tokens; the prompt has {longest}, so at most "
            f"{length - longest} can be generated, and {limit} were asked for",
            param="max_completion_tokens" if isinstance(ask, ChatAsk) else "max_tokens",
            code="context_length_exceeded",
        )
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
