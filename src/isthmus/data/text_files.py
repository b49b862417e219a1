"""Text files read in pieces, in bounded memory: *.txt is one document, *.jsonl has one on each line under "text"."""

from __future__ import annotations

import codecs
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from isthmus.errors import IsthmusError
from isthmus.lines import check_text, encoding_hint, parse_object

BLOCK_BYTES = 2**20
LONGEST_TEXT = 2**20
"""Characters that a tokenizer is given at once, about."""


@dataclass(frozen=True, slots=True)
class TextPiece:
    """The lines of a file that begin in its bytes [start, end). `size` and `mtime_ns` are of the whole file."""

    path: Path
    name: str
    start: int
    end: int
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Text:
    """A document, or a part of one: whether it begins and ends here, and its text in blocks."""

    begins: bool
    ends: bool
    blocks: Iterable[str]


def text_pieces(path: Path, folder: Path, most_bytes: int) -> list[TextPiece]:
    """A file cut into equal pieces of at most `most_bytes`; an empty file has none."""
    status = path.stat()
    count = math.ceil(status.st_size / most_bytes)
    ends = [status.st_size * number // count for number in range(count + 1)] if count else []
    name = path.relative_to(folder).as_posix()
    return [
        TextPiece(path, name, start, end, status.st_size, status.st_mtime_ns) for start, end in itertools.pairwise(ends)
    ]


def texts_of(piece: TextPiece) -> Iterator[Text]:
    """The documents of a piece, or its part of one.

    Raises IsthmusError that names file and line for what is not UTF-8 or not an object with a text, and for a file that
    is no longer the one that was listed.
    """
    _check_unchanged(piece)
    with piece.path.open("rb") as file:
        start, end = _line_start(file, piece.start), _line_start(file, piece.end)
        file.seek(start)
        if piece.path.suffix == ".jsonl":
            yield from (Text(True, True, [text]) for text in _json_texts(file, end, piece) if text)
        elif end > start:
            blocks = _decoded(file, end, piece)
            yield Text(start == 0, end == piece.size, blocks)
    _check_unchanged(piece)


def cut_text(blocks: Iterable[str]) -> Iterator[str]:
    """The text of the blocks in parts of about LONGEST_TEXT characters, none empty.

    A part ends before a line break that follows a letter or a digit, where the pre-tokenizers in use begin a new word,
    so that the tokens are those of the whole text; only a text without such a place is cut elsewhere.
    """
    held = ""
    for block in blocks:
        held += block
        while len(held) > LONGEST_TEXT:
            cut = _word_end(held)
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _word_end(text: str) -> int:
    cut = text.rfind("\n", 1, LONGEST_TEXT)
    while cut > 0 and not text[cut - 1].isalnum():
        cut = text.rfind("\n", 1, cut)
    return cut if cut > 0 else LONGEST_TEXT


def _check_unchanged(piece: TextPiece) -> None:
    try:
        status = piece.path.stat()
    except FileNotFoundError:
        raise IsthmusError(f"{piece.path} is gone; training data must stay in place while a run uses it") from None
    if (status.st_size, status.st_mtime_ns) != (piece.size, piece.mtime_ns):
        raise IsthmusError(
            f"{piece.path} was changed after this run listed it. Run the same command again once it is written."
        )


def _line_start(file: IO[bytes], position: int) -> int:
    """Where the first line begins at or after a position."""
    if position == 0:
        return 0
    file.seek(position - 1)
    while (read := file.readline(BLOCK_BYTES)) and not read.endswith(b"\n"):
        pass
    return file.tell()


def _decoded(file: IO[bytes], end: int, piece: TextPiece) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig" if file.tell() == 0 else "utf-8")()
    try:
        while (left := end - file.tell()) > 0:
            yield decoder.decode(file.read(min(left, BLOCK_BYTES)), final=left <= BLOCK_BYTES)
    except UnicodeDecodeError as error:
        raise IsthmusError(
            f"{_undecodable_line(piece.path)}: not UTF-8 text: {error.reason}{_hint(piece.path)}"
        ) from None


def _hint(path: Path) -> str:
    with path.open("rb") as file:
        return encoding_hint(file.read(2))


def _undecodable_line(path: Path) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"{path}:{number}"
    return str(path)


def _json_texts(file: IO[bytes], end: int, piece: TextPiece) -> Iterator[str]:
    while (position := file.tell()) < end:
        line = file.readline()
        content = line.removeprefix(codecs.BOM_UTF8) if position == 0 else line
        if not content.strip():
            continue
        try:
            text = _text_in(content)
        except ValueError as error:
            raise IsthmusError(f"{piece.path}:{_line_number(piece.path, position)}: {error}") from None
        yield text


def _text_in(line: bytes) -> str:
    """The text of a line; raises ValueError that says what is wrong with it."""
    row = parse_object(line)
    text = row.get("text")
    if not isinstance(text, str):
        found = ", ".join(map(repr, sorted(row))) or "none"
        raise ValueError(f'the key "text" must hold the document, a text; the keys here are {found}')
    check_text(text)
    return text


def _line_number(path: Path, position: int) -> int:
    """Number, from 1, of the line that begins at a position."""
    number = 1
    with path.open("rb") as file:
        while position > 0 and (block := file.read(min(position, BLOCK_BYTES))):
            number += block.count(b"\n")
            position -= len(block)
    return number
