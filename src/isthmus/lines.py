"""Text files as people and their editors write them: UTF-8, perhaps after a byte-order mark; a line ends at a newline.

`str.splitlines` also ends lines at U+0085, U+2028 and the like, which are part of the text in JSON, CSV and TOML.
"""

from __future__ import annotations

import codecs
import csv
import io
from pathlib import Path

from isthmus.errors import IsthmusError


def read_text(path: Path) -> str:
    """The text of a file without its byte-order mark. Raises OSError, and IsthmusError for what is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise IsthmusError(f"{path} is not UTF-8 text: {error.reason}{encoding_hint(error.object)}") from None


def lines_of(text: str) -> list[str]:
    """The lines of a text without their ends, which are newlines alone."""
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]


def csv_lines(text: str) -> io.StringIO:
    """A text for csv.reader and csv.DictReader, whose `line_num` then counts newlines alone."""
    return io.StringIO(text, newline="\n")


def csv_rows(text: str) -> list[dict[str, str]]:
    """The rows of a table whose first line names the columns."""
    return list(csv.DictReader(csv_lines(text)))


def encoding_hint(begins: bytes) -> str:
    """What to add to "this is not UTF-8" of a file that begins so: nothing, or what it is and what to do."""
    if begins.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "; its first bytes are those of UTF-16: save it as UTF-8"
    return ""
