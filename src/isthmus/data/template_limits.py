"""What a chat template may cost: time, the size of what it makes, and of what it makes on the way.

A template comes with a model from anyone. Its loops are watched from inside their thread, and what one operation could
make of little (`10 ** 10000000`, `"x" * 10000000000`) is refused before it is computed.
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

RENDER_S = 5.0
MOST_CHARACTERS = 64 << 20
"""Of a prompt, and of any text or list on the way to it."""
MOST_DIGITS = 1000
_WIDE = re.compile(r"%[^%a-zA-Z]*(\d{6,}|\*)|\{[^{}]*:[^{}]*\d{6,}")
_SIZED_FILTERS = ("batch", "center", "format", "indent", "replace", "slice", "truncate", "wordwrap")
_PADDING = ("center", "expandtabs", "ljust", "rjust", "zfill")


class TooCostly(TemplateError):
    """A template takes too long or makes too much."""


class _Generator(CodeGenerator):
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which no single operation makes more than MOST_CHARACTERS. Raises TooCostly."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        for name in _SIZED_FILTERS:
            self.filters[name] = _bounded(self.filters[name])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and _digits(left) * _size_of_power(right) > MOST_DIGITS:
            raise TooCostly("a power has too many digits")
        if operator == "*":
            _require(_length(left) * _times(right) + _length(right) * _times(left))
            if _digits(left) + _digits(right) > 2 * MOST_DIGITS:
                raise TooCostly("a product has too many digits")
        if operator == "+":
            _require(_length(left) + _length(right))
        if operator == "%" and isinstance(left, str):
            _check_form(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, *args: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        text, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(text, str):
            if name in _PADDING:
                _require(max((one for one in args if isinstance(one, int)), default=0) * (1 + text.count("\t")))
            elif name == "replace" and len(args) > 1 and all(isinstance(one, str) for one in args[:2]):
                _require(len(text) + text.count(args[0]) * len(args[1]))
            elif name == "format":
                _check_form(text)
            elif name == "join" and args and isinstance(args[0], list | tuple):
                _require(sum(_length(one) + len(text) for one in args[0]))
        return super().call(context, obj, *args, **options)

    def joined(self, parts: Iterable[Any]) -> str:
        """What `~` makes of its operands."""
        texts = [str(part) for part in parts]
        _require(sum(map(len, texts)))
        return "".join(texts)


def within_limits(pieces: Callable[[], Iterable[str]]) -> str:
    """All pieces, one after the other. Raises TooCostly if they take longer than RENDER_S or are too long together."""
    ends = time.monotonic() + RENDER_S

    def watch(_frame: FrameType, _event: str, _argument: Any) -> Any:
        if time.monotonic() > ends:
            raise TooCostly(f"it takes longer than {RENDER_S:g} s")
        return watch

    found, size, before = [], 0, sys.gettrace()
    sys.settrace(watch)
    try:
        for piece in pieces():
            size += len(piece)
            _require(size)
            found.append(piece)
    finally:
        sys.settrace(before)
    return "".join(found)


def _bounded(chosen: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is given no number beyond what a text may be long."""

    @functools.wraps(chosen)
    def checked(*args: Any, **options: Any) -> Any:
        texts = [one for one in args if isinstance(one, str)]
        for one in (*args, *options.values()):
            if isinstance(one, int):
                _require(one)
        if chosen.__name__ == "do_format" and texts:
            _check_form(texts[0])
        if chosen.__name__ == "do_replace" and len(texts) > 2:
            _require(len(texts[0]) + texts[0].count(texts[1]) * len(texts[2]))
        return chosen(*args, **options)

    return checked


def _check_form(text: str) -> None:
    if _WIDE.search(text):
        raise TooCostly("a format asks for too wide a field")


def _require(size: int) -> None:
    if size > MOST_CHARACTERS:
        raise TooCostly(f"it makes more than {MOST_CHARACTERS:,} characters")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _times(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _digits(value: Any) -> int:
    return value.bit_length() // 3 + 1 if isinstance(value, int) else 1


def _size_of_power(value: Any) -> int:
    return abs(value) if isinstance(value, int) else 1
