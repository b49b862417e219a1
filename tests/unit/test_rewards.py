"""Rewards that judge answers: numbers as people write them, against exact fractions, and how long a judgement takes."""

from __future__ import annotations

import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.tasks import Problem, completion_text, countdown, jsonl
from isthmus.tasks.parts.numbers import read_number

EXACT, COUNTDOWN = jsonl.JsonlTask([], []), countdown.open(countdown.Options())
DEADLINE_S = 0.25
"""Far above what a judgement takes, and far below what is noticed in a step of training."""


def accuracy(answer: str, expected: str) -> float:
    return EXACT.accuracy(Problem("x", "x", expected), completion_text("", answer))


def test_the_program_in_the_documents_runs():
    page = (Path(__file__).parents[2] / "docs" / "adding-a-task.md").read_text(encoding="utf-8")
    [program] = re.findall(r"```python\n(from isthmus\.tasks import .*?)```", page, re.DOTALL)
    exec(program, {})


@given(whole=st.integers(0, 10**15), part=st.integers(0, 999), places=st.integers(0, 3), minus=st.booleans())
def test_ways_of_writing_a_number_are_that_number(whole: int, part: int, places: int, minus: bool):
    digits = str(part).zfill(places)[:places]
    value = Fraction(f"{whole}.{digits}" if digits else str(whole)) * (-1 if minus else 1)
    tail = f".{digits}" if digits else ""
    for group in ("", ",", " ", "\u00a0", "\u202f", "'", "\u2019"):
        text = f"{whole:,}".replace(",", group) + tail
        for sign in ("-", "\u2212", "- ") if minus else ("", "+"):
            found = read_number(sign + text)
            assert found is not None and Fraction(found.value) == value, sign + text
    percent = read_number(("-" if minus else "") + f"{whole}{tail}%")
    assert percent is not None and Fraction(percent.value) == value / 100


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("0.5", "0.50", True),
        ("1/2", "0.50", True),
        ("half", "0.5", False),
        ("1,000", "1000", True),
        ("1000", "1,000", True),
        ("12,34,567", "1234567", True),
        ("1,2,3", "123", False),
        ("1,2", "12", False),
        ("1,2", "1.2", True),
        ("1.2", "1,2", False),
        ("1_2", "12", False),
        ("1 2", "12", False),
        ("1,23,4", "1234", False),
        ("1234,567", "1234567", False),
        ("0,1", "01", False),
        ("3,5,7", "357", False),
        ("3,5,7", "3,5,7", True),
        ("58,500", "58500", True),
        ("12.", "12", True),
        ("\u221212", "-12", True),
        ("$1,234.50", "1234.5", True),
        ("$5", "\u20ac5", False),
        ("5 \u20ac", "\u20ac5", True),
        ("50%", "0.5", True),
        ("50%", "50", False),
        ("1 1/2", "1.5", True),
        ("\u00bd", "0.5", True),
        ("2\u00b2", "22", False),
        ("1/3", "0.333", False),
        ("1.5\u00d710^3", "1500", True),
        ("1e3", "1000", True),
        ("1/0", "0", False),
        ("\uff11\uff12", "12", True),
        ("nan", "0", False),
        ("1" + "0" * 200, "1" + "0" * 200, True),
    ],
)
def test_numbers_are_read_as_people_write_them(answer: str, expected: str, right: bool):
    assert accuracy(answer, expected) == float(right)


@pytest.mark.parametrize(
    "answer",
    [
        "1e10000000",
        "1e999999999",
        "-1e-999999999",
        "1e99999999999999999999",
        "1.5\u00d710^999999999",
        "9" * 10**6,
        "1/" + "3" * 10**6,
        "1," * 10**6,
        "1,000" * 10**5,
        "1'000" * 25,
        "((" * 10**5,
        "9**9**9**9**9",
        "9*" * 31 + "9",
        "\\boxed{\\dfrac{5^{\\left(5^{\\left(5^{\\left(5^5\\right)}\\right)} - 4\\right)} - 5}{16}}",
        " " * 10**6 + "1",
        "\u00bd" * 10**5,
    ],
    ids=lambda answer: answer[:16].strip(),
)
@pytest.mark.parametrize("expected", ["12", "1e999999998", "1/3", "50%"])
def test_no_answer_takes_longer_than_a_deadline(answer: str, expected: str):
    began = time.thread_time()
    completion = completion_text("", answer)
    EXACT.accuracy(Problem("x", "x", expected), completion)
    COUNTDOWN.accuracy(Problem("x", "x", "(3*7)+1", (1, 3, 7, 22)), completion)
    assert time.thread_time() - began < DEADLINE_S
