"""Accuracy: the answer equals the expected one, as a number if both are numbers, else as a text without outer space."""

from __future__ import annotations

from fractions import Fraction

from isthmus.data.tasks import Problem, split_completion
from isthmus.rewards import Reward


def score(problem: Problem, completion: str) -> Reward:
    _, answer = split_completion(completion)
    if not answer:
        return Reward(accuracy=0.0, format=0.0)
    given, expected = _number(answer), _number(problem.answer)
    if given is not None and expected is not None:
        return Reward(accuracy=float(given == expected), format=1.0)
    return Reward(accuracy=float(answer == problem.answer.strip()), format=1.0)


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text.strip().replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None
