"""What a request needs before the core can take it: its prompts as tokens, and the constraint on its answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from isthmus.data.chat_template import END_THINK, THINK
from isthmus.data.tokenizer import leaves_thinking_open
from isthmus.engines.local.api.protocol import (
    ApiError,
    Ask,
    ChatAsk,
    CompletionAsk,
    Conversation,
    NamedTool,
    check_tokens,
    too_long,
)
from isthmus.engines.local.api.service import Service
from isthmus.engines.local.api.text import CLOSE_THINK, Beginning, CallReader
from isthmus.engines.local.api.thinking import check_history, read_wishes
from isthmus.engines.local.api.tools import CallFormat, call_grammar, format_of
from isthmus.engines.local.core.grammar import (
    GrammarRefused,
    check_schema,
    choice_grammar,
    json_grammar,
    literal,
    regex_grammar,
)
from isthmus.engines.local.core.scheduler import Constraint
from isthmus.errors import IsthmusError

_GOES_ON = "\ue000goes-on\ue000 "
"""A mark that no conversation has; the space at its end shows whether the template trims."""


@dataclass(frozen=True)
class Calls:
    """The calls that an answer may make: how they are written, and of which functions."""

    form: CallFormat
    names: frozenset[str]
    parallel: bool
    marks: frozenset[int]

    def reader(self) -> CallReader:
        return self.form.reader(self.names, self.parallel)


@dataclass(frozen=True)
class Prepared:
    """`prompts` are token ids. `grammar`, which the field `wanted_by` asks for, is compiled by `constraint`.

    `thinking` says how a chat's answer begins: inside its thinking, with it if the model chooses to, or without.
    """

    prompts: list[list[int]]
    grammar: str | None = None
    calls: Calls | None = None
    wanted_by: str | None = None
    thinking: Beginning = "without"

    def constraint(self, service: Service) -> Constraint | None:
        """The constraint on the answer; a chat's begins after its thinking. Raises ApiError (400).

        Takes up to a second.
        """
        if self.grammar is None:
            return None
        vocabulary, after, opening = service.vocabulary, None, None
        if self.thinking == "inside":
            after = CLOSE_THINK if vocabulary.close_think is None else vocabulary.close_think
        elif self.thinking == "free" and vocabulary.close_think is not None:
            after, opening = vocabulary.close_think, vocabulary.open_think
        try:
            return service.grammars.compile(self.grammar, after, opening)
        except GrammarRefused as error:
            raise ApiError(str(error), param=self.wanted_by, code="invalid_value") from None


def prepare_completion(service: Service, ask: CompletionAsk) -> Prepared:
    """Raises ApiError (400)."""
    check_tokens(ask, service.architecture.vocab_size)
    prompts = [
        encode_text(service, one, "prompt", raw=ask.add_special_tokens) if isinstance(one, str) else one
        for one in ask.prompts
    ]
    check_prompt_tokens(service, prompts)
    grammar = answer_grammar(ask)
    _check_ending(ask, grammar)
    return Prepared(prompts, grammar, wanted_by=_wanted_by(ask))


def prepare_chat(service: Service, ask: ChatAsk) -> Prepared:
    """Raises ApiError (400)."""
    check_tokens(ask, service.architecture.vocab_size)
    text = chat_text(service, ask, with_tools=bool(ask.offered))
    prompt = encode_text(service, text, "messages", raw=ask.add_special_tokens)
    check_prompt_tokens(service, [prompt], "messages")
    grammar, calls = answer_grammar(ask), None
    if ask.offered:
        calls = _calls(service, ask)
        grammar = _grammar_with_calls(service, ask, calls.form, grammar)
    _check_ending(ask, grammar)
    return Prepared([prompt], grammar, calls, _wanted_by(ask), _beginning(service, text, ask))


def chat_prompt(service: Service, ask: Conversation, *, with_tools: bool) -> list[int]:
    """Token ids of a conversation. Raises ApiError (400)."""
    return encode_text(service, chat_text(service, ask, with_tools=with_tools), "messages", raw=ask.add_special_tokens)


def chat_text(service: Service, ask: Conversation, *, with_tools: bool) -> str:
    """The prompt of a conversation: its template's rendering, and what [serve] thinking adds. Raises ApiError (400)."""
    tokenizer = service.tokenizer
    template = tokenizer.tool_template if with_tools else tokenizer.template
    asked = read_wishes(template, ask, service.thinking)
    check_history(template, ask.messages)
    if with_tools and "tools" not in template.variables:
        raise ApiError("the chat template of this model has no place for tools", param="tools")
    tools = [tool.model_dump(exclude_none=True) for tool in ask.tools] if with_tools else None
    messages, variables = [message.plain() for message in ask.messages], dict(asked.variables)
    if ask.continue_final_message:
        messages[-1]["content"] += _GOES_ON
    if ask.continue_final_message or not ask.add_generation_prompt:
        variables["add_generation_prompt"] = False
    try:
        text = tokenizer.chat_text(messages, tools, **variables)
    except IsthmusError as error:
        raise ApiError(str(error), param="messages", code="invalid_value") from None
    if ask.continue_final_message:
        return _cut_to_go_on(text)
    return asked.finish(text, template) if ask.add_generation_prompt else text


def _cut_to_go_on(text: str) -> str:
    """The prompt up to where the last message ends, as transformers cuts it; a template may trim messages."""
    place = text.rfind(_GOES_ON.rstrip())
    if place < 0:
        message = "the chat template of this model leaves the last message out, so it cannot be continued"
        raise ApiError(message, param="continue_final_message")
    before = text[:place]
    return before if text.startswith(_GOES_ON, place) else before.rstrip()


def _beginning(service: Service, prompt: str, ask: ChatAsk) -> Beginning:
    """How the answer to the text of a chat's prompt begins."""
    if ask.continue_final_message and service.vocabulary.thinks:
        begun = str(ask.messages[-1].plain()["content"])
        return "inside" if begun.rfind(THINK) > begun.rfind(END_THINK) else "without"
    if not service.vocabulary.thinks or prompt.rstrip().endswith(END_THINK):
        return "without"
    return "inside" if leaves_thinking_open(prompt) else "free"


def encode_text(service: Service, text: str, field: str, *, raw: bool = False) -> list[int]:
    """Token ids of a text, with what the tokenizer puts around a `raw` one.

    One that is too long however it is split is refused before that is tried.
    """
    length, tokenizer = service.core.length, service.tokenizer
    if len(text) > length * tokenizer.longest_token:
        raise too_long(length, -(-len(text) // tokenizer.longest_token), 0, field, field, at_least=True)
    return tokenizer.encode_raw(text) if raw else tokenizer.encode(text)


def check_prompt_tokens(service: Service, prompts: list[list[int]], field: str = "prompt") -> None:
    """Refuse token ids that the model does not have."""
    size = service.architecture.vocab_size
    for prompt in prompts:
        if prompt and not 0 <= min(prompt) <= max(prompt) < size:
            raise ApiError(f"{field}: token ids must be between 0 and {size - 1}", param=field, code="invalid_value")


def answer_grammar(ask: Ask) -> str | None:
    """The grammar of the answer that response_format or structured_outputs ask for."""
    try:
        return _response_grammar(ask) or _structured_grammar(ask)
    except GrammarRefused as error:
        raise ApiError(str(error), param=_wanted_by(ask), code="invalid_value") from None


def _wanted_by(ask: Ask) -> str:
    """The field that asks for the grammar of the answer."""
    if ask.structured_outputs is not None:
        return "structured_outputs"
    return "tools" if _response_schema(ask) is None else "response_format"


def _response_grammar(ask: Ask) -> str | None:
    schema = _response_schema(ask)
    return None if schema is None else json_grammar(schema)


def _response_schema(ask: Ask) -> dict[str, Any] | None:
    form = ask.response_format
    if form is None or form.type == "text":
        return None
    return {"type": "object"} if form.json_schema is None else form.json_schema.schema_ or {}


def _structured_grammar(ask: Ask) -> str | None:
    wanted = ask.structured_outputs
    if wanted is None:
        return None
    if wanted.regex is not None:
        return regex_grammar(wanted.regex)
    if wanted.choice is not None:
        return choice_grammar(wanted.choice)
    if wanted.grammar is not None:
        return wanted.grammar
    schema = {"type": "object"} if wanted.json_ is None else wanted.json_
    return json_grammar(schema, any_whitespace=not wanted.disable_any_whitespace)


def _calls(service: Service, ask: ChatAsk) -> Calls:
    form = format_of(service.tokenizer.tool_template.source)
    if form is None:
        raise ApiError("the chat template of this model writes calls in a way that is not known here", param="tools")
    one_only = isinstance(ask.tool_choice, NamedTool) or not ask.parallel_tool_calls
    marks = (service.vocabulary.single(mark) for mark in form.marks)
    names = frozenset(function.name for function in ask.offered)
    return Calls(form, names, not one_only, frozenset(mark for mark in marks if mark is not None))


def _grammar_with_calls(service: Service, ask: ChatAsk, form: CallFormat, answer: str | None) -> str | None:
    """What an answer may be that must call, may call strict functions, or has a format where it does not call."""
    functions = ask.offered
    if isinstance(ask.tool_choice, NamedTool):
        functions = [function for function in functions if function.name == ask.tool_choice.function.name]
    strict = any(function.strict for function in functions)
    if not ask.must_call and not strict and answer is None:
        return None
    try:
        check_schema([function.parameters for function in functions])
    except GrammarRefused as error:
        raise ApiError(str(error), param="tools", code="invalid_value") from None

    def written(mark: str) -> str:
        token = service.vocabulary.single(mark)
        return literal(mark) if token is None else f"<[{token}]>"

    answers = "calls"
    if not ask.must_call and answer is not None:
        answers = _format_or_calls(ask)
    elif not ask.must_call:
        answers = form.answers(written)
    parallel = ask.parallel_tool_calls and not isinstance(ask.tool_choice, NamedTool)
    return call_grammar(form, functions, written, parallel=parallel, answers=answers)


def _format_or_calls(ask: ChatAsk) -> str:
    schema = _response_schema(ask)
    if schema is None:
        raise ApiError("structured_outputs goes with tools only as tool_choice none", param="structured_outputs")
    return f"answer | calls\nanswer: %json {json.dumps(schema)}"


def _check_ending(ask: Ask, grammar: str | None) -> None:
    for name in ("ignore_eos", "min_tokens"):
        if grammar is not None and getattr(ask, name):
            raise ApiError(f"{name} contradicts an answer that ends where its format is complete", param=name)
