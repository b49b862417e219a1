"""The tables of a rehearsed chip: operators, dtypes and collectives, every row with its source and standing."""

from __future__ import annotations

import csv
import functools
from collections import Counter
from dataclasses import dataclass, field
from importlib import resources
from types import MappingProxyType
from typing import Literal

from isthmus.errors import IsthmusError

Status = Literal["native", "generic", "decomposes", "fallback", "none", "unknown"]
STATUSES: tuple[Status, ...] = ("native", "generic", "decomposes", "fallback", "none", "unknown")
MEANING: dict[Status, str] = {
    "native": "the chip's software has a kernel",
    "generic": "works through other kernels",
    "decomposes": "made of other operators",
    "fallback": "runs on the host's CPU, silently",
    "none": "not there: it fails",
    "unknown": "not in the table",
}


class RehearsalRefused(IsthmusError, NotImplementedError):
    """Code did what the rehearsed chip's tables do not allow. To torch's users a missing kernel is the latter."""


@dataclass(frozen=True)
class Operator:
    """One row of an operator table.

    `status` says whether there is a kernel: an upper bound, since dtypes are checked later, by the vendor's software.
    `documented_dtypes` are what the vendor tested: a lower bound. `cautions` are limits that the vendor documents.
    """

    name: str
    status: Status
    documented_dtypes: tuple[str, ...]
    cautions: tuple[str, ...]
    version: str
    standing: str
    source: str


@dataclass(frozen=True)
class DtypeRule:
    """A dtype that the chip refuses, or with which it is weak."""

    dtype: str
    action: Literal["refuse", "caution"]
    behaviour: str
    standing: str
    source: str


@dataclass(frozen=True)
class CollectiveRule:
    """What a chip's collective library does with a dtype, a reduction or a timeout; `*` stands for any."""

    kind: str
    collectives: tuple[str, ...]
    values: tuple[str, ...]
    action: Literal["allow", "differs", "refuse"]
    behaviour: str
    standing: str
    source: str

    def covers(self, collective: str, value: str | None) -> bool:
        return bool({collective, "*"} & set(self.collectives)) and bool({value, "*"} & set(self.values))


@dataclass(frozen=True)
class Profile:
    """The tables of one chip. `formats` names the operators that compute in a weight format."""

    chip: str
    version: str
    operators: MappingProxyType[str, Operator]
    dtypes: MappingProxyType[str, DtypeRule]
    collectives: tuple[CollectiveRule, ...]
    formats: MappingProxyType[str, tuple[str, ...]]

    def status(self, operator: str) -> Status:
        """How the chip's software runs an operator, named as in `aten::add.Tensor`."""
        row = self.operators.get(operator)
        return row.status if row else "unknown"

    def check_collective(self, collective: str, dtype: str, reduction: str | None = None) -> tuple[str, ...]:
        """In what a collective differs from the reference, in words. Raises RehearsalRefused if the chip refuses it."""
        asked = {"dtype": dtype, "reduction": reduction, "implementation": None}
        rules = [rule for rule in self.collectives if rule.kind in asked and rule.covers(collective, asked[rule.kind])]
        for rule in rules:
            if rule.action == "refuse":
                raise RehearsalRefused(
                    f"{collective} of {dtype}{f' with {reduction}' if reduction else ''} is refused on {self.chip}: "
                    f"{rule.behaviour} ({rule.standing}: {rule.source})"
                )
        return tuple(rule.behaviour for rule in rules if rule.action == "differs")

    def timeouts(self) -> tuple[str, ...]:
        """Timeouts of the collective library that differ from what training code expects."""
        return tuple(
            f"{', '.join(rule.values)}: {rule.behaviour}" for rule in self.collectives if rule.kind == "timeout"
        )


@dataclass
class Tally:
    """What ran in a rehearsal: calls by status, and the operators seen with their status."""

    calls: Counter[Status] = field(default_factory=Counter)
    operators: dict[str, Status] = field(default_factory=dict)

    def names(self, *statuses: Status) -> list[str]:
        """The operators seen that have one of these statuses, sorted."""
        return sorted(name for name, status in self.operators.items() if status in statuses)


def families() -> frozenset[str]:
    """The folders of tables that are here."""
    return frozenset(
        entry.name
        for entry in resources.files("isthmus.chips.rehearse").iterdir()
        if (entry / "operators.csv").is_file()
    )


@functools.cache
def load_profile(chip: str, family: str, generation: str | None) -> Profile:
    """The tables of `family`, cut to what holds for one generation of its chips."""
    sources = {row["key"]: row for row in _rows(family, "sources")}
    operators = {row["operator"]: _operator(row, generation, sources) for row in _rows(family, "operators")}
    dtypes = {
        row["dtype"]: DtypeRule(row["dtype"], _dtype_action(row), row["behaviour"], row["standing"], row["source"])
        for row in _rows(family, "dtypes")
        if _holds(row, generation)
    }
    collectives = [_collective(row) for row in _rows(family, "collectives") if _holds(row, generation)]
    formats = {row["format"]: tuple(row["operators"].split("|")) for row in _rows(family, "formats")}
    return Profile(
        chip=chip,
        version=", ".join(sorted({row.version for row in operators.values()})),
        operators=MappingProxyType(operators),
        dtypes=MappingProxyType(dtypes),
        collectives=tuple(collectives),
        formats=MappingProxyType(formats),
    )


def _operator(row: dict[str, str], generation: str | None, sources: dict[str, dict[str, str]]) -> Operator:
    cautions = [caution for caution in row["caution"].split("|") if caution and _concerns(caution, generation)]
    if generation in row["documented_absent_on"].split("|"):
        cautions.append(f"documented as absent on {generation}")
    cited = [sources[key] for key in row["source"].split("; ")]
    return Operator(
        name=row["operator"],
        status=_status(row["status"]),
        documented_dtypes=tuple(dtype for dtype in row["documented_dtypes"].split("|") if dtype),
        cautions=tuple(cautions),
        version=row["version"],
        standing=", ".join(source["standing"] for source in cited),
        source="; ".join(source["source"] for source in cited),
    )


def _holds(row: dict[str, str], generation: str | None) -> bool:
    """A rule without generations holds for all of the family."""
    return not row["generations"] or generation in row["generations"].split("|")


def _concerns(caution: str, generation: str | None) -> bool:
    prefix = "differs_on_"
    return not caution.startswith(prefix) or caution.removeprefix(prefix) == generation


def _collective(row: dict[str, str]) -> CollectiveRule:
    action = row["action"]
    assert action == "allow" or action == "differs" or action == "refuse", f"collectives.csv: {action!r}"
    names, values = tuple(row["collectives"].split("|")), tuple(row["values"].split("|"))
    return CollectiveRule(row["kind"], names, values, action, row["behaviour"], row["standing"], row["source"])


def _status(text: str) -> Status:
    assert text in MEANING, f"operators.csv: {text!r}"
    return text


def _dtype_action(row: dict[str, str]) -> Literal["refuse", "caution"]:
    action = row["action"]
    assert action == "refuse" or action == "caution", f"dtypes.csv: {action!r}"
    return action


def _rows(family: str, table: str) -> list[dict[str, str]]:
    text = (resources.files("isthmus.chips.rehearse") / family / f"{table}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
