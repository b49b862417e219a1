"""Chat templates of the kinds that are published, against transformers, and what is read off them."""

from __future__ import annotations

import sys

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer as BpeTokenizer
from transformers import PreTrainedTokenizerFast

from isthmus.data.chat_template import ChatTemplate
from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import IsthmusError
from tests.support import chat_templates
from tests.support.chat_templates import CONVERSATIONS, PUBLISHED, TOOL
from tests.support.engine_bundle import TEXTS

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SERIALISED = Tokenizer.train(TEXTS, 300).serialise()


def both(source: str | dict[str, str], **kept: str) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    ours = Tokenizer(BpeTokenizer.from_str(SERIALISED), source, kept=kept)
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=BpeTokenizer.from_str(SERIALISED),
        chat_template=source,
        bos_token=ours.bos,
        eos_token=ours.eos,
        **kept,
    )
    return ours, theirs


def rendered(render, *arguments, **variables) -> str:
    try:
        return render(*arguments, **variables)
    except (IsthmusError, TemplateError, TypeError, ValueError):
        return "refused"


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"thinking": True, "reasoning_effort": "low"}])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_conversation_renders_as_in_transformers(name: str, variables: dict[str, object]):
    ours, theirs = both(PUBLISHED[name], pad_token="<think>")
    found = []
    for conversation in CONVERSATIONS.values():
        for tools in (None, [TOOL]):
            options = {"add_generation_prompt": True, "tokenize": False, **variables}
            expected = rendered(theirs.apply_chat_template, conversation, tools=tools, **options)
            found.append(rendered(ours.chat_text, conversation, tools, **variables))
            assert found[-1] == expected or name == "deepseek r1", conversation
    assert len(set(found)) > 3, "the template has to say something of its conversations"


def test_the_template_for_tools_is_taken_for_tools():
    """As Command R and Hermes 2 Pro name theirs."""
    ours, theirs = both({"default": PLAIN, "tool_use": "{{ tools | length }} tools"})
    for tools in (None, [TOOL]):
        expected = theirs.apply_chat_template(CONVERSATIONS["system"], tools=tools, tokenize=False)
        assert ours.chat_text(CONVERSATIONS["system"], tools) == expected
    assert ours.config()["chat_template"][1] == {"name": "tool_use", "template": "{{ tools | length }} tools"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{{ 'null' if m.content is none else m.content }}{% endfor %}", "qnull"),
        ("{% for m in messages %}{{ m['content'] }}|{% endfor %}", "q||"),
        ("{% for m in messages %}{{ '[' + m.content + ']' }}{% endfor %}", "[q][]"),
        ("{% for m in messages %}{{ m.content or m.tool_calls[0].function.name }}{% endfor %}", "qlook"),
    ],
)
def test_null_content_stays_null_and_prints_as_nothing(source: str, expected: str):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": CALLS}]
    assert ChatTemplate(source).render(turns) == expected


CALLS = [chat_templates.CALL]


def test_what_templates_make_of_thinking_is_read_off_them():
    known = {name: ChatTemplate(source) for name, source in PUBLISHED.items()}
    assert {name for name, one in known.items() if one.switch} == {
        "deepseek v3.1", "glm 4.5", "granite", "hermes", "qwen3", "smollm3"
    }  # fmt: skip
    assert {name for name, one in known.items() if one.reads_reasoning} == {"glm 4.5", "gpt-oss", "kimi k2", "qwen3"}
    assert {name for name, one in known.items() if one.cuts_thinking} == {"deepseek v3.1", "qwen3"}
    unknowing = {name for name, one in known.items() if not one.knows_thinking}
    assert unknowing == {"gemma", "gpt-oss", "granite", "llama 3", "mistral", "named tokens"}
    opening = {
        name for name in ("deepseek r1", "hermes", "qwen3", "llama 3") if both(PUBLISHED[name])[0].opens_thinking
    }
    assert opening == {"deepseek r1", "hermes"}


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_earlier_thinking_has_the_name_that_the_template_reads_it_by(field: str):
    """OLMo and Nemotron read `reasoning`, gpt-oss `thinking`, most others `reasoning_content`."""
    template = ChatTemplate(
        "{% for m in messages %}{% if m." + field + " %}({{ m." + field + " }}){% endif %}{% endfor %}"
    )
    for given in ("reasoning_content", "reasoning"):
        assert template.render([{"role": "assistant", "content": "a", given: "because"}]) == "(because)"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}text{% endfor %}{% endfor %}",
        "{{ 10**10000000 }}",
        "{{ 'x' * 100000000000 }}",
        "{{ ([0] * 999999999)|length }}",
        "{{ 'x'.center(10000000000) }}",
        "{{ 'x'|center(10000000000) }}",
        "{{ '%999999999999d' % 1 }}",
        "{{ '%999999999999d'|format(1) }}",
        "{{ ('x' * 9999)|replace('x', 'x' * 9999) }}",
        "{{ ('x' * 9999).replace('x', 'x' * 9999) }}",
        "{% set n = namespace(s='x' * 9999) %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='x' * 9999) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s=3) %}{% for i in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}",
    ],
)
def test_a_template_that_costs_too_much_is_refused(source, monkeypatch):
    monkeypatch.setattr("isthmus.data.template_limits.RENDER_S", 0.1)
    monkeypatch.setattr("isthmus.data.template_limits.MOST_CHARACTERS", 1 << 20)
    before = sys.gettrace()
    with pytest.raises(IsthmusError, match="refuses this conversation"):
        ChatTemplate(source).render([{"role": "user", "content": "a"}])
    assert sys.gettrace() is before
