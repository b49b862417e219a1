"""Conditions on a chip's numbers, such as `tpp >= 1600 and pd >= 5.92`, where some numbers are unknown.

True, False, or None where what is known does not tell (Kleene's three values): unknown is never taken for either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from isthmus.rules.numbers import Amount

_COMPARISON = re.compile(r"(\w+) (<=|>=|<|>) ([\d.]+)")


def any_holds(alternatives: Sequence[str], amounts: Mapping[str, Amount]) -> bool | None:
    """Whether one of the alternatives holds; of none at all, that nothing is asked."""
    return either(chain_holds(one, amounts) for one in alternatives) if alternatives else True


def chain_holds(chain: str, amounts: Mapping[str, Amount]) -> bool | None:
    """Whether all comparisons of a chain hold. Raises ValueError for what is no comparison of a known number."""
    return every(_compare(one, amounts) for one in chain.split(" and "))


def every(values: Iterable[bool | None]) -> bool | None:
    """False if one is, else None if one is, else True."""
    seen = list(values)
    return False if False in seen else None if None in seen else True


def either(values: Iterable[bool | None]) -> bool | None:
    """True if one is, else None if one is, else False."""
    seen = list(values)
    return True if True in seen else None if None in seen else False


def _compare(comparison: str, amounts: Mapping[str, Amount]) -> bool | None:
    match = _COMPARISON.fullmatch(comparison)
    if match is None or match[1] not in amounts:
        raise ValueError(f"{comparison!r} compares no number that is known here: {', '.join(amounts)}")
    return amounts[match[1]].compare(match[2], float(match[3]))
