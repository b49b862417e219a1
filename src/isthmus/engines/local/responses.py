"""Finished choices and pieces of a stream in the shapes of OpenAI's API, with vLLM's token ids beside them."""

from __future__ import annotations

from typing import Any

from isthmus.engines.local.answers import Choice, Piece
from isthmus.engines.local.protocol import ChatAsk, CompletionAsk
from isthmus.engines.local.scheduler import Token
from isthmus.engines.local.text import Vocabulary


def completion_choice(ask: CompletionAsk, vocabulary: Vocabulary, prompt: list[int], choice: Choice) -> dict[str, Any]:
    """One choice of a text completion."""
    shown: dict[str, Any] = {
        "index": choice.index,
        "text": choice.content,
        "logprobs": None if ask.logprobs is None else completion_logprobs(vocabulary, choice.steps, ask.logprobs, 0),
        "finish_reason": choice.finish_reason,
        "weight_versions": [choice.version, choice.last_version],
    }
    if ask.return_token_ids:
        shown |= {"token_ids": choice.tokens, "prompt_token_ids": prompt}
    return shown


def completion_piece(ask: CompletionAsk, vocabulary: Vocabulary, piece: Piece, offset: int) -> dict[str, Any]:
    """One choice in a chunk of a streamed text completion. `offset` counts the token characters before it."""
    shown: dict[str, Any] = {
        "index": piece.index,
        "text": "".join(delta.text for delta in piece.deltas),
        "logprobs": None,
        "finish_reason": piece.choice.finish_reason if piece.choice else None,
    }
    if ask.logprobs is not None and piece.steps:
        shown["logprobs"] = completion_logprobs(vocabulary, piece.steps, ask.logprobs, offset)
    if piece.choice is not None:
        shown["weight_versions"] = [piece.choice.version, piece.choice.last_version]
    if ask.return_token_ids:
        shown["token_ids"] = [step.token for step in piece.steps]
    return shown


def completion_logprobs(vocabulary: Vocabulary, steps: list[Token], alternatives: int, offset: int) -> dict[str, Any]:
    """The legacy layout: parallel lists. `top_logprobs` is null where no alternatives were asked for."""
    texts = [vocabulary.text_of(step.token) for step in steps]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    tops = [{vocabulary.text_of(token): value for token, value in step.top} for step in steps]
    return {
        "tokens": texts,
        "token_logprobs": [step.logprob for step in steps],
        "top_logprobs": tops if alternatives else None,
        "text_offset": offsets,
    }


def chat_choice(ask: ChatAsk, vocabulary: Vocabulary, choice: Choice) -> dict[str, Any]:
    """One choice of a chat completion, its thinking apart from its answer."""
    reasoning = choice.reasoning or None
    message = {"role": "assistant", "content": choice.content, "reasoning_content": reasoning, "reasoning": reasoning}
    shown: dict[str, Any] = {
        "index": choice.index,
        "message": message,
        "logprobs": chat_logprobs(vocabulary, choice.steps) if ask.logprobs else None,
        "finish_reason": choice.finish_reason,
        "weight_versions": [choice.version, choice.last_version],
    }
    if ask.return_token_ids:
        shown["token_ids"] = choice.tokens
    return shown


def chat_opening(index: int) -> dict[str, Any]:
    """The first chunk of a streamed choice: it says who speaks."""
    return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}


def chat_piece(ask: ChatAsk, vocabulary: Vocabulary, piece: Piece) -> dict[str, Any]:
    """One choice in a chunk of a streamed chat."""
    delta: dict[str, str] = {}
    for channel, text in piece.deltas:
        for name in ("reasoning_content", "reasoning") if channel == "reasoning" else ("content",):
            delta[name] = delta.get(name, "") + text
    shown: dict[str, Any] = {
        "index": piece.index,
        "delta": delta,
        "logprobs": chat_logprobs(vocabulary, piece.steps) if ask.logprobs and piece.steps else None,
        "finish_reason": piece.choice.finish_reason if piece.choice else None,
    }
    if piece.choice is not None:
        shown["weight_versions"] = [piece.choice.version, piece.choice.last_version]
    if ask.return_token_ids:
        shown["token_ids"] = [step.token for step in piece.steps]
    return shown


def chat_logprobs(vocabulary: Vocabulary, steps: list[Token]) -> dict[str, Any]:
    """Every drawn token with its alternatives, those of the thinking included."""
    content = [
        {
            **_named(vocabulary, step.token, step.logprob),
            "top_logprobs": [_named(vocabulary, token, value) for token, value in step.top],
        }
        for step in steps
    ]
    return {"content": content, "refusal": None}


def _named(vocabulary: Vocabulary, token: int, logprob: float) -> dict[str, Any]:
    text = vocabulary.text_of(token)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
