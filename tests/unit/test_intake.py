"""What comes in is measured before it is parsed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.engines.local.api import measure as measure_module
from isthmus.engines.local.api.intake import check_body
from isthmus.engines.local.api.measure import measure
from isthmus.engines.local.api.protocol import ApiError, ChatAsk, CompletionAsk, parse

TEXTS = st.text(st.sampled_from('a"\\\\\\{}[]:,é'), max_size=9)
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=20
)


def counted(value) -> tuple[int, int, int]:
    """Keys, lists and objects, and depth, by walking the parsed value."""
    if not isinstance(value, dict | list):
        return 0, 0, 0
    inner = [counted(one) for one in (value.values() if isinstance(value, dict) else value)]
    keys = sum(one[0] for one in inner) + (len(value) if isinstance(value, dict) else 0)
    return keys, 1 + sum(one[1] for one in inner), 1 + max((one[2] for one in inner), default=0)


@given(VALUES, st.booleans(), st.integers(1, 9))
def test_what_is_measured_is_that_of_the_parsed_text(value, ascii_only, scanned_at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_module, "SCANNED_AT_ONCE", scanned_at_once)
        found = measure(json.dumps(value, ensure_ascii=ascii_only).encode())
    assert (found.keys, found.containers, found.depth) == counted(value)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"[" * 100_000, "levels of nesting"),
        (b'{"a":' * 5_000, "levels of nesting"),
        (b"{" + b",".join(b'"k%d":1' % number for number in range(30_000)) + b"}", "keys"),
        (b'{"prompt": [' + b"1," * 1_100_000 + b"1]}", "values"),
        (b'{"prompt": [' + b"[1]," * 50_000 + b"[1]]}", "lists and objects"),
    ],
    ids=["brackets", "objects", "keys", "values", "lists"],
)
def test_what_is_not_worth_parsing_is_refused_unparsed(body, what):
    with pytest.raises(ApiError, match=what) as refusal:
        check_body(body)
    assert refusal.value.status == 400


def test_many_unknown_fields_are_refused_by_the_first_of_them():
    body = {"prompt": "a", **{f"k{number}": 1 for number in range(19_000)}}
    with pytest.raises(ApiError, match="k0 is not supported") as refusal:
        parse(CompletionAsk, json.dumps(body).encode())
    assert refusal.value.param == "k0"


def test_json_in_a_text_is_measured_before_it_is_read():
    call = {"function": {"name": "f", "arguments": '{"a": [' + "[]," * 2_000_000 + "[]]}"}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(ApiError, match=r"arguments.*values") as refusal:
        parse(ChatAsk, json.dumps({"messages": turns}).encode())
    assert refusal.value.status == 400
