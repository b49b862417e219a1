"""How often each kind of fault is met in the field, for each question that a qualification asks."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from importlib import resources
from types import MappingProxyType

from isthmus.lines import csv_rows


@functools.cache
def fault_weights() -> MappingProxyType[str, MappingProxyType[str, float]]:
    """For each aspect the share of each kind of fault in what was counted; the shares of an aspect sum to 1.

    The counts are published, the mapping from causes to kinds is an assumption: see `fault_weights.csv`.
    """
    text = (resources.files("isthmus.chips") / "fault_weights.csv").read_text(encoding="utf-8")
    counts: dict[str, dict[str, float]] = {}
    for row in csv_rows(text):
        counts.setdefault(row["aspect"], {})[row["kind"]] = float(row["weight"])
    return MappingProxyType(
        {
            aspect: MappingProxyType({kind: weight / sum(kinds.values()) for kind, weight in kinds.items()})
            for aspect, kinds in counts.items()
        }
    )


def looked_for(aspect: str, kinds: Iterable[str]) -> float:
    """The share of an aspect's expected faults that are of these kinds, from 0 to 1."""
    weights = fault_weights().get(aspect, {})
    return sum(weights.get(kind, 0.0) for kind in set(kinds))
