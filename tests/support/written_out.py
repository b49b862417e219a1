"""Sums of token parity, written out in Python, and sequences of 31 tokens to form them on."""

from __future__ import annotations

import math
import random

from isthmus.parity.tokens import GoldenSequence


def sequences(count: int) -> list[GoldenSequence]:
    """Always the same: prompts of 1 to 9 tokens and completions of 1 to 12."""
    chance = random.Random(0)
    lengths = [(chance.randint(1, 9), chance.randint(1, 12)) for _ in range(count)]
    return [GoldenSequence(*(chance.choices(range(31), k=size) for size in pair)) for pair in lengths]


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = math.log(math.fsum(math.exp(x - top) for x in row)) + top
    return [x - total for x in row]
