"""Programs in answers, and the tests that they have to pass."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from isthmus.tasks import Problem

_BLOCK = re.compile(r"```[ \t]*[\w+#-]*[ \t]*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Case:
    """A program reads `stdin` and has to print `stdout`; without one it only has to end well, with `code` after it."""

    stdin: str = ""
    stdout: str | None = None
    code: str = ""


def program_in(answer: str) -> str | None:
    """The last block of code of an answer."""
    found = _BLOCK.findall(answer)
    return found[-1] if found else None


def tests_of(problem: Problem) -> list[Case]:
    """Tests from the data, in the forms that people have:

    `tests`: a list of objects with `input` and `output`; `test_code`, or `test`: statements that follow the program;
    or, as in verl, an answer that is JSON with `inputs` and `outputs`. None of them: an empty list.
    """
    given = problem.metadata
    if isinstance(given.get("tests"), list):
        return [Case(str(one.get("input", "")), str(one["output"])) for one in given["tests"]]
    for name in ("test_code", "test"):
        if isinstance(given.get(name), str):
            return [Case(code=given[name])]
    pairs = _object(problem.answer)
    if isinstance(pairs.get("inputs"), list) and isinstance(pairs.get("outputs"), list):
        return [Case(str(stdin), str(stdout)) for stdin, stdout in zip(pairs["inputs"], pairs["outputs"], strict=True)]
    return []


def prints_the_same(found: str, wanted: str) -> bool:
    """Line by line, without space at the ends of lines and of the text."""
    return _stripped(found) == _stripped(wanted)


def _stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().split("\n")]


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
