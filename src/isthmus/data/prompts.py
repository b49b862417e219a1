"""Prompts of the user, as token ids or as text: JSON Lines that `capture --prompts` and `convert --calibrate` read."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from isthmus.data.tokenizer import Tokenizer
from isthmus.errors import IsthmusError
from isthmus.lines import check_text, read_objects

FORM = '{"tokens": [1, 2, ...]} or {"prompt": "...", "completion": "..."}, where the completion may be left out'


class PromptFile:
    """A file with a sequence on each line: `tokens`, or a `prompt` that a `completion` may follow; never both.

    Further keys are left alone. Prompt and completion become tokens one after the other, as they do in generation, by
    the tokenizer of `folder`, which is loaded if there is a text; what it puts before a raw text stands before the
    prompt. Tokens are ids below `vocabulary`, if that is given.
    """

    def __init__(self, path: Path, folder: Path, vocabulary: int | None = None):
        self.path, self.folder, self.vocabulary = path, folder, vocabulary

    def sequences(self, most: int | None = None) -> list[list[int]]:
        """All sequences, or the first of them with `most` tokens in all, the last one cut; what follows is not read.

        Raises IsthmusError that names the file and the line of the first fault, or that there is no sequence.
        """
        found: list[list[int]] = []
        left = most
        for tokens in self._each():
            found.append(tokens[:left])
            if left is not None and (left := left - len(found[-1])) == 0:
                break
        if not found:
            raise IsthmusError(f"{self.path} is empty: a line is {FORM}")
        return found

    def _each(self) -> Iterator[list[int]]:
        for where, row in read_objects(self.path, "prompts"):
            try:
                tokens = self._tokens(row)
            except ValueError as error:
                raise IsthmusError(f"{where}: {error}") from None
            yield tokens

    def _tokens(self, row: dict[str, Any]) -> list[int]:
        texts = [key for key in ("prompt", "completion") if key in row]
        if "tokens" in row and texts:
            raise ValueError(f"`tokens` and `{texts[0]}` in one line: keep one, for both say what the sequence is")
        if "tokens" in row:
            tokens = _token_ids(row["tokens"])
        elif "prompt" in row:
            tokens = [token for key in texts for token in self._encode(key, row[key])]
        else:
            raise ValueError(f"a line must be {FORM}")
        if not tokens:
            raise ValueError("the sequence has no tokens")
        outside = [token for token in tokens if token < 0 or (self.vocabulary is not None and token >= self.vocabulary)]
        if outside:
            known = "" if self.vocabulary is None else f", which go from 0 to {self.vocabulary - 1}"
            raise ValueError(f"{outside[0]} is not among the tokens of the model{known}")
        return tokens

    def _encode(self, key: str, text: Any) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"`{key}` must be a text, not {text!r}")
        check_text(text)
        return self._tokenizer.encode_raw(text) if key == "prompt" else self._tokenizer.encode(text)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder)


def _token_ids(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise ValueError(f"`tokens` must be a list of integers, not {value!r}")
    wrong = [token for token in value if type(token) is not int]
    if wrong:
        raise ValueError(f"`tokens` must hold integers alone, and holds {wrong[0]!r}")
    return value
