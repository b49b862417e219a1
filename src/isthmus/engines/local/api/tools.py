"""Calls of functions in a model's text: read from the marks that its chat template teaches, and enforced by a grammar.

| Template | A call |
|---|---|
| DeepSeek V3, R1 | <｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME, a fenced JSON object, <｜tool▁call▁end｜> |
| DeepSeek V3.1 | <｜tool▁call▁begin｜>NAME<｜tool▁sep｜>JSON object<｜tool▁call▁end｜> |
| Hermes, Qwen2.5 | <tool_call> JSON object with name and arguments </tool_call> |
| Llama 3.1 | a bare JSON object with name and parameters, several apart by semicolons |

DeepSeek's models put a frame of marks around all calls. What is not a call of an offered function stays text.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from isthmus.engines.local.api.protocol import Function, first_object, read_object
from isthmus.engines.local.api.text import Call, CallReader
from isthmus.engines.local.core.grammar import literal

_FENCE = re.compile(r"```json\n(.*?)\n?```", re.DOTALL)
_SPACE = " \t\r\n"


class Marks(Protocol):
    """How the marks of a format appear in a grammar."""

    def __call__(self, mark: str) -> str: ...


class CallFormat(Protocol):
    """How a family of models writes calls. `marks` may be single tokens of the vocabulary."""

    @property
    def marks(self) -> tuple[str, ...]: ...

    def reader(self, names: frozenset[str], parallel: bool) -> CallReader: ...

    def grammar(self, functions: Sequence[Function], parallel: bool, written: Marks) -> str:
        """Rules in Lark for `calls`: one call, or with `parallel` one or more."""
        ...

    def answers(self, written: Marks) -> str:
        """The right side of a rule for free text and calls after it, and what it needs of further rules."""
        ...


def format_of(template: str) -> CallFormat | None:
    """The format that a chat template teaches, or None if it is not known here."""
    if DeepseekFormat.marks[0] in template:
        return DeepseekFormat(fenced="```json" in template)
    if HermesFormat.marks[0] in template and not any(other in template for other in ("<function=", "<arg_key>")):
        return HermesFormat()
    if '{"name": ' in template and '"parameters": ' in template:
        return LlamaFormat()
    return None


def call_grammar(
    form: CallFormat, functions: Sequence[Function], written: Marks, *, parallel: bool, answers: str = "calls"
) -> str:
    """A grammar of answers that call functions, or that are one of the other `answers` (the right side of a rule)."""
    return f"start: {answers}\n{form.grammar(functions, parallel, written)}"


class DeepseekFormat:
    """`fenced` is the layout of V3 and R1; V3.1 left out the word `function` and the fence."""

    marks = (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    )

    def __init__(self, fenced: bool):
        self._fenced = fenced

    def reader(self, names: frozenset[str], parallel: bool) -> CallReader:
        begin, end, opening, closing, separator = self.marks

        def parse(body: str) -> Call | None:
            name, _, text = body.partition(separator)
            if name.strip() == "function":
                name, _, fence = text.partition("\n")
                match = _FENCE.fullmatch(fence.strip())
                text = match[1] if match else fence
            return _call(names, name.strip(), read_object(text.strip()))

        return FramedReader(opening, closing, parse, parallel, frame=(begin, end))

    def grammar(self, functions: Sequence[Function], parallel: bool, written: Marks) -> str:
        begin, end, opening, closing, separator = map(written, self.marks)
        rules = []
        for function in functions:
            head, tail = literal(function.name), ""
            name = f"{head} {separator}"
            if self._fenced:
                head, tail = literal(f"{function.name}\n```json\n"), literal("\n```")
                name = f'"function" {separator} {head}'
            rules.append(f"{opening} {name} {_arguments(function)} {tail} {closing}")
        between = '"\\n"' if self._fenced else ""
        more = f"({between} call)*" if parallel else ""
        return f"calls: {begin} begun\nbegun: call {more} {end}\n" + _alternatives(rules)

    def answers(self, written: Marks) -> str:
        return _text_then_calls(self.marks[0], written)


class HermesFormat:
    """The format of Hermes 2 Pro and of the models that follow it."""

    marks = ("<tool_call>", "</tool_call>")

    def reader(self, names: frozenset[str], parallel: bool) -> CallReader:
        def parse(body: str) -> Call | None:
            content = read_object(body.strip()) or {}
            return _call(names, content.get("name"), content.get("arguments"))

        return FramedReader(*self.marks, parse, parallel)

    def grammar(self, functions: Sequence[Function], parallel: bool, written: Marks) -> str:
        opening, closing = map(written, self.marks)
        rules = []
        for function in functions:
            head, tail = literal(f'\n{{"name": "{function.name}", "arguments": '), literal("}\n")
            rules.append(f"{head} {_arguments(function)} {tail} {closing}")
        more = f'("\\n" {opening} call)*' if parallel else ""
        return f"calls: {opening} begun\nbegun: call {more}\n" + _alternatives(rules)

    def answers(self, written: Marks) -> str:
        return _text_then_calls(self.marks[0], written)


class LlamaFormat:
    """The format of Llama 3.1 and 3.2. Some models write the mark before a call."""

    marks = ("<|python_tag|>",)

    def reader(self, names: frozenset[str], parallel: bool) -> CallReader:
        def parse(content: dict[str, Any]) -> Call | None:
            return _call(names, content.get("name"), content.get("parameters", content.get("arguments")))

        return BareReader(self.marks[0], parse, parallel)

    def grammar(self, functions: Sequence[Function], parallel: bool, written: Marks) -> str:
        rules = [f"%json {json.dumps(_call_schema(function))}" for function in functions]
        more = '("; " call)*' if parallel else ""
        return f"calls: call {more}\n" + _alternatives(rules)

    def answers(self, written: Marks) -> str:
        return "TEXT | calls\nTEXT: /\\s*([^{\\s](.|\\n)*)?/"


@dataclass
class FramedReader:
    """Calls between an opening and a closing mark, perhaps with a frame of marks around all of them.

    White space beside a call belongs to neither text nor call.
    """

    opening: str
    closing: str
    parse: Callable[[str], Call | None]
    parallel: bool
    frame: tuple[str, str] | None = None
    finished: bool = False
    _held: str = ""
    _pending: str = ""
    _inside: bool = False
    _after_call: bool = False

    def push(self, text: str) -> list[str | Call]:
        self._held += text
        given: list[str | Call] = []
        while not self.finished and self._step(given):
            pass
        return given

    def flush(self) -> list[str | Call]:
        given: list[str | Call] = []
        if self._inside:
            self._end_call(given, len(self._held), "")
        if not self.finished:
            self._say(given, self._held.rstrip() if self._after_call else self._held)
        return given

    def _step(self, given: list[str | Call]) -> bool:
        """Decide about the next part of the held text. False where that needs more of it."""
        if self._inside:
            end = self._held.find(self.closing)
            if end >= 0:
                self._end_call(given, end, self.closing)
            return end >= 0
        marks = (self.opening, *(self.frame or ()))
        places = [(place, mark) for mark in marks if (place := self._held.find(mark)) >= 0]
        if not places:
            certain = self._take(len(self._held) - _uncertain(self._held, marks))
            if certain:
                self._say(given, certain)
            return False
        self._take_mark(given, *min(places))
        return True

    def _take_mark(self, given: list[str | Call], place: int, mark: str) -> None:
        before = self._take(place)
        if before.strip():
            self._say(given, before.rstrip())
        self._pending += before[len(before.rstrip()) :]
        self._take(len(mark))
        if mark == self.opening:
            self._inside = True
        elif self.frame and mark == self.frame[1] and self._after_call:
            self._pending = ""
        else:
            self._pending += mark

    def _end_call(self, given: list[str | Call], end: int, closing: str) -> None:
        body = self._take(end)
        self._take(len(closing))
        self._inside = False
        call = self.parse(body)
        if call is None:
            self._say(given, f"{self.opening}{body}{closing}")
            return
        given.append(call)
        self._pending, self._after_call, self.finished = "", True, not self.parallel

    def _say(self, given: list[str | Call], text: str) -> None:
        """Give text, after what was pending before it."""
        text, self._pending = self._pending + text, ""
        if self._after_call:
            text = text.lstrip()
        if text:
            given.append(text)
            self._after_call = False

    def _take(self, size: int) -> str:
        taken, self._held = self._held[:size], self._held[size:]
        return taken


@dataclass
class BareReader:
    """An answer that is JSON objects from its first character on, or free text."""

    mark: str
    parse: Callable[[dict[str, Any]], Call | None]
    parallel: bool
    finished: bool = False
    _held: str = ""
    _free: bool = False
    _after_call: bool = False

    def push(self, text: str) -> list[str | Call]:
        if self._free:
            return [text] if text else []
        self._held += text
        given: list[str | Call] = []
        while self._held and not self.finished and self._step(given, "}" in text):
            pass
        return given

    def flush(self) -> list[str | Call]:
        only_separators = self._after_call and not self._held.strip(_SPACE + ";")
        return [self._held] if self._held and not self.finished and not only_separators else []

    def _step(self, given: list[str | Call], may_end: bool) -> bool:
        """Decide about the next part of the held text. False where that needs more of it."""
        rest = self._held.lstrip(_SPACE + ";" if self._after_call else _SPACE)
        if rest.startswith(self.mark):
            rest = rest[len(self.mark) :].lstrip()
        elif self.mark.startswith(rest):
            return False
        if rest and not rest.startswith("{"):
            return self._release(given)
        found = first_object(rest) if may_end else None
        if found is None:
            return False
        call = self.parse(found[0])
        if call is None:
            return self._release(given)
        given.append(call)
        self._held = rest[found[1] :]
        self._after_call, self.finished = True, not self.parallel
        return True

    def _release(self, given: list[str | Call]) -> bool:
        given.append(self._held)
        self._held, self._free = "", True
        return True


def _uncertain(text: str, marks: Sequence[str]) -> int:
    """Length of the end of `text` that may belong to a mark or is white space before one."""
    begun = max((size for mark in marks for size in range(1, len(mark)) if text.endswith(mark[:size])), default=0)
    rest = text[: len(text) - begun]
    return len(text) - len(rest.rstrip())


def _text_then_calls(opening: str, written: Marks) -> str:
    """A mark that is a token ends the text by itself; one that is text is looked for in it."""
    text = f"TEXT: /(.|\\n)*/ & ~/(.|\\n)*{opening}(.|\\n)*/"
    if written(opening) == literal(opening):
        return f"TEXT | up_to_call begun\nup_to_call[lazy]: /(.|\\n)*{opening}/\n{text}"
    return f"TEXT calls?\n{text}"


def _alternatives(rules: list[str]) -> str:
    names = [f"call_{index}" for index in range(len(rules))]
    lines = [f"call: {' | '.join(names)}", *(f"{name}: {rule}" for name, rule in zip(names, rules, strict=True))]
    return "\n".join(lines)


def _arguments(function: Function) -> str:
    return f"%json {json.dumps(function.parameters or {'type': 'object'})}"


def _call_schema(function: Function) -> dict[str, Any]:
    """The schema of a call as one object; what references in the function's schema point to moves to its root."""
    parameters = function.parameters or {"type": "object"}
    shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
    return {
        "type": "object",
        "properties": {"name": {"const": function.name}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
        **shared,
    }


def _call(names: frozenset[str], name: Any, arguments: Any) -> Call | None:
    if isinstance(arguments, str):
        arguments = read_object(arguments)
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return Call(f"call_{secrets.token_hex(12)}", name, json.dumps(arguments, ensure_ascii=False))
