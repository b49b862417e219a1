"""From tokens to what a client reads: whole characters, thinking apart from the answer, calls apart from both, cut at
stop strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from isthmus.data.chat_template import END_THINK, THINK

Channel = Literal["reasoning", "content"]
Beginning = Literal["inside", "free", "without"]
OPEN_THINK, CLOSE_THINK = THINK, END_THINK
_REPLACEMENT = "\ufffd"
_MAX_HELD = 8
_CONTEXT = 6
"""Tokens of a prompt that its completion is read after: a few, for what a decoder does between two tokens."""


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int], skip_special: bool = True, shown: frozenset[int] = frozenset()) -> str: ...

    def bytes_of(self, token: int) -> bytes: ...

    def is_structure(self, token: int) -> bool: ...


class Delta(NamedTuple):
    """New text of one channel."""

    channel: Channel
    text: str


class Call(NamedTuple):
    """A call of a function. `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


class CallReader(Protocol):
    """Takes the text of one answer as it arrives, and gives text and calls in order."""

    @property
    def finished(self) -> bool:
        """Whether no more is wanted: a call was made, and only one is allowed."""
        ...

    def push(self, text: str) -> list[str | Call]: ...

    def flush(self) -> list[str | Call]:
        """What was held back, when no text will follow."""
        ...


@dataclass(frozen=True)
class Rules:
    """How the tokens of a request become text.

    `stops` end it, and stay in it with `keep_stop`. `ends` are the tokens that end it and have no text. Special tokens
    are left out with `skip_special`, except `shown` ones.
    """

    stops: list[str] = field(default_factory=list)
    keep_stop: bool = False
    ends: frozenset[int] = frozenset()
    skip_special: bool = True
    shown: frozenset[int] = frozenset()


class Vocabulary:
    """A tokenizer with what the server keeps about it: the text of single tokens, and the marks around thinking.

    Where nothing `thinks`, the marks are text like any other.
    """

    def __init__(self, tokenizer: Decoder, thinks: bool = True):
        self.tokenizer, self.thinks = tokenizer, thinks
        self.open_think = self.single(OPEN_THINK) if thinks else None
        self.close_think = self.single(CLOSE_THINK) if thinks else None

    def text_of(self, token: int) -> str:
        """The text of one token, special ones included; bytes of a character in part become replacement characters."""
        return self.bytes_of(token).decode(errors="replace")

    def bytes_of(self, token: int) -> bytes:
        """What one token stands for, special ones included."""
        return self.tokenizer.bytes_of(token)

    def is_structure(self, token: int) -> bool:
        """Whether a token structures a conversation and is no part of its text."""
        return self.tokenizer.is_structure(token)

    def is_hidden(self, token: int, rules: Rules) -> bool:
        """Whether a token has no text in an answer."""
        structures = rules.skip_special and token not in rules.shown and self.is_structure(token)
        return structures or token in rules.ends

    def single(self, mark: str) -> int | None:
        """The token that a mark is, if it is one."""
        ids = self.tokenizer.encode(mark)
        return ids[0] if len(ids) == 1 else None


class CharacterStream:
    """Text of arriving tokens, held back while it ends inside a character; together, the text of all of them.

    What a token adds is seen after the tokens before it, as in the tokenizers library's DecodeStream: a decoder may
    leave out the space at the very beginning, and join pieces. Here broken bytes neither wait for ever nor raise. The
    text follows that of the tokens `before`.
    """

    def __init__(self, tokenizer: Decoder, rules: Rules, before: Sequence[int] = ()):
        self._tokenizer, self._rules = tokenizer, rules
        self._ids, self._given = list(before), self._decode(list(before))
        if self._given.endswith(_REPLACEMENT):
            self._ids, self._given = [], ""
        self._read = len(self._ids)

    def push(self, token: int) -> str:
        """The characters that this token completes."""
        self._ids.append(token)
        return self._new(self._ids, final=len(self._ids) - self._read >= _MAX_HELD)

    def push_all(self, tokens: list[int]) -> str:
        """The same of many tokens at once."""
        self._ids += tokens
        return self._new(self._ids, final=True)

    def flush(self) -> str:
        """What was held back; broken bytes become replacement characters."""
        return self._new(self._ids, final=True)

    def _new(self, ids: list[int], *, final: bool) -> str:
        text = self._decode(ids)
        if len(text) <= len(self._given) or (text.endswith(_REPLACEMENT) and not final):
            return ""
        new = text[len(self._given) :]
        self._ids = ids[self._read :]
        self._read, self._given = len(self._ids), self._decode(self._ids)
        return new

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, self._rules.skip_special, self._rules.shown)


class StopCutter:
    """Holds back text that may begin a stop string, and ends at the first one, or with `keep` after it.

    `rest` is the text after it that came with it.
    """

    def __init__(self, stops: list[str], keep: bool = False):
        self._stops, self._keep, self._held = stops, keep, ""
        self.stop: str | None = None
        self.rest = ""

    @property
    def stopped(self) -> bool:
        return self.stop is not None

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string."""
        if self.stopped:
            return ""
        pending = self._held + text
        found = [(place, stop) for stop in self._stops if (place := pending.find(stop)) >= 0]
        if found:
            place, self.stop = min(found, key=lambda one: one[0])
            end = place + len(self.stop)
            self._held, self.rest = "", pending[end:]
            return pending[: end if self._keep else place]
        keep = max((self._overlap(pending, stop) for stop in self._stops), default=0)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that begins `stop`."""
        return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class Writer(Protocol):
    """One completion on its way from tokens to text."""

    @property
    def stop(self) -> str | None:
        """The stop string that was met."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether the completion ends here, whatever the model would go on with."""
        ...

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of thinking so far, the mark at its end included."""
        ...

    def push(self, token: int) -> list[Delta | Call]:
        """What this token makes certain."""
        ...

    def push_all(self, tokens: list[int]) -> list[Delta | Call]:
        """What all tokens of a completion make certain."""
        ...

    def finish(self) -> list[Delta | Call]:
        """What was held back."""
        ...


class ChannelledText:
    """One completion as deltas: reasoning until </think>, then content without the blank lines before it, and calls.

    Where the marks are no tokens of the vocabulary, they are looked for in the text: <think> at its beginning.
    """

    def __init__(self, vocabulary: Vocabulary, rules: Rules, thinking: Beginning, calls: CallReader | None = None):
        self._vocabulary, self._rules, self._calls = vocabulary, rules, calls
        self._channel: Channel = "reasoning" if thinking == "inside" else "content"
        self._after_thought = False
        in_text = vocabulary.close_think is None
        self._mark = StopCutter([CLOSE_THINK]) if in_text and thinking == "inside" else None
        self._beginning = "" if in_text and thinking == "free" else None
        self.reasoning_tokens = 0
        self._open()

    @property
    def stop(self) -> str | None:
        return self._cutter.stop

    @property
    def stopped(self) -> bool:
        return self._cutter.stopped or (self._calls is not None and self._calls.finished)

    def push(self, token: int) -> list[Delta | Call]:
        if token in self._rules.ends:
            return []
        self.reasoning_tokens += self._channel == "reasoning"
        if token not in (self._vocabulary.open_think, self._vocabulary.close_think):
            return self._given(self._cutter.push(self._characters.push(token)))
        given = self._close()
        if not self.stopped:
            self._channel = "reasoning" if token == self._vocabulary.open_think else "content"
            self._after_thought = self._channel == "content"
            self._open()
        return given

    def push_all(self, tokens: list[int]) -> list[Delta | Call]:
        return [part for token in tokens for part in self.push(token)]

    def finish(self) -> list[Delta | Call]:
        given = self._close()
        if self._beginning is not None:
            held, self._beginning = self._beginning, None
            given += self._shown(held)
        if self._mark is not None:
            given += self._shown(self._mark.flush())
        return given if self._calls is None else given + _of_content(self._calls.flush())

    def _open(self) -> None:
        self._characters = CharacterStream(self._vocabulary.tokenizer, self._rules)
        self._cutter = StopCutter(self._rules.stops, self._rules.keep_stop)

    def _close(self) -> list[Delta | Call]:
        rest = self._cutter.push(self._characters.flush())
        return self._given(rest + self._cutter.flush())

    def _given(self, text: str) -> list[Delta | Call]:
        text = text if self._beginning is None else self._after_opening(self._beginning + text)
        if self._mark is None:
            return self._shown(text)
        thought = self._shown(self._mark.push(text))
        if not self._mark.stopped:
            return thought
        self._channel, self._after_thought = "content", True
        rest, self._mark = self._mark.rest, None
        return thought + self._shown(rest)

    def _after_opening(self, text: str) -> str:
        """The beginning of an answer, held back while it may be <think>, which begins the reasoning."""
        begun = text.lstrip()
        if len(begun) < len(OPEN_THINK) and OPEN_THINK.startswith(begun):
            self._beginning = text
            return ""
        self._beginning = None
        if not begun.startswith(OPEN_THINK):
            return text
        self._channel, self._mark = "reasoning", StopCutter([CLOSE_THINK])
        return begun.removeprefix(OPEN_THINK)

    def _shown(self, text: str) -> list[Delta | Call]:
        if self._after_thought:
            text = text.lstrip("\n")
            self._after_thought = not text
        if self._channel == "content" and self._calls is not None:
            return _of_content(self._calls.push(text))
        return [Delta(self._channel, text)] if text else []


class PlainText:
    """One completion as it is, thinking marks included: what follows the text of its prompt."""

    reasoning_tokens = 0

    def __init__(self, vocabulary: Vocabulary, rules: Rules, prompt: Sequence[int] = ()):
        self._ends = rules.ends
        self._characters = CharacterStream(vocabulary.tokenizer, rules, prompt[-_CONTEXT:])
        self._cutter = StopCutter(rules.stops, rules.keep_stop)

    @property
    def stop(self) -> str | None:
        return self._cutter.stop

    @property
    def stopped(self) -> bool:
        return self._cutter.stopped

    def push(self, token: int) -> list[Delta | Call]:
        if token in self._ends:
            return []
        return self._given(self._cutter.push(self._characters.push(token)))

    def push_all(self, tokens: list[int]) -> list[Delta | Call]:
        whole = tokens[:-1] if tokens and tokens[-1] in self._ends else tokens
        return self._given(self._cutter.push(self._characters.push_all(whole)))

    def finish(self) -> list[Delta | Call]:
        rest = self._cutter.push(self._characters.flush())
        return self._given(rest + self._cutter.flush())

    def _given(self, text: str) -> list[Delta | Call]:
        return [Delta("content", text)] if text else []


def _of_content(parts: list[str | Call]) -> list[Delta | Call]:
    return [Delta("content", part) if isinstance(part, str) else part for part in parts]
