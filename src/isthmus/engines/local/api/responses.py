"""Finished choices and pieces of a stream in the shapes of OpenAI's API, with vLLM's extensions beside them."""

from __future__ import annotations

import base64
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isthmus.engines.local.api.answers import Choice, Drawn, Piece
from isthmus.engines.local.api.protocol import ChatAsk, CompletionAsk
from isthmus.engines.local.api.text import Call, Delta, Rules, Vocabulary
from isthmus.engines.local.api.token_names import TextPlaces, by_name, chat_name, legacy_name, prompt_places
from isthmus.engines.local.core.scheduler import PromptToken

# JSON has no infinity; vLLM writes this instead.
_LEAST_LOGPROB = -9999.0


def completion_choice(
    ask: CompletionAsk,
    vocabulary: Vocabulary,
    prompt: list[int],
    choice: Choice,
    rules: Rules,
    prompt_tokens: list[PromptToken] | None = None,
) -> dict[str, Any]:
    """One choice of a text completion, which became text by `rules`.

    `prompt_tokens` are its prompt's, if their log-probabilities are wanted.
    """
    before = echo(ask, vocabulary, prompt, choice.index) if ask.echo else ""
    shown: dict[str, Any] = {
        "index": choice.index,
        "text": before + choice.content,
        "logprobs": None,
        **_ending(choice),
    }
    if ask.logprobs is not None:
        echoed = prompt_tokens if ask.echo and prompt_tokens is not None else []
        places = TextPlaces(vocabulary, rules, len(before)).of(choice.drawn.tokens)
        places = [min(place, len(shown["text"])) for place in places]
        if echoed:
            places = prompt_places(vocabulary, [one.token for one in echoed], before) + places
        shown["logprobs"] = completion_logprobs(vocabulary, choice.drawn, ask.logprobs, places, echoed)
    if ask.prompt_logprobs is not None and prompt_tokens is not None:
        shown["prompt_logprobs"] = prompt_logprobs(vocabulary, prompt_tokens, ask.prompt_logprobs)
    if ask.return_token_ids:
        shown |= {"token_ids": choice.drawn.tokens, "prompt_token_ids": prompt}
    if ask.return_token_ids and choice.versions is not None:
        runs = [[version, len(list(tokens))] for version, tokens in groupby(choice.versions)]
        shown["token_versions"] = runs
    if choice.routes is not None:
        shown["routed_experts"] = packed_routes(choice.routes)
    if choice.kept is not None:
        shown["sampling_mask"] = asdict(choice.kept)
    return shown


def packed_routes(routes: NDArray[np.int16]) -> dict[str, Any]:
    """Experts [T, layers * K] as base64 of one byte each, or of two, little-endian, where their numbers want it."""
    dtype = "uint8" if routes.max(initial=0) < 256 else "int16"
    data = routes.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    return {"shape": list(routes.shape), "dtype": dtype, "data": base64.b64encode(data).decode()}


def completion_piece(ask: CompletionAsk, vocabulary: Vocabulary, piece: Piece, places: TextPlaces) -> dict[str, Any]:
    """One choice in a chunk of a streamed text completion. `places` are those of its choice so far."""
    shown: dict[str, Any] = {
        "index": piece.index,
        "text": "".join(part.text for part in piece.parts if isinstance(part, Delta)),
        "logprobs": None,
        "finish_reason": None,
    }
    if ask.logprobs is not None and len(piece.drawn):
        found = places.of(piece.drawn.tokens)
        shown["logprobs"] = completion_logprobs(vocabulary, piece.drawn, ask.logprobs, found)
    if piece.choice is not None:
        shown |= _ending(piece.choice)
    if ask.return_token_ids:
        shown["token_ids"] = piece.drawn.tokens
    return shown


def echo(ask: CompletionAsk, vocabulary: Vocabulary, prompt: list[int], index: int) -> str:
    """The prompt of a choice as text: as it was sent, or from its tokens."""
    asked = ask.prompts[index // ask.n]
    return asked if isinstance(asked, str) else vocabulary.tokenizer.decode(prompt, skip_special=False)


def completion_logprobs(
    vocabulary: Vocabulary,
    drawn: Drawn,
    alternatives: int,
    places: list[int],
    echoed: list[PromptToken] | None = None,
) -> dict[str, Any]:
    """The legacy layout: parallel lists, an echoed prompt first. `top_logprobs` is null where none were asked for.

    `places` are where the tokens begin in the text.
    """
    before = echoed or []
    tokens = [*(one.token for one in before), *drawn.tokens]
    tops: list[Any] | None = None
    if alternatives:
        shown = [one.top[:alternatives] for one in before] + drawn.top
        tops = [by_name(vocabulary, token, top) for token, top in zip(tokens, shown, strict=True)]
        if before:
            tops[0] = None
    return {
        "tokens": [legacy_name(vocabulary, token) for token in tokens],
        "token_logprobs": [one.logprob for one in before] + drawn.logprobs,
        "top_logprobs": tops,
        "text_offset": places,
    }


def prompt_logprobs(vocabulary: Vocabulary, tokens: list[PromptToken], alternatives: int) -> list[Any]:
    """vLLM's layout: null for the first token, then the token itself and the likeliest ones, by token id."""
    shown: list[Any] = []
    for one in tokens:
        if one.logprob is None:
            shown.append(None)
            continue
        ranked = {one.token: (one.logprob, one.rank)}
        ranked |= {token: (value, rank) for rank, (token, value) in enumerate(one.top[:alternatives], 1)}
        shown.append({str(token): _ranked(vocabulary, token, *found) for token, found in ranked.items()})
    return shown


def _ranked(vocabulary: Vocabulary, token: int, value: float, rank: int | None) -> dict[str, Any]:
    return {"logprob": max(value, _LEAST_LOGPROB), "rank": rank, "decoded_token": vocabulary.text_of(token)}


def chat_choice(ask: ChatAsk, vocabulary: Vocabulary, choice: Choice) -> dict[str, Any]:
    """One choice of a chat completion, its thinking and its calls apart from its answer."""
    reasoning = (choice.reasoning or None) if ask.include_reasoning else None
    message: dict[str, Any] = {
        "role": "assistant",
        "content": choice.content if choice.content or not choice.calls else None,
        "reasoning_content": reasoning,
        "reasoning": reasoning,
    }
    if choice.calls:
        message["tool_calls"] = [_call(call) for call in choice.calls]
    shown: dict[str, Any] = {
        "index": choice.index,
        "message": message,
        "logprobs": chat_logprobs(vocabulary, choice.drawn) if ask.logprobs else None,
        **_ending(choice),
    }
    if ask.return_token_ids:
        shown["token_ids"] = choice.drawn.tokens
    return shown


def chat_opening(index: int) -> dict[str, Any]:
    """The first chunk of a streamed choice: it says who speaks."""
    return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}


def chat_piece(ask: ChatAsk, vocabulary: Vocabulary, piece: Piece) -> dict[str, Any] | None:
    """One choice in a chunk of a streamed chat; None where there is nothing to say."""
    delta: dict[str, Any] = {}
    calls: list[dict[str, Any]] = []
    for part in piece.parts:
        if isinstance(part, Call):
            calls.append({"index": piece.first_call + len(calls), **_call(part)})
        elif part.channel == "content" or ask.include_reasoning:
            for name in ("reasoning_content", "reasoning") if part.channel == "reasoning" else ("content",):
                delta[name] = delta.get(name, "") + part.text
    if calls:
        delta["tool_calls"] = calls
    logprobs = chat_logprobs(vocabulary, piece.drawn) if ask.logprobs and len(piece.drawn) else None
    token_ids = piece.drawn.tokens if ask.return_token_ids else None
    if not (delta or logprobs or token_ids or piece.choice):
        return None
    shown: dict[str, Any] = {"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
    if piece.choice is not None:
        shown |= _ending(piece.choice)
    if token_ids is not None:
        shown["token_ids"] = token_ids
    return shown


def chat_logprobs(vocabulary: Vocabulary, drawn: Drawn) -> dict[str, Any]:
    """Every drawn token with its alternatives, those of the thinking included."""
    tops = drawn.top or [[]] * len(drawn)
    content = [
        {
            **_named(vocabulary, token, value),
            "top_logprobs": [_named(vocabulary, other, other_value) for other, other_value in top],
        }
        for token, value, top in zip(drawn.tokens, drawn.logprobs, tops, strict=True)
    ]
    return {"content": content, "refusal": None}


def _ending(choice: Choice) -> dict[str, Any]:
    return {
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
        "weight_versions": [choice.version, choice.last_version],
    }


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _named(vocabulary: Vocabulary, token: int, logprob: float) -> dict[str, Any]:
    return {"token": chat_name(vocabulary, token), "logprob": logprob, "bytes": list(vocabulary.bytes_of(token))}
