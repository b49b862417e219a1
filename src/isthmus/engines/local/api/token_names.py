"""How single tokens are named in log-probabilities, and where in the text they begin.

A token that is a part of a character has no text. It is named by its bytes as OpenAI names it: `\\xf0\\x9f` in a chat,
`bytes:\\xf0\\x9f` in the legacy layout.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable

from isthmus.engines.local.api.text import Rules, Vocabulary
from isthmus.engines.local.core.scheduler import TopLogprobs

_CONTINUES = re.compile(rb"[\x80-\xbf]|$")
"""What begins with a byte that goes on with a character, or is empty."""


def chat_name(vocabulary: Vocabulary, token: int) -> str:
    """The text of a token, or its bytes, escaped, where they are no text."""
    content = vocabulary.bytes_of(token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in content)


def legacy_name(vocabulary: Vocabulary, token: int) -> str:
    """The same, with a mark before escaped bytes."""
    name = chat_name(vocabulary, token)
    return f"bytes:{name}" if name.encode() != vocabulary.bytes_of(token) else name


def by_name(vocabulary: Vocabulary, drawn: int, top: TopLogprobs) -> dict[str, float]:
    """The legacy layout of alternatives. Of tokens with one text, one keeps it, the drawn one first.

    The others are named `token_id:N`, as vLLM names them.
    """
    owners = {legacy_name(vocabulary, drawn): drawn}
    found: dict[str, float] = {}
    for token, logprob in top:
        name = legacy_name(vocabulary, token)
        found[name if owners.setdefault(name, token) == token else f"token_id:{token}"] = logprob
    return found


class TextPlaces:
    """Where the tokens of a text begin, in characters from `start`, as they arrive.

    A token that continues a character begins where the character does. Tokens that are hidden by `rules` have no text.
    """

    def __init__(self, vocabulary: Vocabulary, rules: Rules, start: int = 0):
        self._vocabulary, self._rules, self._next = vocabulary, rules, start
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def of(self, tokens: Iterable[int]) -> list[int]:
        """The places of the next tokens."""
        return [self._place(token) for token in tokens]

    def _place(self, token: int) -> int:
        if self._vocabulary.is_hidden(token, self._rules):
            return self._next
        content = self._vocabulary.bytes_of(token)
        if not _CONTINUES.match(content):
            self._next += len(self._characters.decode(b"", final=True))
        place = self._next
        self._next += len(self._characters.decode(content))
        return place


def prompt_places(vocabulary: Vocabulary, tokens: list[int], text: str) -> list[int]:
    """Where the tokens of a prompt begin in its text, which lacks the mark and the space that some tokenizers add."""
    shown = Rules(skip_special=False)
    added = int(vocabulary.is_structure(tokens[0]) and not text.startswith(chat_name(vocabulary, tokens[0])))
    rest = tokens[added:]
    has_space = bool(rest) and chat_name(vocabulary, rest[0]).startswith(" ") and not text.startswith(" ")
    places = TextPlaces(vocabulary, shown, start=-int(has_space)).of(rest)
    return [0] * added + [min(max(place, 0), len(text)) for place in places]
