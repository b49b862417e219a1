"""Text files as people and their editors write them: UTF-8, perhaps after a byte-order mark; a line ends at a newline.

`str.splitlines` also ends lines at U+0085, U+2028 and the like, which are part of the text in JSON, CSV and TOML.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError

_AGAIN = "write it again, or copy it again from where it came"


def read_text(path: Path, damaged: type[IsthmusError] = IsthmusError) -> str:
    """The text of a file without its byte-order mark. Raises OSError, and `damaged` for a folder or no UTF-8."""
    try:
        return read_bytes(path, damaged).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise damaged(f"{path} is not UTF-8 text: {error.reason}{encoding_hint(error.object)}") from None


def read_bytes(path: Path, damaged: type[IsthmusError] = IsthmusError) -> bytes:
    """The content of a file. Raises OSError, and `damaged` for a folder of its name."""
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise damaged(f"{path} is a folder and should be a file; {_AGAIN}") from None


def read_json(path: Path, damaged: type[IsthmusError] = IsthmusError) -> Any:
    """What a JSON file holds. Raises OSError, and `damaged` for what is no file, no JSON or too deeply nested."""
    try:
        return json.loads(read_text(path, damaged))
    except RecursionError:
        raise damaged(f"{path} is not valid JSON: nested too deeply; {_AGAIN}") from None
    except ValueError as error:
        raise damaged(f"{path} is not valid JSON: {error}; {_AGAIN}") from None


def read_json_object(path: Path, damaged: type[IsthmusError] = IsthmusError) -> dict[str, Any]:
    """The object that a JSON file holds. Raises OSError, and `damaged` for anything else."""
    content = read_json(path, damaged)
    if not isinstance(content, dict):
        raise damaged(f"{path} is not a JSON object but {type(content).__name__}; {_AGAIN}")
    return content


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


@contextlib.contextmanager
def explain_csv_errors(name: object) -> Iterator[None]:
    """Inside it a text that is no table raises an IsthmusError about `name`."""
    try:
        yield
    except csv.Error as error:
        raise IsthmusError(f"{name} is no table in CSV: {error}; {_AGAIN}") from None


def encoding_hint(begins: bytes) -> str:
    """What to add to "this is not UTF-8" of a file that begins so: nothing, or what it is and what to do."""
    if begins.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "; its first bytes are those of UTF-16: save it as UTF-8"
    return ""


def read_objects(path: Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file:line`, object) of each line that is not blank; `what` is in it, for the message about a missing file.

    Raises IsthmusError that names the line for what is not UTF-8 or not a JSON object.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise IsthmusError(f"no {what} file at {path}") from None
    except OSError as error:
        raise IsthmusError(f"the {what} file {path} cannot be read: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, start=1):
            content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not content.strip():
                continue
            try:
                row = parse_object(content)
            except ValueError as error:
                raise IsthmusError(f"{path}:{number}: {error}") from None
            yield f"{path}:{number}", row


def parse_object(line: bytes) -> dict[str, Any]:
    """The object of one line. Raises ValueError that says what is wrong with it."""
    try:
        row: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason}{encoding_hint(line)}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"a line must be an object, not {type(row).__name__}")
    return row


def check_text(text: str) -> None:
    """Raise ValueError for a text that no UTF-8 file could hold: JSON's escapes can write half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has half of a surrogate pair at character {error.start}") from None
