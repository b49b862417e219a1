"""The fused operators of a rehearsed chip: which need of a model each serves, its rules on shapes, its repeatability.

Every row has a source and a standing. A family without these tables has none of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from isthmus.chips._registry import get_chip, vendor_of
from isthmus.lines import csv_rows

COMPARISONS = {
    "<=": lambda value, other: value <= other,
    ">=": lambda value, other: value >= other,
    "<": lambda value, other: value < other,
    ">": lambda value, other: value > other,
    "==": lambda value, other: value == other,
    "multiple_of": lambda value, other: other > 0 and value % other == 0,
    "divides": lambda value, other: value > 0 and other % value == 0,
}
ONE_OF = "one_of"


@dataclass(frozen=True)
class FusedOperator:
    """An operator that does for a need of a model what else takes many. `use`: training, serving or both.

    `sites` are the kinds of operation whose place it can take (probes/static/sites.py). `backward` says whether the
    vendor's software registers a gradient for it; None where it needs none. `documented_for` is the use that the
    vendor's documentation names, or empty.
    """

    need: str
    use: str
    operator: str
    sites: tuple[str, ...]
    backward: bool | None
    documented_for: str
    standing: str
    source: str

    @property
    def trains(self) -> bool:
        """Whether a training step can use it: it has its gradient, and is not documented for serving alone."""
        return self.backward is not False and self.documented_for != "serving" and self.use != "serving"

    def serves(self, use: str) -> bool:
        return self.trains if use == "training" else self.use != "training" and self.documented_for != "training"


@dataclass(frozen=True)
class ShapeRule:
    """A documented rule on a size: `quantity` of an operation of a model against `rule`.

    It is about operations of the kinds `sites`, and of these about those that keep to the condition `where`, if there
    is one. A rule is a comparison and what it compares with, a number or another quantity of the same operation:
    `<= 768`, `multiple_of groups`, `one_of 1 2 4`. A condition is a quantity and a rule: `latent_dim == 512`.
    """

    operator: str
    use: str
    sites: tuple[str, ...]
    where: str
    argument: str
    quantity: str
    rule: str
    note: str
    standing: str
    source: str

    def is_about(self, kind: str, use: str) -> bool:
        """Whether it speaks of operations of this kind in this use."""
        return kind in self.sites and self.use in (use, "both")

    def holds(self, sizes: Mapping[str, float]) -> bool | None:
        """Whether an operation with these sizes keeps to it; None if it is not about such an operation."""
        if self.where:
            quantity, _, condition = self.where.partition(" ")
            if not compare(sizes[quantity], condition, sizes):
                return None
        return compare(sizes[self.quantity], self.rule, sizes)


def compare(value: float, rule: str, sizes: Mapping[str, float]) -> bool:
    """Whether a size keeps to a rule, which may name another of `sizes`."""
    comparison, _, rest = rule.partition(" ")
    if comparison == ONE_OF:
        return value in [float(word) for word in rest.split()]
    return COMPARISONS[comparison](value, sizes[rest] if rest[0].isalpha() else float(rest))


@dataclass(frozen=True)
class Unrepeatable:
    """An operator that does not give the same bits each time unless a switch is set; `named_as` in its source."""

    operator: str
    named_as: str
    standing: str
    source: str


@dataclass(frozen=True)
class FusedTables:
    """What is known of a chip's fused operators. Without tables all three are empty."""

    operators: tuple[FusedOperator, ...] = ()
    rules: tuple[ShapeRule, ...] = ()
    unrepeatable: tuple[Unrepeatable, ...] = ()


def fused_tables_of(chip: str) -> FusedTables:
    """The tables of a chip's family, cut to its generation."""
    family = vendor_of(chip).rehearsal
    return FusedTables() if family is None else _load(family, get_chip(chip).generation)


@functools.cache
def _load(family: str, generation: str | None) -> FusedTables:
    operators = [_operator(row) for row in _rows(family, "fused") if _holds(row, generation)]
    rules = [_rule(row) for row in _rows(family, "shape_rules") if _holds(row, generation)]
    return FusedTables(
        tuple(operators), tuple(rules), tuple(Unrepeatable(**row) for row in _rows(family, "nondeterministic"))
    )


def _operator(row: dict[str, str]) -> FusedOperator:
    backward = {"yes": True, "no": False, "not needed": None}[row["trainable"]]
    rest = {name: row[name] for name in ("need", "use", "operator", "documented_for", "standing", "source")}
    return FusedOperator(backward=backward, sites=tuple(row["sites"].split("|")), **rest)


def _rule(row: dict[str, str]) -> ShapeRule:
    for rule in filter(None, (row["rule"], row["where"].partition(" ")[2])):
        comparison, _, rest = rule.partition(" ")
        assert rest and (comparison in COMPARISONS or comparison == ONE_OF), f"shape_rules.csv: {rule!r}"
    rest = {name: value for name, value in row.items() if name not in ("generations", "sites")}
    return ShapeRule(sites=tuple(row["sites"].split("|")), **rest)


def _holds(row: dict[str, str], generation: str | None) -> bool:
    return not row["generations"] or generation in row["generations"].split("|")


def _rows(family: str, table: str) -> list[dict[str, str]]:
    file = resources.files("isthmus.chips.rehearse") / family / f"{table}.csv"
    return csv_rows(file.read_text(encoding="utf-8")) if file.is_file() else []
