"""Limits of a healthy training run, as tools of the field use them: each with its source."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

from isthmus.lines import csv_rows


@dataclass(frozen=True)
class StabilityRule:
    """A limit. `unit` says of what it is a multiple."""

    name: str
    value: float
    unit: str
    source: str


def stability_rule(name: str) -> StabilityRule:
    """One rule: straggler, straggler-in-soak, gradient-spike or loss-difference. Raises KeyError for another name."""
    return _rules()[name]


@functools.cache
def _rules() -> dict[str, StabilityRule]:
    text = resources.files("isthmus.chips").joinpath("stability_rules.csv").read_text(encoding="utf-8")
    rows = csv_rows(text)
    return {row["rule"]: StabilityRule(row["rule"], float(row["value"]), row["unit"], row["source"]) for row in rows}
