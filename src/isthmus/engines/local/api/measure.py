"""How much there is in a text that should be JSON, found without parsing it.

A reader of JSON holds the interpreter while it reads, and most of all while it makes lists and objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_KEYS, MAX_VALUES, MAX_CONTAINERS, MAX_NESTING = 20_000, 1_000_000, 40_000, 128
SCANNED_AT_ONCE = 1 << 18
_LEVELS = np.zeros(256, dtype=np.int8)
_LEVELS[[ord("{"), ord("[")]], _LEVELS[[ord("}"), ord("]")]] = 1, -1


class TooLarge(ValueError):
    """There is more in a text than its readers take; the message says of what."""


@dataclass(frozen=True)
class Measure:
    """How much there is in a text that should be JSON. `containers` are lists and objects."""

    keys: int
    values: int
    containers: int
    depth: int


def check_measure(body: bytes) -> None:
    """Raises TooLarge for a text that is not worth parsing."""
    if _is_small(body):
        return
    found = measure(body)
    for count, most, what in (
        (found.depth, MAX_NESTING, "levels of nesting"),
        (found.keys, MAX_KEYS, "keys"),
        (found.values, MAX_VALUES, "values"),
        (found.containers, MAX_CONTAINERS, "lists and objects"),
    ):
        if count > most:
            raise TooLarge(f"more than {most:,} {what}")


def measure(body: bytes) -> Measure:
    """Keys, values, lists and objects, and depth of a text that should be JSON, without parsing it."""
    keys, values, containers, depth, deepest = 0, 0, 0, 0, 0
    for outside in _outside_of_texts(np.frombuffer(body, dtype=np.uint8)):
        levels = np.take(_LEVELS, outside)
        opened = int(np.count_nonzero(levels == 1))
        keys += int(np.count_nonzero(outside == ord(":")))
        values += int(np.count_nonzero(outside == ord(","))) + opened
        containers += opened
        if levels.any():
            reached = np.cumsum(levels, dtype=np.int32)
            deepest, depth = max(deepest, depth + int(reached.max())), depth + int(reached[-1])
    return Measure(keys, values, containers, deepest)


def _is_small(body: bytes) -> bool:
    """Whether it is within all limits, whatever of it stands in texts."""
    opened = body.count(b"[") + body.count(b"{")
    return opened <= MAX_NESTING and body.count(b":") <= MAX_KEYS and body.count(b",") + opened <= MAX_VALUES


def _outside_of_texts(content: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """What stands in no text, piece by piece."""
    inside, escaping = False, False
    for start in range(0, len(content), SCANNED_AT_ONCE):
        block = content[start : start + SCANNED_AT_ONCE]
        marks = block == ord('"')
        marks[0] &= not escaping
        backslashes = np.flatnonzero(block == ord("\\"))
        escaped, escaping = _escaped(backslashes, len(block), escaping)
        marks[escaped] = False
        quotes = np.bitwise_xor.accumulate(marks) ^ inside
        inside = bool(quotes[-1])
        yield block[~quotes]


def _escaped(backslashes: NDArray[np.intp], length: int, escaped_before: bool) -> tuple[NDArray[np.intp], bool]:
    """The places that backslashes escape, in a row of them each second one does, and whether the last one escapes what
    is beyond `length`. `escaped_before`: the first place is escaped itself."""
    if escaped_before and len(backslashes) and backslashes[0] == 0:
        backslashes = backslashes[1:]
    if not len(backslashes):
        return backslashes, False
    first = np.diff(backslashes, prepend=-2) != 1
    begins = np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))
    odd = (np.arange(len(first)) - begins) % 2 == 0
    following = backslashes[odd] + 1
    return following[following < length], bool(following[-1] == length)
