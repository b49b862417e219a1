"""Where in a text the answer stands, and whether two answers are the same."""

from __future__ import annotations

import re
from typing import Literal

from isthmus.tasks.parts.numbers import Number, read_number

Place = Literal["whole", "boxed", "tag", "hashes"]
"""All after the thinking; the last \\boxed{...}; the last <answer>...</answer>; after the last ####, as in GSM8K."""

BOXED = "\\boxed{"
_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)


def answer_in(text: str, place: Place) -> str | None:
    """The answer in what follows the thinking; None if there is none in that place."""
    if place == "boxed":
        return _last_boxed(text)
    if place == "tag":
        found = _TAG.findall(text)
        return found[-1].strip() or None if found else None
    if place == "hashes":
        return text.rpartition("####")[2].strip() or None if "####" in text else None
    return text.strip() or None


def is_same_answer(answer: str, expected: str) -> bool:
    """As numbers if both are numbers, else as texts without outer space."""
    wanted = expected.strip()
    return answer.strip() == wanted or _is_same_number(answer.strip(), wanted)


def _last_boxed(text: str) -> str | None:
    start = text.rfind(BOXED)
    if start < 0:
        return None
    depth = 1
    for index in range(start + len(BOXED), len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start + len(BOXED) : index].strip() or None
    return None


def _is_same_number(answer: str, expected: str) -> bool:
    """Where one number is expected, a comma that groups no thousands is a decimal comma, and not that of a list."""
    wanted = read_number(expected)
    given = None if wanted is None else read_number(answer, decimal_comma=True)
    return given is not None and wanted is not None and _equal(given, wanted)


def _equal(given: Number, wanted: Number) -> bool:
    currencies = {number.currency for number in (given, wanted)} - {""}
    return given.value == wanted.value and len(currencies) <= 1
