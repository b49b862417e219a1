"""From tokens to what a client reads: whole characters, thinking apart from the answer, cut at stop strings."""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

Channel = Literal["reasoning", "content"]
_REPLACEMENT = "\ufffd"
_MAX_HELD = 8


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int], skip_special: bool = True) -> str: ...


class Delta(NamedTuple):
    """New text of one channel."""

    channel: Channel
    text: str


class Vocabulary:
    """A tokenizer with what the server keeps about it: the text of single tokens, and the marks around thinking."""

    def __init__(self, tokenizer: Decoder):
        self.tokenizer = tokenizer
        self.open_think, self.close_think = self._single("<think>"), self._single("</think>")
        self._texts: dict[int, str] = {}

    def text_of(self, token: int) -> str:
        """The text of one token, special ones included."""
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token], skip_special=False)
        return self._texts[token]

    def opens_thinking(self, prompt: list[int]) -> bool:
        """Whether a completion of this prompt begins inside <think>."""
        for token in reversed(prompt):
            if token == self.close_think:
                return False
            if token == self.open_think:
                return True
        return False

    def _single(self, mark: str) -> int | None:
        ids = self.tokenizer.encode(mark)
        return ids[0] if len(ids) == 1 else None


class CharacterStream:
    """Text of arriving tokens of a byte-level vocabulary, held back while it ends inside a character."""

    def __init__(self, tokenizer: Decoder):
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def push(self, token: int) -> str:
        """The characters that this token completes."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_REPLACEMENT) and len(self._ids) < _MAX_HELD:
            return ""
        self._ids.clear()
        return text

    def flush(self) -> str:
        """What was held back; broken bytes become replacement characters."""
        text = self._tokenizer.decode(self._ids)
        self._ids.clear()
        return text


class StopCutter:
    """Holds back text that may be the beginning of a stop string, and ends at the first one."""

    def __init__(self, stops: list[str]):
        self._stops, self._held = stops, ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string."""
        if self.stopped:
            return ""
        pending = self._held + text
        found = [place for place in map(pending.find, self._stops) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return pending[: min(found)]
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


class ChannelledText:
    """One completion as deltas: reasoning until </think>, then content without the blank lines before it."""

    def __init__(self, vocabulary: Vocabulary, stops: list[str], thinking: bool):
        self._vocabulary = vocabulary
        self._channel: Channel = "reasoning" if thinking else "content"
        self._stops = stops
        self._after_thought = False
        self._open()

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._cutter.stopped

    def push(self, token: int) -> list[Delta]:
        """The text that this token makes certain."""
        if token not in (self._vocabulary.open_think, self._vocabulary.close_think):
            return self._deltas(self._cutter.push(self._characters.push(token)))
        deltas = self.finish()
        if not self.stopped:
            self._channel = "reasoning" if token == self._vocabulary.open_think else "content"
            self._after_thought = self._channel == "content"
            self._open()
        return deltas

    def push_all(self, tokens: list[int]) -> list[Delta]:
        """The text of many tokens."""
        return [delta for token in tokens for delta in self.push(token)]

    def finish(self) -> list[Delta]:
        """The text that was held back."""
        rest = self._cutter.push(self._characters.flush())
        return self._deltas(rest + self._cutter.flush())

    def _open(self) -> None:
        self._characters = CharacterStream(self._vocabulary.tokenizer)
        self._cutter = StopCutter(self._stops)

    def _deltas(self, text: str) -> list[Delta]:
        if self._after_thought:
            text = text.lstrip("\n")
            self._after_thought = not text
        return [Delta(self._channel, text)] if text else []


class PlainText:
    """One completion as it is, thinking marks included."""

    def __init__(self, vocabulary: Vocabulary, stops: list[str]):
        self._tokenizer = vocabulary.tokenizer
        self._characters = CharacterStream(vocabulary.tokenizer)
        self._cutter = StopCutter(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._cutter.stopped

    def push(self, token: int) -> list[Delta]:
        """The text that this token makes certain."""
        return self._deltas(self._cutter.push(self._characters.push(token)))

    def push_all(self, tokens: list[int]) -> list[Delta]:
        """The text of many tokens, decoded at once."""
        return self._deltas(self._cutter.push(self._tokenizer.decode(tokens)))

    def finish(self) -> list[Delta]:
        rest = self._cutter.push(self._characters.flush())
        return self._deltas(rest + self._cutter.flush())

    def _deltas(self, text: str) -> list[Delta]:
        return [Delta("content", text)] if text else []
