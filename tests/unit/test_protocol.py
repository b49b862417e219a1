"""What a body may be: hostile ones get a 400 that says why, and values that ask for nothing are taken."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.engines.local.api.protocol import (
    ApiError,
    ChatAsk,
    CompletionAsk,
    Message,
    check_options,
    parse,
    read_object,
)

CHAT = {"messages": [{"role": "user", "content": "a"}]}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def ask(kind=CompletionAsk, **fields):
    base = CHAT if kind is ChatAsk else {"prompt": "a"}
    found = parse(kind, json.dumps({**base, **fields}).encode())
    check_options(found)
    return found


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[1]",
        b'"prompt"',
        b"\xff",
        b'{"prompt": "\xff"}',
        '{"prompt": "\ud800"}'.encode("utf-8", "surrogatepass"),
        rb'{"prompt": "\ud800"}',
        rb'{"prompt": "a", "metadata": {"\udfff": 1}}',
        '{"prompt": "a"}'.encode("utf-16"),
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "logit_bias": {"3": -Infinity}}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"prompt": "a", "structured_outputs": {"json": ' + b'{"a":' * 300 + b"1" + b"}" * 301 + b"}",
        b'{"prompt": [' + b"1," * 1_000_000 + b'"a"]}',
    ],
)
def test_a_hostile_body_is_refused(body):
    with pytest.raises(ApiError) as refusal:
        parse(CompletionAsk, body)
    assert refusal.value.status == 400 and len(str(refusal.value)) < 2000
    json.dumps(refusal.value.body()).encode()


@given(st.sampled_from([CompletionAsk, ChatAsk]), st.dictionaries(st.sampled_from([*ChatAsk.model_fields, "x"]), JSON))
def test_any_json_is_read_or_refused(kind, fields):
    try:
        found = parse(kind, json.dumps(fields).encode())
        check_options(found)
    except ApiError as error:
        assert error.status == 400
        return
    for message in getattr(found, "messages", []):
        message.plain()


@pytest.mark.parametrize(("limit", "digits"), [("max_tokens", 300), ("n", 300), ("seed", 300), ("top_k", 19)])
def test_huge_and_negative_numbers_are_refused_by_name(limit, digits):
    values = [-(10**digits), 1.5, True, "3"] + ([10**digits] if limit in ("n", "seed") else [])
    for value in values:
        with pytest.raises(ApiError) as refusal:
            ask(**{limit: value})
        assert refusal.value.param == limit


HARMLESS = {"user", "request_id", "verbosity", "store", "metadata", "service_tier", "prompt_cache_retention"}


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "min_p": 0},
        {"top_k": -1, "top_p": 1, "stop": [], "stop_token_ids": [], "min_tokens": 0, "ignore_eos": False},
        {"best_of": 1, "suffix": "", "user": "me", "request_id": "req-1", "verbosity": "low"},
        {"store": True, "metadata": {"run": "1"}, "service_tier": "flex", "prompt_cache_retention": "24h"},
        {"use_beam_search": False, "length_penalty": 1.0, "priority": 0},
        {"response_format": {"type": "text"}, "structured_outputs": None, "stream": False, "stop": None},
    ],
)
def test_values_that_ask_for_nothing_are_taken(fields):
    for kind in (CompletionAsk, ChatAsk):
        plain, found = ask(kind), ask(kind, **fields)
        changed = {name for name in kind.model_fields if getattr(plain, name) != getattr(found, name)}
        assert changed <= {"top_k", "response_format", *HARMLESS}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", True),
        ("priority", 1),
        ("length_penalty", 2.0),
    ],
)
def test_another_value_of_such_a_field_is_refused_by_name(field, value):
    with pytest.raises(ApiError, match=f"{field} is not supported"):
        ask(**{field: value})


def test_chat_without_tools_takes_the_choices_that_mean_none():
    assert ask(ChatAsk, tools=[], tool_choice="none", parallel_tool_calls=True, top_logprobs=0).offered == []
    assert ask(ChatAsk, chat_template_kwargs={}, include_reasoning=True, modalities=["text"]).chat_template_kwargs == {}


TOOL = {"type": "function", "function": {"name": "look"}}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [{"type": "custom"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "see"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"echo": True}, "echo"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"stop": ["a" * 2000]}, "stop"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [TOOL]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a", "refusal": "no"}]}, "messages"),
        ({"messages": [7] * 100_000}, "messages"),
    ],
)
def test_chat_refuses_by_name(fields, named):
    with pytest.raises(ApiError) as refusal:
        ask(ChatAsk, **fields)
    assert refusal.value.param == named and refusal.value.status == 400


def test_a_message_that_was_received_can_be_sent_back():
    received = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "reasoning": "secret",
        "reasoning_content": "secret",
        "tool_calls": [{"id": "c", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}],
    }
    plain = Message(**received).plain()
    assert plain == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}, "id": "c"}],
        "reasoning_content": "secret",
    }
    assert Message(
        role="developer", content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ).plain() == {
        "role": "system",
        "content": "ab",
    }


@given(st.text())
def test_an_object_is_read_exactly_if_json_reads_it(text):
    assert read_object(text) is None or isinstance(json.loads(text), dict)
    assert read_object(json.dumps({"a": text})) == {"a": text}
    assert read_object("[" * 100_000) is None
