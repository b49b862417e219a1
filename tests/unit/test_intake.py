"""What comes in is measured before it is parsed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.engines.local.api.intake import check_measure, measure
from isthmus.engines.local.api.protocol import ApiError, CompletionAsk, parse

TEXTS = st.text(st.sampled_from('a"\\{}[]:,é'), max_size=6)
VALUES = st.recursive(
    st.none() | st.integers() | TEXTS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=20
)


def counted(value) -> tuple[int, int]:
    """Keys and depth, by walking the parsed value."""
    if not isinstance(value, dict | list):
        return 0, 0
    inner = [counted(one) for one in (value.values() if isinstance(value, dict) else value)]
    keys = sum(one for one, _ in inner) + (len(value) if isinstance(value, dict) else 0)
    return keys, 1 + max((depth for _, depth in inner), default=0)


@given(VALUES, st.booleans())
def test_keys_and_depth_are_those_of_the_parsed_text(value, ascii_only):
    found = measure(json.dumps(value, ensure_ascii=ascii_only).encode())
    assert (found.keys, found.depth) == counted(value)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"[" * 100_000, "levels of nesting"),
        (b'{"a":' * 5_000, "levels of nesting"),
        (b"{" + b",".join(b'"k%d":1' % number for number in range(30_000)) + b"}", "keys"),
        (b'{"prompt": [' + b"1," * 2_100_000 + b"1]}", "values"),
    ],
    ids=["brackets", "objects", "keys", "values"],
)
def test_what_is_not_worth_parsing_is_refused_unparsed(body, what):
    with pytest.raises(ApiError, match=what) as refusal:
        check_measure(body)
    assert refusal.value.status == 400


def test_many_unknown_fields_are_refused_by_the_first_of_them():
    body = {"prompt": "a", **{f"k{number}": 1 for number in range(19_000)}}
    with pytest.raises(ApiError, match="k0 is not supported") as refusal:
        parse(CompletionAsk, json.dumps(body).encode())
    assert refusal.value.param == "k0"
