"""The traffic of soak.py: one request after the other, drawn from a seed, each with what its answer must look like."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jsonschema

LENGTH, VOCAB_SIZE = 256, 300
WORDS = [
    "use",
    "reach",
    "and",
    "3",
    "4",
    "5",
    "23",
    "+",
    "=",
    "answer",
    "found",
    "the",
    "is",
    "naïve",
    "café",
    "✓",
    "✗",
]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome", "Xi'an"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["city", "n"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("look", "go")]
REASONS = {"stop", "length", "tool_calls"}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Errand:
    """One request. `check` reads the body of its answer and raises AssertionError.

    `leaves` says how its client goes away early: `unread` after the request, `midstream` after some events, `unsent` in
    the middle of its own body.
    """

    kind: str
    path: str
    body: dict[str, Any]
    check: Callable[[dict[str, Any]], None]
    status: int = 200
    leaves: str | None = None

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


def errand(seed: int, number: int) -> Errand:
    """The request with this number."""
    draw = random.Random(f"{seed} {number}")
    kinds = {
        _completion: 34,
        _near_the_limit: 6,
        _same_beginning: 14,
        _chat: 20,
        _structured: 10,
        _calls: 8,
        _scored: 3,
        _wrong: 5,
    }
    made = draw.choices(list(kinds), list(kinds.values()))[0](draw)
    if made.status != 200 or draw.random() > 0.16:
        return made
    ways = ["unread", "unsent", *(["midstream"] * 4 if made.streams else [])]
    return Errand(made.kind, made.path, made.body, made.check, leaves=draw.choice(ways))


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(8, VOCAB_SIZE) for _ in range(count)]


def _text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


def _options(draw: random.Random, *, free: bool = True) -> dict[str, Any]:
    """Sampling options. `free` answers need not end by themselves."""
    fields: dict[str, Any] = {}

    def some(share: float, **more: Any) -> None:
        if draw.random() < share:
            fields.update(more)

    some(0.7, temperature=draw.choice([0.0, 0.5, 1.0, 2.0]))
    some(0.3, top_p=draw.uniform(0.1, 1.0))
    some(0.2, top_k=draw.choice([-1, 1, 20, 10_000]))
    some(0.2, min_p=draw.uniform(0.0, 0.5))
    some(0.2, presence_penalty=draw.uniform(-2, 2))
    some(0.2, frequency_penalty=draw.uniform(-2, 2))
    some(0.2, repetition_penalty=draw.uniform(0.5, 2.0))
    some(0.4, seed=draw.randrange(1 << 40))
    some(0.2, return_token_ids=True)
    if draw.random() < 0.45:
        fields["stream"] = True
        some(0.6, stream_options={"include_usage": True})
    if free:
        some(0.2, logit_bias={str(token): draw.uniform(-100, 100) for token in _tokens(draw, draw.randint(1, 40))})
        some(0.25, stop=[draw.choice(["e", " a", "3", "an", "é", "zzz"]) for _ in range(draw.randint(1, 4))])
        some(0.1, stop_token_ids=_tokens(draw, 3))
        some(0.1, ignore_eos=True)
    return fields


def _completion(draw: random.Random) -> Errand:
    prompt: Any = _text(draw, draw.randint(1, 12))
    if draw.random() < 0.5:
        prompt = [_tokens(draw, draw.randint(1, 60)) for _ in range(draw.choice([1, 1, 1, 2, 4]))]
    body = {"prompt": prompt, "max_tokens": draw.randint(1, 40), "n": draw.choice([1, 1, 1, 2, 4]), **_options(draw)}
    if draw.random() < 0.4:
        body["logprobs"] = draw.randint(0, 5)
    if draw.random() < 0.1:
        body["min_tokens"] = draw.randint(0, body["max_tokens"])
    if draw.random() < 0.1 and "logprobs" not in body:
        body["echo"] = True
    return Errand("completion", COMPLETIONS, body, _completion_check(body))


def _near_the_limit(draw: random.Random) -> Errand:
    length = draw.randint(LENGTH - 40, LENGTH - 1)
    body = {"prompt": _tokens(draw, length), "max_tokens": LENGTH - length, **_options(draw)}
    return Errand("near the limit", COMPLETIONS, body, _completion_check(body))


def _same_beginning(draw: random.Random) -> Errand:
    beginning = _tokens(random.Random(draw.randrange(6)), draw.choice([48, 64, 80]))
    body = {
        "prompt": beginning + _tokens(draw, draw.randint(1, 20)),
        "max_tokens": draw.randint(1, 50),
        "n": draw.choice([1, 1, 3]),
        **_options(draw),
    }
    return Errand("same beginning", COMPLETIONS, body, _completion_check(body))


def _chat(draw: random.Random) -> Errand:
    turns = [{"role": "user", "content": _text(draw, draw.randint(1, 10))}]
    if draw.random() < 0.3:
        turns += [{"role": "assistant", "content": "23"}, {"role": "user", "content": _text(draw, 3)}]
    body = {"messages": turns, "max_tokens": draw.randint(1, 40), "n": draw.choice([1, 1, 2]), **_options(draw)}
    if draw.random() < 0.3:
        body |= {"logprobs": True, "top_logprobs": draw.randint(0, 5)}
    return Errand("chat", CHAT, body, _chat_check(body))


def _structured(draw: random.Random) -> Errand:
    options = _options(draw, free=False)
    if draw.random() < 0.5:
        low = draw.randint(1, 9)
        pattern = f"[a-z]{{{low},{low + 3}}}-[0-9]{{2}}"
        body = {"prompt": _text(draw, 3), "max_tokens": 30, "structured_outputs": {"regex": pattern}, **options}

        def matches(text: str) -> None:
            assert re.fullmatch(pattern, text), f"{text!r} does not match {pattern}"

        return Errand("regex", COMPLETIONS, body, _completion_check(body, matches))
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    turns = [{"role": "user", "content": _text(draw, 3)}]
    body = {"messages": turns, "max_tokens": 90, "response_format": form, **options}
    return Errand(
        "JSON schema", CHAT, body, _chat_check(body, lambda text: jsonschema.validate(json.loads(text), SCHEMA))
    )


def _calls(draw: random.Random) -> Errand:
    choice = draw.choice(["auto", "required", {"type": "function", "function": {"name": "go"}}])
    turns = [{"role": "user", "content": _text(draw, 2)}]
    body = {"messages": turns, "tools": TOOLS, "tool_choice": choice, "max_tokens": 60, **_options(draw, free=False)}
    if draw.random() < 0.3:
        body["parallel_tool_calls"] = False
    return Errand("tools", CHAT, body, _chat_check(body))


def _scored(draw: random.Random) -> Errand:
    prompt = _tokens(draw, draw.randint(2, 80))
    body = {"prompt": prompt, "max_tokens": draw.choice([0, 4]), "prompt_logprobs": 2}

    def check(answer: dict[str, Any]) -> None:
        shown = answer["choices"][0]["prompt_logprobs"]
        assert len(shown) == len(prompt) and shown[0] is None
        for token, entry in zip(prompt[1:], shown[1:], strict=True):
            assert 2 <= len(entry) <= 3 and entry[str(token)]["logprob"] <= 0

    return Errand("scored prompt", COMPLETIONS, body, check)


def _wrong(draw: random.Random) -> Errand:
    fields = draw.choice(
        [
            {"prompt": _tokens(draw, LENGTH)},
            {"prompt": [VOCAB_SIZE]},
            {"prompt": "a", "max_tokens": -1},
            {"prompt": "a", "temperature": 1e9},
            {"prompt": "a", "best_of": 4},
            {"prompt": "a", "stop": ["a"] * 1000},
            {"prompt": "a", "structured_outputs": {"regex": "(?=a)b"}},
            {"prompt": "word " * 50_000},
        ]
    )

    def check(answer: dict[str, Any]) -> None:
        assert answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error", answer

    return Errand("wrong", COMPLETIONS, fields, check, status=400)


def _completion_check(
    body: dict[str, Any], matches: Callable[[str], None] = lambda _: None
) -> Callable[[dict[str, Any]], None]:
    prompt = body["prompt"]
    size = body.get("n", 1) * (len(prompt) if isinstance(prompt[0], list) else 1)

    def check(answer: dict[str, Any]) -> None:
        assert answer["object"] == "text_completion"
        for choice in _checked_choices(answer, body, size):
            text, logprobs = choice["text"], choice["logprobs"]
            assert (logprobs is not None) == ("logprobs" in body)
            if logprobs is not None:
                count = len(logprobs["tokens"])
                assert len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == count
                assert all(value <= 0 for value in logprobs["token_logprobs"])
            _check_ending(body, text, choice, matches)

    return check


def _chat_check(
    body: dict[str, Any], matches: Callable[[str], None] = lambda _: None
) -> Callable[[dict[str, Any]], None]:
    def check(answer: dict[str, Any]) -> None:
        assert answer["object"] == "chat.completion"
        for choice in _checked_choices(answer, body, body.get("n", 1)):
            message = choice["message"]
            assert message["role"] == "assistant"
            calls = message.get("tool_calls") or []
            assert (choice["finish_reason"] == "tool_calls") <= bool(calls)
            for call in calls:
                assert call["function"]["name"] in ("look", "go") and call["id"]
                if body["tool_choice"] != "auto":
                    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
            if choice["finish_reason"] != "length" and body.get("tool_choice", "auto") != "auto":
                assert calls, "a call was required"
            if body.get("logprobs"):
                assert all(len(one["top_logprobs"]) <= body["top_logprobs"] for one in choice["logprobs"]["content"])
            _check_ending(body, message["content"] or "", choice, matches)

    return check


def _checked_choices(answer: dict[str, Any], body: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """What all answers have in common."""
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(size))
    assert re.fullmatch(r"unsealed-v\d+", answer["system_fingerprint"]) and answer["id"] and answer["model"]
    for choice in choices:
        assert choice["finish_reason"] in REASONS, choice["finish_reason"]
        first, last = choice["weight_versions"]
        assert first <= last
        if "token_ids" in choice:
            assert len(choice["token_ids"]) <= body["max_tokens"]
    if (count := answer.get("usage")) is not None:
        assert count["total_tokens"] == count["prompt_tokens"] + count["completion_tokens"]
        assert 0 <= count["completion_tokens"] <= size * body["max_tokens"]
        if all("token_ids" in choice for choice in choices):
            assert count["completion_tokens"] == sum(len(choice["token_ids"]) for choice in choices)
    return choices


def _check_ending(body: dict[str, Any], text: str, choice: dict[str, Any], matches: Callable[[str], None]) -> None:
    if not body.get("echo"):
        for stop in body.get("stop", []):
            assert stop not in text, f"the stop string {stop!r} is in {text!r}"
    if choice["finish_reason"] == "stop":
        matches(text)


def joined(chunks: list[dict[str, Any]], body: dict[str, Any]) -> dict[str, Any]:
    """The answer that a stream's chunks make: the same as without streaming. Raises AssertionError."""
    assert all(chunk["id"] == chunks[0]["id"] for chunk in chunks)
    answer = {**chunks[0], "object": chunks[0]["object"].removesuffix(".chunk")}
    wants_usage = bool(body.get("stream_options", {}).get("include_usage"))
    assert (chunks[-1]["choices"] == []) == wants_usage
    answer["usage"] = chunks[-1]["usage"] if wants_usage else None
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices.setdefault(part["index"], {"index": part["index"], "finish_reason": None})
            assert choice["finish_reason"] is None, "a choice went on after its end"
            _extend(choice, part)
    answer["choices"] = [choices[index] for index in sorted(choices)]
    return answer


def _extend(choice: dict[str, Any], part: dict[str, Any]) -> None:
    if "delta" in part:
        message = choice.setdefault("message", {"content": "", "tool_calls": []})
        delta = part["delta"]
        message["role"] = delta.get("role", message.get("role"))
        message["content"] += delta.get("content", "")
        for call in delta.get("tool_calls", []):
            assert call["index"] == len(message["tool_calls"])
            message["tool_calls"].append(call)
    else:
        choice["text"] = choice.get("text", "") + part["text"]
    before, logprobs = choice.get("logprobs"), part["logprobs"]
    if before is None or logprobs is None:
        choice["logprobs"] = before or logprobs
    else:
        choice["logprobs"] = {
            name: before[name] + logprobs[name] if isinstance(before[name], list) else None for name in before
        }
    if "token_ids" in part:
        choice["token_ids"] = choice.get("token_ids", []) + part["token_ids"]
    if part["finish_reason"] is not None:
        choice |= {name: part[name] for name in ("finish_reason", "stop_reason", "weight_versions")}
