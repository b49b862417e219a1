"""Whether and how answers think: by the template, the request and the server; and what becomes of earlier thinking."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BpeTokenizer

from isthmus.data.tokenizer import Tokenizer
from isthmus.engines.local.api.prepare import chat_text, prepare_chat
from isthmus.engines.local.api.protocol import ApiError, ChatAsk
from isthmus.engines.local.api.service import Identity, Service
from isthmus.engines.local.api.text import ChannelledText, Rules, Vocabulary
from isthmus.engines.local.core.core import Core
from tests.support.chat_templates import (
    CALL,
    CONVERSATIONS,
    DEEPSEEK,
    DEEPSEEK_V31,
    GRANITE,
    HARMONY,
    PUBLISHED,
    QWEN3,
    SMOLLM3,
)
from tests.support.engine_bundle import TEXTS, small_model

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}<|im_start|>assistant\n"
R1 = DEEPSEEK.replace("{{ message['content'] }}{% if", "{{ (message['content'] or '').split('</think>')[-1] }}{% if")
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
ASKED = [{"role": "user", "content": "What does <think> mean?"}]
CLOSED, OPEN, FREE = "without", "inside", "free"


@cache
def vocabulary() -> str:
    return Tokenizer.train(TEXTS, 300).serialise()


@cache
def core() -> Core:
    return Core(small_model(vocab_size=340, max_position_embeddings=1024), eos_id=1, slots=1)


def service(template: str, thinking: str = "auto") -> Service:
    tokenizer = Tokenizer(BpeTokenizer.from_str(vocabulary()), template, other_ends=[7])
    return Service(
        Identity("small", "fp32"),
        small_model(vocab_size=340).architecture,
        core(),
        tokenizer,
        {},
        "",
        thinking=thinking,
    )


def ask(messages=None, **fields) -> ChatAsk:
    return ChatAsk.model_validate({"messages": messages or ASKED, **fields})


def prompt_of(template: str, thinking: str = "auto", **fields) -> tuple[str, str]:
    """What a prompt ends in, behind the name of who is to answer, and how the answer begins."""
    served = service(template, thinking)
    text = chat_text(served, ask(**fields), with_tools=False)
    return text.rpartition("ssistant")[2], prepare_chat(served, ask(**fields)).thinking


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_prompt_is_the_rendering_and_nothing_else(name: str):
    """264 renderings of real templates, of which 171 had <think> appended."""
    served = service(PUBLISHED[name])
    expected = served.tokenizer.chat_text(ASKED)
    assert chat_text(served, ask(), with_tools=False) == expected
    assert prepare_chat(served, ask()).prompts == [served.tokenizer.encode(expected)]


@pytest.mark.parametrize(
    ("template", "fields", "expected"),
    [
        (PLAIN, {}, ("", CLOSED)),
        (DEEPSEEK, {}, ("｜><think>\n", OPEN)),
        (QWEN3, {}, ("\n", FREE)),
        (QWEN3, {"enable_thinking": False}, ("\n<think>\n\n</think>\n\n", CLOSED)),
        (QWEN3, {"chat_template_kwargs": {"enable_thinking": False}}, ("\n<think>\n\n</think>\n\n", CLOSED)),
        (QWEN3, {"reasoning_effort": "none"}, ("\n<think>\n\n</think>\n\n", CLOSED)),
        (QWEN3, {"enable_thinking": True}, ("\n", FREE)),
        (DEEPSEEK_V31, {}, ("｜></think>", CLOSED)),
        (DEEPSEEK_V31, {"enable_thinking": True}, ("｜><think>", OPEN)),
        (DEEPSEEK_V31, {"chat_template_kwargs": {"thinking": True}}, ("｜><think>", OPEN)),
        (PLAIN, {"chat_template_kwargs": {"enable_thinking": False}}, ("", CLOSED)),
        (PLAIN, {"reasoning_effort": "none"}, ("", CLOSED)),
        (DEEPSEEK, {"enable_thinking": True}, ("｜><think>\n", OPEN)),
        (HARMONY, {"reasoning_effort": "high"}, ("", CLOSED)),
    ],
)
def test_a_request_may_switch_what_its_template_switches(template: str, fields: dict, expected: tuple[str, str]):
    """sglang 4539, QwenLM/Qwen3 1297, vllm 19222: content is empty where the thinking is off, or is not there."""
    assert prompt_of(template, **fields) == expected


@pytest.mark.parametrize(
    ("template", "thinking", "fields", "expected"),
    [
        (PLAIN, "always", {}, ("<think>\n", OPEN)),
        (PLAIN, "never", {}, ("", CLOSED)),
        (DEEPSEEK, "never", {}, ("｜><think>\n\n</think>\n\n", CLOSED)),
        (QWEN3, "never", {}, ("\n<think>\n\n</think>\n\n", CLOSED)),
        (QWEN3, "always", {}, ("\n<think>\n", OPEN)),
        (QWEN3, "never", {"enable_thinking": True}, ("\n", FREE)),
        (QWEN3, "always", {"enable_thinking": False}, ("\n<think>\n\n</think>\n\n", CLOSED)),
        (SMOLLM3, "never", {}, ("\n<think>\n\n</think>\n", CLOSED)),
        (GRANITE, "always", {}, ("<|end|>", FREE)),
    ],
)
def test_the_server_speaks_for_requests_that_do_not(template, thinking, fields, expected):
    assert prompt_of(template, thinking, **fields) == expected


def test_a_switch_is_turned_where_the_thinking_is_written_in_another_way():
    text = chat_text(service(GRANITE, "always"), ask(), with_tools=False)
    assert "thought" in text and text != chat_text(service(GRANITE), ask(), with_tools=False)


@pytest.mark.parametrize(
    ("template", "thinking", "fields", "named"),
    [
        (PLAIN, "auto", {"enable_thinking": True}, "enable_thinking"),
        (PLAIN, "auto", {"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
        (DEEPSEEK, "auto", {"enable_thinking": False}, "enable_thinking"),
        (PLAIN, "always", {"enable_thinking": False}, "enable_thinking"),
        (QWEN3, "auto", {"reasoning_effort": "high"}, "reasoning_effort"),
        (QWEN3, "auto", {"enable_thinking": True, "reasoning_effort": "none"}, "enable_thinking"),
        (QWEN3, "auto", {"chat_template_kwargs": {"mood": "calm"}}, "chat_template_kwargs"),
        (QWEN3, "auto", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_what_a_template_cannot_do_is_refused_by_name(template, thinking, fields, named):
    with pytest.raises(ApiError) as refusal:
        chat_text(service(template, thinking), ask(**fields), with_tools=False)
    assert refusal.value.param == named and refusal.value.status == 400


def allowed(state) -> set[int]:
    return set(np.flatnonzero(state.mask()).tolist())


def test_the_format_of_an_answer_begins_where_its_thinking_does_not():
    """rllm 405: where nothing thinks, a schema was never enforced."""
    served = service(PLAIN)
    state = prepare_chat(served, ask(response_format=SCHEMA)).constraint(served).start()
    begins = {served.tokenizer.decode([token])[0] for token in allowed(state)}
    assert begins <= set("{ \n\t\r") and "{" in begins


def test_a_model_that_opens_its_thinking_itself_may_do_so_before_the_format():
    served = service(QWEN3)
    open_think, close_think = (served.tokenizer.encode(mark)[0] for mark in ("<think>", "</think>"))
    constraint = prepare_chat(served, ask(response_format=SCHEMA)).constraint(served)
    state = constraint.start()
    at_once = allowed(state)
    assert open_think in at_once and served.tokenizer.encode("{")[0] in at_once and len(at_once) < 50
    state.accept(open_think)
    assert len(allowed(state)) == 340 - 2, "all but the two ends"
    state.accept(close_think)
    assert allowed(state) == at_once - {open_think}
    other = constraint.start()
    other.accept(served.tokenizer.encode("{")[0])
    assert open_think not in allowed(other)


def channels(writer: ChannelledText, tokenizer: Tokenizer, text: str) -> dict[str, str]:
    deltas = [delta for token in tokenizer.encode(text) for delta in writer.push(token)] + writer.finish()
    found = {"reasoning": "", "content": ""}
    for delta in deltas:
        found[delta.channel] += delta.text
    return found


@pytest.mark.parametrize("marks", ["tokens", "text"])
@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nhm</think>\n\n42", "\nhm", "42"),
        ("42 <think>", "", "42 <think>"),
        ("<thin", "", "<thin"),
        ("plain", "", "plain"),
    ],
)
def test_thinking_that_the_model_opens_itself_is_told_apart(marks: str, text: str, reasoning: str, content: str):
    bpe = BpeTokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["think"] * 9, trainers.BpeTrainer(vocab_size=270, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    if marks == "tokens":
        bpe.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
        content = content.removesuffix("<think>")
    tokenizer = Tokenizer(bpe, QWEN3, None, "<end>")
    found = channels(ChannelledText(Vocabulary(tokenizer), Rules(), "free"), tokenizer, text)
    assert found == {"reasoning": reasoning, "content": content}
    plain = ChannelledText(Vocabulary(tokenizer, thinks=False), Rules(), "without")
    assert channels(plain, tokenizer, text) == {"reasoning": "", "content": text}


def test_earlier_thinking_reaches_the_template_or_is_refused():
    """command-code 829, vllm 21655: it was accepted, and dropped."""
    turns = CONVERSATIONS["a call"]
    calls = [{**CALL, "function": {"name": "look", "arguments": '{"city": "Å", "days": 2}'}}]
    sent = [turns[0], {**turns[1], "content": None, "tool_calls": calls}, turns[2]]
    printed = chat_text(service(QWEN3), ask(sent), with_tools=False)
    assert printed == service(QWEN3).tokenizer.chat_text(turns) and "<think>\nlook it up\n</think>" in printed
    history = CONVERSATIONS["thought beside it"]
    assert "because" not in chat_text(service(R1), ask(history), with_tools=False), "R1's template cuts it"
    with pytest.raises(ApiError, match="no place for the reasoning_content of earlier turns") as refusal:
        chat_text(service(PLAIN), ask(history), with_tools=False)
    assert refusal.value.param == "messages"
    empty = [history[0], {**history[1], "reasoning_content": None, "reasoning": ""}, history[2]]
    assert "because" not in chat_text(service(PLAIN), ask(empty), with_tools=False)


@pytest.mark.parametrize(
    ("template", "holds"),
    [
        (PLAIN, True),
        (R1, True),
        ("{{ messages[-1].content }}", False),
        ("{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}{{ messages[0].content }}", False),
    ],
    ids=["plain", "r1", "last", "refuses"],
)
def test_a_service_knows_whether_its_template_has_a_place_for_earlier_turns(template: str, holds: bool):
    assert service(template).holds_turns is holds
