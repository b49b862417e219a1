"""Accuracy: the answer equals the expected one, as a number if both are numbers, else as a text without outer space."""

from __future__ import annotations

from isthmus.data.tasks import Problem, split_completion
from isthmus.rewards import Reward
from isthmus.rewards.parts.numbers import Number, read_number


def score(problem: Problem, completion: str) -> Reward:
    _, answer = split_completion(completion)
    if not answer:
        return Reward(accuracy=0.0, format=0.0)
    expected = problem.answer.strip()
    return Reward(accuracy=float(answer == expected or _is_same_number(answer, expected)), format=1.0)


def _is_same_number(answer: str, expected: str) -> bool:
    """Where one number is expected, a comma that groups no thousands is a decimal comma, and not that of a list."""
    wanted = read_number(expected)
    given = None if wanted is None else read_number(answer, decimal_comma=True)
    return given is not None and wanted is not None and _equal(given, wanted)


def _equal(given: Number, wanted: Number) -> bool:
    currencies = {number.currency for number in (given, wanted)} - {""}
    return given.value == wanted.value and len(currencies) <= 1
