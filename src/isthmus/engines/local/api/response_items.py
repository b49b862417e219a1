"""A finished answer and a stream in the shapes of OpenAI's Responses API: items of thinking, text and calls."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from isthmus.engines.local.api.answers import Choice, Drawn, Exchange
from isthmus.engines.local.api.protocol import ApiError
from isthmus.engines.local.api.response_ask import LOGPROBS, ResponseAsk, TextFormat
from isthmus.engines.local.api.responses import chat_logprobs
from isthmus.engines.local.api.text import Call, Delta, Vocabulary

Event = dict[str, Any]
_PART_OF = {"reasoning": "reasoning_text", "content": "output_text"}


class ResponseWriter:
    """One response on its way: what its stream says next, and what it is at the end.

    `model` is the name that it carries.
    """

    def __init__(self, ask: ResponseAsk, exchange: Exchange, model: str):
        self._ask, self._exchange, self._model = ask, exchange, model
        self._vocabulary: Vocabulary = exchange.service.vocabulary
        self._id, self._began = _new_id("resp"), time.time()
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._logprobs_so_far: list[Any] = []
        self._number = 0

    async def whole(self) -> dict[str, Any]:
        """The response, when it is done."""
        [choice] = await self._exchange.choices()
        parts = [Delta("reasoning", choice.reasoning), Delta("content", choice.content), *choice.calls]
        for part in parts:
            if isinstance(part, Call) or part.text:
                list(self._take(part))
        list(self._close())
        for item in self._items:
            if item["type"] == "message":
                item["content"][0]["logprobs"] = self._logprobs(choice.drawn, self._exchange.reasoning_tokens)
        return self._shown(_status(choice), choice)

    async def events(self) -> AsyncIterator[Event]:
        """The stream. A failure half way is an event too."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._shown("in_progress"))
        try:
            async for piece in self._exchange.pieces():
                self._logprobs_so_far += [] if self._is_thinking else self._logprobs(piece.drawn)
                for part in piece.parts:
                    for event in self._take(part):
                        yield event
                if piece.choice is not None:
                    for event in self._close():
                        yield event
                    status = _status(piece.choice)
                    yield self._event(f"response.{status}", response=self._shown(status, piece.choice))
        except ApiError as error:
            problem = {"code": error.code or "server_error", "message": str(error)}
            yield self._event("response.failed", response=self._shown("failed") | {"error": problem})
            raise

    @property
    def _is_thinking(self) -> bool:
        return self._exchange.reasoning_tokens == self._exchange.generated

    def _take(self, part: Delta | Call) -> Iterator[Event]:
        if isinstance(part, Call):
            yield from self._close()
            yield from self._call(part)
            return
        kind = "reasoning" if part.channel == "reasoning" else "message"
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            yield from self._begin(kind, _PART_OF[part.channel])
        assert self._open is not None
        content = self._open["content"][0]
        content["text"] += part.text
        more: dict[str, Any] = {}
        if kind == "message":
            more, self._logprobs_so_far = {"logprobs": self._logprobs_so_far}, []
            content["logprobs"] += more["logprobs"]
        yield self._about_part(f"response.{content['type']}.delta", delta=part.text, **more)

    def _begin(self, kind: str, part_kind: str) -> Iterator[Event]:
        is_message = kind == "message"
        item: dict[str, Any] = {"id": _new_id("msg" if is_message else "rs"), "type": kind, "status": "in_progress"}
        item |= {"role": "assistant"} if is_message else {"summary": []}
        part: dict[str, Any] = {"type": part_kind, "text": ""}
        part |= {"annotations": [], "logprobs": []} if is_message else {}
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item={**item, "content": []})
        item["content"] = [part]
        self._open = item
        yield self._about_part("response.content_part.added", part=dict(part))

    def _close(self) -> Iterator[Event]:
        """End the item that text was written into."""
        if self._open is None:
            return
        item, part, more = self._open, self._open["content"][0], {}
        if item["type"] == "message":
            part["logprobs"] += self._logprobs_so_far
            more, self._logprobs_so_far = {"logprobs": part["logprobs"]}, []
        yield self._about_part(f"response.{part['type']}.done", text=part["text"], **more)
        yield self._about_part("response.content_part.done", part=part)
        item["status"] = "completed"
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)
        self._open = None

    def _call(self, call: Call) -> Iterator[Event]:
        item: dict[str, Any] = {
            "id": _new_id("fc"),
            "type": "function_call",
            "status": "in_progress",
            "call_id": call.id,
            "name": call.name,
            "arguments": "",
        }
        self._items.append(item)
        place = {"item_id": item["id"], "output_index": len(self._items) - 1}
        yield self._event("response.output_item.added", output_index=place["output_index"], item=dict(item))
        item |= {"arguments": call.arguments, "status": "completed"}
        yield self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        done = {"name": call.name, "arguments": call.arguments}
        yield self._event("response.function_call_arguments.done", **place, **done)
        yield self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def _about_part(self, kind: str, **fields: Any) -> Event:
        assert self._open is not None
        place = {"item_id": self._open["id"], "output_index": len(self._items) - 1, "content_index": 0}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _logprobs(self, drawn: Drawn, thinking: int = 0) -> list[Any]:
        if LOGPROBS not in self._ask.include and self._ask.top_logprobs is None:
            return []
        return chat_logprobs(self._vocabulary, drawn)["content"][thinking:]

    def _shown(self, status: str, choice: Choice | None = None) -> dict[str, Any]:
        ask = self._ask
        form = TextFormat(type="text") if ask.text.format is None else ask.text.format
        choice_of_tool = ask.tool_choice if isinstance(ask.tool_choice, str) else ask.tool_choice.model_dump()
        return {
            "id": self._id,
            "object": "response",
            "created_at": int(self._began),
            "completed_at": int(time.time()) if choice is not None and status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": ask.instructions,
            "model": self._model,
            "output": [dict(item) for item in self._items],
            "parallel_tool_calls": ask.parallel_tool_calls,
            "tool_choice": choice_of_tool,
            "tools": [tool.model_dump() for tool in ask.tools],
            "temperature": self._exchange.service.default_temperature if ask.temperature is None else ask.temperature,
            "top_p": ask.top_p,
            "top_logprobs": ask.top_logprobs or 0,
            "max_output_tokens": ask.max_output_tokens,
            "max_tool_calls": None,
            "previous_response_id": None,
            "reasoning": {"effort": ask.reasoning.effort, "summary": None},
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True)},
            "truncation": ask.truncation,
            "background": False,
            "store": False,
            "service_tier": "default",
            "user": ask.user,
            "metadata": ask.metadata or {},
            "usage": None if choice is None else self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        exchange = self._exchange
        given = len(exchange.prompts[0])
        return {
            "input_tokens": given,
            "input_tokens_details": {"cached_tokens": exchange.cached_tokens},
            "output_tokens": exchange.generated,
            "output_tokens_details": {"reasoning_tokens": exchange.reasoning_tokens},
            "total_tokens": given + exchange.generated,
        }


def _status(choice: Choice) -> str:
    return "incomplete" if choice.finish_reason == "length" else "completed"


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"
