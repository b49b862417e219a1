"""Calls of functions: read from text however it arrives, written as templates have them, enforced by grammars."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as BpeTokenizer
from transformers import PreTrainedTokenizerFast

from isthmus.engines.local.api.protocol import Function, Message
from isthmus.engines.local.api.text import Call, Vocabulary
from isthmus.engines.local.api.tools import DeepseekFormat, HermesFormat, LlamaFormat, call_grammar, format_of
from isthmus.engines.local.core.grammar import Compiler, literal
from tests.support.chat_templates import DEEPSEEK, FORMATS, HERMES, LLAMA, tokenizer_for

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"type": "string", "minLength": 1, "maxLength": 4}},
}
FUNCTIONS = [
    Function(name="look", description="Weather", parameters=CITY),
    Function(name="stop.it-now", parameters={"type": "object", "properties": {}, "additionalProperties": False}),
]
NAMES = frozenset(function.name for function in FUNCTIONS)
LOOK, STOP = ("look", {"city": "Århus", "days": 2}), ("stop.it-now", {})

D = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
D31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
H = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
L = '{{"name": "{}", "parameters": {}}}'


def written(form, call):
    return form.format(call[0], json.dumps(call[1], ensure_ascii=False))


def framed(*calls):
    return "<｜tool▁calls▁begin｜>" + "\n".join(calls) + "<｜tool▁calls▁end｜>"


def shown(parts):
    """Texts joined, calls as (name, arguments)."""
    found: list = []
    for part in parts:
        if isinstance(part, Call):
            found.append((part.name, json.loads(part.arguments)))
        elif found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


def read(form, pieces, parallel=True):
    reader = form.reader(NAMES, parallel)
    return shown([part for piece in pieces for part in reader.push(piece)] + reader.flush())


d, h, ll = DeepseekFormat(fenced=True), HermesFormat(), LlamaFormat()
CASES = [
    (d, framed(written(D, LOOK)), [LOOK]),
    (d, "I look.\n" + framed(written(D, LOOK), written(D, STOP)), ["I look.", LOOK, STOP]),
    (d, framed(written(D31, LOOK), written(D31, STOP)), [LOOK, STOP]),
    (d, written(D, LOOK), [LOOK]),
    (d, framed(written(D, LOOK)) + "  \n", [LOOK]),
    (d, framed(written(D, ("other", {}))), [framed(written(D, ("other", {})))]),
    (d, "a " + framed(D.format("look", "[1]")) + " b", ["a " + framed(D.format("look", "[1]")) + " b"]),
    (d, "<｜tool▁calls▁begin｜> and no call", ["<｜tool▁calls▁begin｜> and no call"]),
    (d, framed(written(D, LOOK))[:40], [framed(written(D, LOOK))[:40]]),
    (h, written(H, LOOK), [LOOK]),
    (h, f"Let me see.\n{written(H, LOOK)}\n{written(H, STOP)}\n", ["Let me see.", LOOK, STOP]),
    (h, f"{written(H, STOP)}\n\nDone <tool", [STOP, "Done <tool"]),
    (h, written(H, LOOK).removesuffix("</tool_call>"), [LOOK]),
    (h, f"x\n{written(H, LOOK)[:30]}", [f"x\n{written(H, LOOK)[:30]}"]),
    (h, "<tool_call>\nnothing\n</tool_call> y", ["<tool_call>\nnothing\n</tool_call> y"]),
    (h, f"<tool_call>[</tool_call>{written(H, LOOK)}", ["<tool_call>[</tool_call>", LOOK]),
    (h, "<tool_call>" + "[" * 5000 + "</tool_call>", ["<tool_call>" + "[" * 5000 + "</tool_call>"]),
    (
        h,
        '<tool_call>{"name": ["look"], "arguments": {}}</tool_call>',
        ['<tool_call>{"name": ["look"], "arguments": {}}</tool_call>'],
    ),
    (h, H.format("look", json.dumps(json.dumps(LOOK[1]))), [LOOK]),
    (h, " a\n ", [" a\n "]),
    (ll, written(L, LOOK), [LOOK]),
    (ll, "\n<|python_tag|>" + written(L, LOOK) + "; " + written(L, STOP), [LOOK, STOP]),
    (ll, '{"name": "look"', ['{"name": "look"']),
    (ll, '{"a": {"b": 1}} and so on', ['{"a": {"b": 1}} and so on']),
    (ll, " The answer is {1}.", [" The answer is {1}."]),
    (ll, written(L, LOOK) + " and more", [LOOK, " and more"]),
    (ll, "", []),
]


@pytest.mark.parametrize(("form", "text", "expected"), CASES)
def test_calls_are_read_and_what_is_none_stays_as_it_is(form, text, expected):
    for size in (1, 2, 3, 7, len(text) + 1):
        assert read(form, [text[i : i + size] for i in range(0, len(text), size)]) == expected


@given(st.sampled_from([d, h, ll]), st.lists(st.sampled_from([*"a \n{};", *d.marks, *h.marks, *ll.marks]), max_size=12))
def test_text_without_a_call_is_neither_lost_nor_changed(form, pieces):
    assert "".join(read(form, pieces)) == "".join(pieces)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (d, framed(written(D, LOOK), written(D, STOP))),
        (h, written(H, LOOK) + "\n" + written(H, STOP) + " and text"),
        (ll, written(L, LOOK) + "; " + written(L, STOP)),
    ],
)
def test_where_one_call_is_allowed_the_first_ends_the_answer(form, text):
    reader = form.reader(NAMES, False)
    parts = []
    for character in text:
        if reader.finished:
            break
        parts += reader.push(character)
    assert reader.finished and shown(parts + reader.flush()) == [LOOK]


def test_the_format_is_what_the_template_teaches():
    assert isinstance(format_of(DEEPSEEK), DeepseekFormat) and isinstance(format_of(HERMES), HermesFormat)
    assert isinstance(format_of(LLAMA), LlamaFormat) and format_of("{{ tools }}") is None
    assert format_of("{{ tools }}<tool_call>\n<function=name>") is None


CONVERSATION = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Å"}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "Rain"},
]


@pytest.mark.parametrize("name", FORMATS)
def test_a_conversation_with_calls_renders_as_in_transformers(name):
    tokenizer = tokenizer_for(name)
    tools = [{"type": "function", "function": function.model_dump(exclude_none=True)} for function in FUNCTIONS]
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=BpeTokenizer.from_str(tokenizer.serialise()),
        chat_template=tokenizer.chat_template,
        bos_token=tokenizer.bos,
        eos_token=tokenizer.eos,
    )
    arguments = '{"city": "Å"}' if name.startswith("deepseek") else {"city": "Å"}
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}}
    messages = [CONVERSATION[0], {"role": "assistant", "content": "", "tool_calls": [call]}, CONVERSATION[2]]
    expected = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    found = tokenizer.chat_text([Message(**turn).plain() for turn in CONVERSATION], tools)
    assert found == expected
    assert '"name": "stop.it-now"' in found and "Rain" in found


@pytest.mark.parametrize("single", [True, False], ids=["marks are tokens", "marks are text"])
@pytest.mark.parametrize("name", FORMATS)
def test_under_the_grammar_only_valid_calls_are_written(name, single):
    tokenizer = tokenizer_for(name, single=single)
    form, vocabulary = format_of(tokenizer.chat_template), Vocabulary(tokenizer)

    def mark(text):
        token = vocabulary.single(text)
        return literal(text) if token is None else f"<[{token}]>"

    compiler = Compiler(tokenizer, 340)
    for parallel in (False, True):
        constraint = compiler.compile(call_grammar(form, FUNCTIONS, mark, parallel=parallel))
        for seed in range(6):
            text = drawn(tokenizer, constraint, seed)
            reader = form.reader(NAMES, True)
            parts = reader.push(text) + reader.flush()
            assert parts and all(isinstance(part, Call) for part in parts) and (parallel or len(parts) == 1), text
            for part in parts:
                jsonschema.validate(json.loads(part.arguments), CITY if part.name == "look" else {"maxProperties": 0})
    answers = form.answers(mark)
    constraint = compiler.compile(call_grammar(form, FUNCTIONS, mark, parallel=True, answers=answers))
    for text in ("Just text with { in it.", "", "a < b, and <tool"):
        assert allowed(tokenizer, constraint, text)
    for call, valid in (
        (LOOK, False),
        (("look", {"city": "Oslo"}), True),
        (("look", {"city": "Oslo", "days": 0}), False),
    ):
        for before in ("", "Let me see. <") if name != "llama" else ("",):
            assert allowed(tokenizer, constraint, before + example(name, call)) == valid


def example(name, call):
    form = {"deepseek": D, "deepseek v3.1": D31, "hermes": H, "llama": L}[name]
    return framed(written(form, call)) if name.startswith("deepseek") else written(form, call)


def drawn(tokenizer, constraint, seed):
    """A text of random tokens under a constraint; white space is unlikely, so that it ends."""
    random, state, tokens = np.random.default_rng(seed), constraint.start(), []
    space = [bool(not tokenizer.decode([token], skip_special=False).strip(" \t\r\n")) for token in range(340)]
    while not state.done and len(tokens) < 600:
        logits = random.gumbel(size=340) - 8.0 * np.array(space)
        token = int(np.where(state.mask(), logits, -np.inf).argmax())
        if token == tokenizer.eos_id:
            break
        tokens.append(token)
        state.accept(token)
    return tokenizer.decode(tokens, skip_special=False)


def allowed(tokenizer, constraint, text):
    state = constraint.start()
    for token in tokenizer.encode(text):
        if state.done or not state.mask()[token]:
            return False
        state.accept(token)
    return bool(state.mask()[tokenizer.eos_id])
