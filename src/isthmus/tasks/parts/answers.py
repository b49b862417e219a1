"""Whether two answers are the same."""

from __future__ import annotations

from isthmus.tasks.parts.numbers import Number, read_number


def is_same_answer(answer: str, expected: str) -> bool:
    """As numbers if both are numbers, else as texts without outer space."""
    wanted = expected.strip()
    return answer.strip() == wanted or _is_same_number(answer.strip(), wanted)


def _is_same_number(answer: str, expected: str) -> bool:
    """Where one number is expected, a comma that groups no thousands is a decimal comma, and not that of a list."""
    wanted = read_number(expected)
    given = None if wanted is None else read_number(answer, decimal_comma=True)
    return given is not None and wanted is not None and _equal(given, wanted)


def _equal(given: Number, wanted: Number) -> bool:
    currencies = {number.currency for number in (given, wanted)} - {""}
    return given.value == wanted.value and len(currencies) <= 1
