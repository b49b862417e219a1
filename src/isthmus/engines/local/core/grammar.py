"""Structured output: what the tokens of an answer may be, as masks that llguidance computes.

It compiles JSON schemas, regular expressions and context-free grammars (a dialect of Lark) against the very tokens of a
vocabulary: https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from isthmus.errors import IsthmusError

MAX_GRAMMAR_CHARACTERS, MAX_REGEX_CHARACTERS = 100_000, 4000
MAX_REASON_CHARACTERS = 1000
LIMITS = LLParserLimits(max_lexer_states=50_000, initial_lexer_fuel=250_000, verbose_errors=False)
"""A state of the lexer takes one to two kilobytes."""


class GrammarRefused(IsthmusError):
    """A schema, regular expression or grammar that cannot be compiled."""


class SerialTokenizer(Protocol):
    """What is needed of a tokenizer: its tokenizer.json and the tokens that end an answer, the end token first."""

    @property
    def ends(self) -> Sequence[int]: ...

    def serialise(self) -> str: ...


def json_grammar(schema: dict[str, Any] | str, any_whitespace: bool = True) -> str:
    """JSON that keeps to a schema. Raises GrammarRefused if `schema` is a text that is no JSON object."""
    check_schema(schema)
    options = {"whitespace_flexible": any_whitespace}
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=options)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise GrammarRefused(f"the JSON schema is refused: {error}") from None


def check_schema(schema: Any) -> None:
    """Raise GrammarRefused for what would be too long as a grammar, before it is written out as one."""
    characters, left = 0, [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
            characters += sum(map(len, value)) + len(value)
        elif isinstance(value, list):
            left += value
            characters += len(value)
        characters += len(value) if isinstance(value, str) else 1
        if characters > MAX_GRAMMAR_CHARACTERS:
            raise GrammarRefused(f"the format is longer than {MAX_GRAMMAR_CHARACTERS} characters")


def regex_grammar(pattern: str) -> str:
    """Text that a regular expression (Rust's syntax, without look-around) matches as a whole. Raises GrammarRefused."""
    if len(pattern) > MAX_REGEX_CHARACTERS:
        raise GrammarRefused(f"the expression has {len(pattern)} characters; {MAX_REGEX_CHARACTERS} are allowed")
    return LLMatcher.grammar_from_regex(pattern)


def choice_grammar(choices: list[str]) -> str:
    """One of several texts. Raises GrammarRefused."""
    check_schema(choices)
    return "start: " + " | ".join(map(literal, choices))


def literal(text: str) -> str:
    """A text in quotes, as a grammar in Lark has it: JSON, but no control character stands in it as it is."""
    return json.dumps(text).replace("\x7f", "\\u007f")


class Compiler:
    """Compiles grammars for one vocabulary. `vocab_size` is the model's, which may exceed the tokenizer's.

    `limits` bound the work for one token of an answer.
    """

    def __init__(self, tokenizer: SerialTokenizer, vocab_size: int, limits: LLParserLimits = LIMITS):
        self.limits = limits
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._vocabulary: LLTokenizer | None = None
        self._reading = threading.Lock()

    def compile(self, grammar: str, after: int | str | None = None, opening: int | None = None) -> GrammarConstraint:
        """A constraint from the first token on, or from after the token or text `after` on. Takes up to a second.

        With an `opening` token it is for the model to say: `after` counts if that comes first. Raises GrammarRefused
        with llguidance's reason.
        """
        if len(grammar) > MAX_GRAMMAR_CHARACTERS:
            raise GrammarRefused(f"the grammar has {len(grammar)} characters; {MAX_GRAMMAR_CHARACTERS} are allowed")
        vocabulary = self._read()
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=self.limits)
        ends = tuple(self._tokenizer.ends)
        constraint = GrammarConstraint(vocabulary, matcher, self._vocab_size, ends, after, opening)
        constraint.start(free=False).mask()
        if matcher.is_error():
            raise GrammarRefused(f"the grammar is refused: {matcher.get_error()[:MAX_REASON_CHARACTERS]}")
        if constraint.failures:
            raise GrammarRefused(f"the grammar is refused: {constraint.failures[0]}")
        return constraint

    def _read(self) -> LLTokenizer:
        """The vocabulary as llguidance holds it, read when the first grammar comes."""
        with self._reading:
            if self._vocabulary is None:
                ends, size = list(self._tokenizer.ends), self._vocab_size
                self._vocabulary = LLTokenizer(self._tokenizer.serialise(), n_vocab=size, eos_token=ends)
            return self._vocabulary


@dataclass(frozen=True, eq=False)
class GrammarConstraint:
    """A compiled grammar. Before the token or text `after` everything but the end tokens is allowed, if it is given;
    with an `opening`, only where that is the first token, which it may be.

    `failures` receives why a sample could not go on (llguidance limits the work for one token); such a sample ends.
    """

    vocabulary: LLTokenizer
    matcher: LLMatcher
    vocab_size: int
    ends: tuple[int, ...]
    after: int | str | None = None
    opening: int | None = None
    failures: list[str] = field(default_factory=list)

    def start(self, free: bool = True) -> GrammarState:
        """The beginning of a sample. Without `free` it is where the grammar begins."""
        opens = free and self.opening is not None
        return GrammarState(self, self.matcher.deep_copy(), free and self.after is not None and not opens, opens)

    def everything_but_the_end(self) -> NDArray[np.bool_]:
        """[V]."""
        allowed = np.ones(self.vocab_size, dtype=np.bool_)
        allowed[list(self.ends)] = False
        return allowed


class GrammarState:
    """How far one sample is."""

    def __init__(self, constraint: GrammarConstraint, matcher: LLMatcher, free: bool, opens: bool = False):
        self._constraint, self._matcher, self._free, self._opens = constraint, matcher, free, opens
        self._failed = False
        self._tail = b""

    def mask(self) -> NDArray[np.bool_]:
        """[V]: True where the next token may be that one. The end token may come where the grammar accepts."""
        if self._free:
            return self._constraint.everything_but_the_end()
        allowed = self._allowed()
        if self._matcher.is_error() or not allowed.any():
            self._fail(self._matcher.get_error() or "no token can follow")
            allowed[self._constraint.ends[0]] = True
        if self._opens:
            allowed[self._constraint.opening] = True
        return allowed

    def accept(self, token: int) -> None:
        """The token that was drawn."""
        opens, self._opens = self._opens, False
        if opens and token == self._constraint.opening:
            self._free = True
        elif not self._free:
            self._consume([token])
        elif isinstance(self._constraint.after, str):
            self._look_for_text(token, self._constraint.after.encode())
        else:
            self._free = token != self._constraint.after

    @property
    def done(self) -> bool:
        """Whether nothing but the end may follow."""
        return self._failed or (not self._free and self._matcher.is_stopped())

    def _look_for_text(self, token: int, mark: bytes) -> None:
        """The grammar begins after the mark. What follows it in the same token is the grammar's, save white space."""
        vocabulary = self._constraint.vocabulary
        seen = self._tail + vocabulary.decode_bytes([token])
        place = seen.find(mark)
        self._tail, self._free = seen[-len(mark) :], place < 0
        if not self._free and (rest := seen[place + len(mark) :].strip()):
            self._consume(vocabulary.tokenize_bytes(rest))

    def _consume(self, tokens: list[int]) -> None:
        if not self._matcher.consume_tokens(tokens):
            self._fail(self._matcher.get_error())

    def _allowed(self) -> NDArray[np.bool_]:
        if self._failed or self._matcher.is_error():
            return np.zeros(self._constraint.vocab_size, dtype=np.bool_)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, count=self._constraint.vocab_size, bitorder="little").astype(np.bool_)

    def _fail(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            self._constraint.failures.append(reason)
