"""Constraints on answers: masks against an independent JSON-schema validator and re.fullmatch, and their limits."""

from __future__ import annotations

import json
import re

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits

from isthmus.engines.local.core.grammar import Compiler, GrammarRefused, choice_grammar, json_grammar, regex_grammar
from tests.support.engine_bundle import small_tokenizer

TOKENIZER = small_tokenizer()
VOCAB_SIZE = TOKENIZER.vocab_size + 12  # a model may have rows that its tokenizer does not use
COMPILER = Compiler(TOKENIZER, VOCAB_SIZE)
END = TOKENIZER.eos_id
SCHEMAS = {
    "object": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": -3, "maximum": 120}, "b": {"enum": ["x", "é", None]}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    "string": {"type": "string", "minLength": 1, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,3}(-[0-9]{1,2})?$"},
    "any of": {"anyOf": [{"type": "null"}, {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 50}]},
    "nested": {
        "$defs": {"leaf": {"enum": [{"v": 1}, ["v"]]}},
        "type": "object",
        "properties": {"l": {"$ref": "#/$defs/leaf"}, "r": {"type": "array", "maxItems": 2, "items": {"type": "null"}}},
        "required": ["l", "r"],
        "additionalProperties": False,
    },
}


def is_valid(schema, text):
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def walk(constraint, seed, most=300):
    """Draw tokens by random logits under the mask; yields (bytes so far as text or None, whether the end may come)."""
    random, state, tokens = np.random.default_rng(seed), constraint.start(), []
    for _ in range(most):
        mask = state.mask()
        assert mask.shape == (VOCAB_SIZE,) and mask.dtype == np.bool_ and mask.any()
        assert not mask[TOKENIZER.vocab_size :].any()
        yield text_of(tokens), bool(mask[END])
        if state.done:
            assert np.flatnonzero(mask).tolist() == [END]
            return
        logits = np.where(mask, random.gumbel(size=VOCAB_SIZE), -np.inf)
        token = int(logits.argmax())
        if token == END:
            return
        tokens.append(token)
        state.accept(token)
    raise AssertionError(f"no end after {most} tokens: {text_of(tokens)!r}")


def text_of(tokens):
    """None while the bytes end inside a character."""
    text = TOKENIZER.decode(tokens, skip_special=False)
    return None if "\ufffd" in text else text


def accepts(constraint, text):
    """Whether the tokens of a text pass the mask and may end there."""
    state = constraint.start()
    for token in TOKENIZER.encode(text):
        if state.done or not state.mask()[token]:
            return False
        state.accept(token)
    return bool(state.mask()[END])


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS.keys())
def test_whatever_is_drawn_under_a_schema_keeps_to_it(schema):
    constraint = COMPILER.compile(json_grammar(schema, any_whitespace=False))
    for seed in range(25):
        *_, (text, may_end) = walk(constraint, seed)
        assert may_end and is_valid(schema, text), text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("object", '{"a": 7, "b": "é"}'),
        ("object", '{\n  "a": 120\n}'),
        ("object", '{"a": 121}'),
        ("object", '{"b": null}'),
        ("object", '{"a": 1, "c": 2}'),
        ("object", '{"a": 1'),
        ("array", "[true, false]"),
        ("array", "[]"),
        ("string", '"naïve"'),
        ("string", '"naïver"'),
        ("pattern", '"abc-42"'),
        ("pattern", '"abcd"'),
        ("any of", "45"),
        ("any of", "44"),
        ("nested", '{"l": {"v": 1}, "r": [null]}'),
        ("nested", '{"l": {"v": 2}, "r": []}'),
    ],
)
def test_a_text_may_be_written_exactly_if_the_validator_takes_it(name, text):
    assert accepts(COMPILER.compile(json_grammar(SCHEMAS[name])), text) == is_valid(SCHEMAS[name], text)


@pytest.mark.parametrize(
    "pattern", [r"[ab]{2,4}c?", r"[0-9]{1,3}(\.[0-9]{1,2})?", r"(yes|no|naïve ✓)", r"(a|bc)*d", r"[^a-z]{0,3}"]
)
def test_the_end_may_come_exactly_where_a_regular_expression_matches(pattern):
    constraint = COMPILER.compile(regex_grammar(pattern))
    for seed in range(15):
        for text, may_end in walk(constraint, seed):
            assert may_end == (text is not None and bool(re.fullmatch(pattern, text))), text


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=8), min_size=1, max_size=5), st.integers(0, 9))
def test_a_choice_is_one_of_the_texts_and_each_can_be_it(choices, seed):
    constraint = COMPILER.compile(choice_grammar(choices))
    assert all(accepts(constraint, text) for text in choices)
    *_, (text, _) = walk(constraint, seed)
    assert text in choices


@pytest.mark.parametrize("first", range(0, 0x800, 64))
def test_any_character_may_stand_in_a_choice(first):
    characters = [chr(code) for code in (*range(first, first + 64), 0x1F642)]
    constraint = COMPILER.compile(choice_grammar(characters))
    assert all(accepts(constraint, character) for character in characters)


def test_a_grammar_in_lark_may_count_brackets():
    constraint = COMPILER.compile('start: "(" start ")" | "x"')
    assert accepts(constraint, "((x))") and not accepts(constraint, "((x)")
    assert accepts(COMPILER.compile(json_grammar({"type": "object"})), '{"a": [1, {"b": null}]}')


def test_thinking_is_free_but_may_not_end_the_answer():
    close = TOKENIZER.encode("</think>")[0]
    constraint = COMPILER.compile(regex_grammar("ab"), close)
    state = constraint.start()
    for token in [*TOKENIZER.encode("(reach 23"), TOKENIZER.vocab_size + 3]:
        mask = state.mask()
        assert not mask[END] and mask.sum() == VOCAB_SIZE - 1 and not state.done
        state.accept(token)
    state.accept(close)
    assert [TOKENIZER.decode([int(t)]) for t in np.flatnonzero(state.mask())] == ["a"]


@pytest.mark.parametrize(
    ("mark", "pattern", "left"), [("h 23", "ab", "a"), ("h 2", "3ab", "a"), ("h 2", "3", None), ("h 2", "ab", None)]
)
def test_thinking_may_end_with_a_text(mark, pattern, left):
    """As where </think> is no token. What follows the mark in its last token is the grammar's, or the sample fails."""
    tokens = TOKENIZER.encode("h to reach 23")
    assert [TOKENIZER.decode([token]) for token in tokens[-2:]] == ["h", " 23"]
    constraint = COMPILER.compile(regex_grammar(pattern), mark)
    state = constraint.start()
    for token in tokens:
        assert not state.mask()[END] and not state.done
        state.accept(token)
    allowed = [TOKENIZER.decode([int(token)], skip_special=False) for token in np.flatnonzero(state.mask())]
    assert allowed == [left or TOKENIZER.eos] and state.done == (left is None)
    assert bool(constraint.failures) == (pattern == "ab" and mark == "h 2")


def test_samples_of_one_constraint_are_apart():
    constraint = COMPILER.compile(regex_grammar("ab|cd"))
    one, other = constraint.start(), constraint.start()
    one.accept(TOKENIZER.encode("a")[0])
    assert np.flatnonzero(one.mask()).tolist() == TOKENIZER.encode("b")
    assert set(np.flatnonzero(other.mask())) == {TOKENIZER.encode("a")[0], TOKENIZER.encode("c")[0]}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: json_grammar({"type": "text"}), "Invalid type: text"),
        (lambda: json_grammar({"$ref": "#/nowhere"}), "nowhere"),
        (lambda: json_grammar({"not": {"type": "string"}}), "not"),
        (lambda: json_grammar({"allOf": [{"type": "string"}, {"type": "null"}]}), "Unsatisfiable"),
        (lambda: json_grammar("[1]"), "the JSON schema is refused"),
        (lambda: json_grammar("{"), "the JSON schema is refused"),
        (lambda: regex_grammar("("), "unclosed group"),
        (lambda: regex_grammar("a(?=b)"), "look-around"),
        (lambda: "start: nothing", "nothing"),
        (lambda: "start: <nothing>", "unknown special token"),
        (lambda: "hello", "refused"),
        (lambda: regex_grammar("a" * 200_000), "4000 are allowed"),
        (lambda: choice_grammar(["a" * 200_000]), "longer than 100000"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(make, reason):
    with pytest.raises(GrammarRefused, match=re.escape(reason)):
        COMPILER.compile(make())


def test_a_sample_that_becomes_too_costly_ends_and_says_why():
    limits = LLParserLimits(max_lexer_states=60, verbose_errors=False)
    constraint = Compiler(TOKENIZER, VOCAB_SIZE, limits).compile(regex_grammar("(a|b)*a(a|b){12}c"))
    random, state = np.random.default_rng(0), constraint.start()
    pair = [TOKENIZER.encode(text)[0] for text in "ab"]
    for _ in range(400):
        mask = state.mask()
        if state.done:
            break
        state.accept(int(random.choice(pair)))
    assert state.done and mask[END] and constraint.failures
