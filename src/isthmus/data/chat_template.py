"""A model's chat template: Jinja in a sandbox, with what published templates use, rendered as transformers renders it.

What a template can be given, and what it makes of thinking, is read off its source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from isthmus.data.template_limits import LimitedEnvironment, within_limits
from isthmus.errors import IsthmusError
from isthmus.tasks.parts.completions import END_THINK as END_THINK
from isthmus.tasks.parts.completions import THINK as THINK

SWITCHES = ("enable_thinking", "thinking")
"""Variables by which published templates (Qwen3, GLM-4.5; DeepSeek-V3.1) let a request switch thinking on and off."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which templates read the thinking of an earlier turn."""
_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    MemoryError,
    RecursionError,
)

Messages = list[dict[str, Any]]


class ChatTemplate:
    """One compiled template. `variables` are the names that it can be given.

    `switch` is the variable that switches thinking, if there is one. `knows_thinking` says whether the template has a
    mark of thinking in it, `reads_reasoning` whether earlier thinking has a place in it, and `cuts_thinking` whether it
    looks for the mark in earlier answers to cut them there. Raises IsthmusError if the source cannot be read.
    """

    def __init__(self, source: str):
        self.source = source
        environment = _environment()
        try:
            tree = environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree) - environment.globals.keys())
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise IsthmusError(f"the chat template cannot be read: {error}") from None
        fields, texts = set(_fields(tree)), set(_texts(tree))
        self.switch = next((name for name in SWITCHES if name in self.variables), None)
        self.opens_by_mark = any(THINK in text for text in texts)
        self.knows_thinking = self.opens_by_mark or any(END_THINK in text for text in texts)
        self._reasoning_fields = [name for name in REASONING if name in fields]
        self.reads_reasoning = bool(self._reasoning_fields)
        self.cuts_thinking = END_THINK in _looked_for(tree)

    def render(self, messages: Messages, **given: Any) -> str:
        """The prompt of a conversation. Raises IsthmusError if the template refuses it.

        Templates want the arguments of calls as objects, or as text that they append to other text; some append content
        to text and cannot have it null: what they want is tried in this order. Null content prints as nothing.
        """
        chat = [self._with_reasoning(message) for message in messages]
        template = self._forgiving if any(message.get("content", "") is None for message in chat) else self._template
        variants = [lambda: chat, lambda: _with_text_arguments(chat), lambda: _without_null(_with_text_arguments(chat))]
        try:
            return _first_that_renders(template, variants, given)
        except _FAILURES as error:
            raise IsthmusError(f"the chat template refuses this conversation: {error}") from None

    @cached_property
    def _forgiving(self) -> Template:
        """The template as it prints null as nothing, where transformers leaves a null out."""
        return _environment(finalize=lambda value: "" if value is None else value).from_string(self.source)

    def _with_reasoning(self, message: dict[str, Any]) -> dict[str, Any]:
        """Earlier thinking under the names that templates read it by, as transformers gives it.

        `reasoning` is one more of them, where the template reads no other.
        """
        reasoning = next((message[name] for name in REASONING if message.get(name) is not None), None)
        if reasoning is None:
            return message
        alone = {"reasoning": reasoning} if self._reasoning_fields == ["reasoning"] else {}
        return {"thinking": reasoning, **message, **alone, "reasoning_content": reasoning}


class _Generation(Extension):
    """{% generation %}: marks what the model wrote, for training with transformers. It renders as what is in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


def _environment(finalize: Callable[[Any], Any] | None = None) -> LimitedEnvironment:
    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"], finalize=finalize
    )
    environment.globals |= {"raise_exception": _raise_template_error, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _to_json
    return environment


def _first_that_renders(template: Template, variants: list[Callable[[], Messages]], given: dict[str, Any]) -> str:
    """The rendering of the first variant that the template's arithmetic of texts takes; the last may fail."""
    for variant in variants[:-1]:
        try:
            return _render(template, variant(), given)
        except TypeError:
            continue
    return _render(template, variants[-1](), given)


def _render(template: Template, messages: Messages, given: dict[str, Any]) -> str:
    return within_limits(lambda: template.generate(messages=messages, **given))


def _fields(tree: nodes.Template) -> Iterator[str]:
    """Names that are read of something: `x.name`, `x['name']`, `x.get('name')`, `'name' in x`."""
    for node in tree.find_all(nodes.Getattr):
        yield node.attr
    yield from _literals(tree)


def _texts(tree: nodes.Template) -> Iterator[str]:
    """What the template prints, or looks for: its text, and the literals in its code."""
    for node in tree.find_all(nodes.TemplateData):
        yield node.data
    yield from _literals(tree)


def _literals(tree: nodes.Template) -> Iterator[str]:
    for node in tree.find_all(nodes.Const):
        if isinstance(node.value, str):
            yield node.value


def _looked_for(tree: nodes.Template) -> set[str]:
    """Texts that are looked for in others: `'text' in x`, `x.split('text')`."""
    compared = [node.expr for node in tree.find_all(nodes.Compare)]
    given = [argument for call in tree.find_all(nodes.Call) for argument in call.args]
    literals = [node.value for node in [*compared, *given] if isinstance(node, nodes.Const)]
    return {text.strip() for text in literals if isinstance(text, str)}


def _with_text_arguments(messages: Messages) -> Messages:
    """The same conversation, with the arguments of each call as JSON text."""
    return [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _without_null(messages: Messages) -> Messages:
    return [{**message, "content": ""} if message.get("content", "") is None else message for message in messages]


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
