"""Whether two mathematical answers are equal, by math-verify; it may hang, and is called in a worker process."""

from __future__ import annotations

from typing import Any

from math_verify import parse, verify

UNLIMITED = 0
"""math-verify's own deadline, by signals, is off: the caller has one."""
LONGEST_BARE = 200
"""Characters of an answer that may be LaTeX without the signs around it."""


def is_equal(expected: str, answer: str) -> bool | None:
    """None if the expected answer cannot be read, so that nothing can be judged by it."""
    wanted = _parsed(expected) or parse(expected, parsing_timeout=UNLIMITED)
    if not wanted:
        return None
    readings = [parse(answer, parsing_timeout=UNLIMITED), _parsed(answer)]
    return any(verify(wanted, given, timeout_seconds=None, raise_on_error=True) for given in readings if given)


def _parsed(text: str) -> list[Any]:
    """What is read of LaTeX without the signs around it, which math-verify needs."""
    bare = len(text) <= LONGEST_BARE and not any(mark in text for mark in ("$", "\\boxed", "\n"))
    return parse(f"${text}$", parsing_timeout=UNLIMITED) if bare else []
