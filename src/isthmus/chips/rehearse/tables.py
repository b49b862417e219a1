"""The tables of a rehearsed chip: operators, dtypes, collectives, links, failure rates and numerics.

Every row has its source and standing. A family may extend another: then it holds what differs, and rows that it takes
over cite both.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from types import MappingProxyType
from typing import Literal, TypeGuard, get_args

from isthmus.chips._registry import get_chip
from isthmus.errors import IsthmusError
from isthmus.lines import csv_rows
from isthmus.run import Figure

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


DtypeAction = Literal["refuse", "substitute", "caution"]


@dataclass(frozen=True)
class DtypeRule:
    """A dtype that the chip refuses, replaces silently by another (`stands_in`), or with which it is weak.

    `warning` is what the vendor's software prints, once, when it replaces one.
    """

    dtype: str
    action: DtypeAction
    behaviour: str
    standing: str
    source: str
    stands_in: str | None = None
    warning: str = ""


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


Scope = Literal["within chip", "within node", "between nodes"]


@dataclass(frozen=True)
class Link:
    """What was published about a link: GB/s (10^9 bytes) and microseconds, None where that was not published.

    `op` is what was timed, as its source names it, or `line rate`, which is declared and not timed. `ranks` is how many
    took part. The bandwidth is per rank, one direction, by the definition of its source, which `conditions` may name.
    """

    fabric: str
    scope: Scope
    op: str
    ranks: int | None
    bandwidth_gbs: float | None
    latency_us: float | None
    conditions: str
    standing: str
    source: str


@dataclass(frozen=True)
class Rate:
    """A published failure rate of a chip, per chip and hour of use; `cause` is `all` or one of the source's causes."""

    cause: str
    per_chip_hour: float
    conditions: str
    standing: str
    source: str


NumericKind = Literal[
    "fallback_warning",
    "fallback_switch",
    "uninitialised",
    "non_deterministic",
    "argument",
    "argument_caution",
    "rounding",
    "accumulation",
    "integers",
    "wrong_not_error",
    "order",
    "generator",
    "launch",
]
NUMERIC_KINDS: tuple[NumericKind, ...] = get_args(NumericKind)


@dataclass(frozen=True)
class Numeric:
    """A way in which results differ from the reference. `operators` are named without overload, as in `aten::mm`.

    `value` depends on the kind: for `argument` it is `name:asked>given`, for `fallback_switch` an environment variable.
    """

    kind: NumericKind
    operators: tuple[str, ...]
    value: str
    behaviour: str
    standing: str
    source: str


@dataclass(frozen=True)
class Profile:
    """The tables of one chip. `formats` names the operators that compute in a weight format.

    `rates` is empty where nobody published one: an unknown rate is None, never another chip's.
    """

    chip: str
    version: str
    operators: MappingProxyType[str, Operator]
    dtypes: MappingProxyType[str, DtypeRule]
    collectives: tuple[CollectiveRule, ...]
    formats: MappingProxyType[str, tuple[str, ...]]
    links: tuple[Link, ...] = ()
    rates: tuple[Rate, ...] = ()
    numerics: tuple[Numeric, ...] = ()

    def link(self, scope: Scope, op: str = "line rate", ranks: int | None = None) -> Link | None:
        """The first row about a scope and an operation, of so many ranks if `ranks` is given; None if there is none."""
        rows = (row for row in self.links if row.scope == scope and row.op == op)
        return next((row for row in rows if ranks is None or row.ranks == ranks), None)

    def latency_us(self, scope: Scope) -> float | None:
        """The smallest latency that was published for a scope, in microseconds."""
        return min((row.latency_us for row in self.links if row.scope == scope and row.latency_us), default=None)

    def rate(self, cause: str = "all") -> Rate | None:
        """The published failure rate by cause. None: nobody published one for this chip."""
        return next((row for row in self.rates if row.cause == cause), None)

    def numeric(self, kind: NumericKind, operator: str | None = None) -> Numeric | None:
        """The first row of a kind, about one operator if it is named (as in `aten::add.Tensor`)."""
        name = operator.partition(".")[0] if operator else None
        rows = (row for row in self.numerics if row.kind == kind)
        return next((row for row in rows if name is None or name in row.operators), None)

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


@dataclass(frozen=True)
class Emulation:
    """What a rehearsal does silently, as the chip would, instead of refusing it.

    `substitute`: a dtype or argument is replaced by what the chip computes with. `fill`: memory that is not initialised
    holds NaN, or the largest integer. `noise`: the result of an operator that is not deterministic by default varies
    by the size of another order of accumulation, drawn from `seed`, unless deterministic algorithms are asked for.
    """

    substitute: bool = True
    fill: bool = True
    noise: bool = False
    seed: int = 0


@dataclass
class Tally:
    """What ran in a rehearsal: calls by status and by operator, and the operators seen with their status.

    `substitutions`, `filled`, `varied` and `untested` count calls that were emulated, or that used a dtype which the
    vendor does not list as tested; `host` counts calls that concerned the host alone. `collectives` counts those of
    torch.distributed by name, where a rehearsal looks at a whole program.
    """

    calls: Counter[Status] = field(default_factory=Counter)
    operators: dict[str, Status] = field(default_factory=dict)
    by_operator: Counter[str] = field(default_factory=Counter)
    substitutions: Counter[str] = field(default_factory=Counter)
    filled: Counter[str] = field(default_factory=Counter)
    varied: Counter[str] = field(default_factory=Counter)
    untested: Counter[str] = field(default_factory=Counter)
    cautions: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    host: int = 0

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
    holds = functools.partial(_holds, generation=generation)
    operators = {}
    for folder, taken_over in _lineage(family):
        sources = {row["key"]: row for row in _rows(folder, "sources")}
        for row in filter(holds, _rows(folder, "operators")):
            operators[row["operator"]] = _operator(row, generation, sources, taken_over)
    dtypes = {row["dtype"]: _dtype_rule(row) for row in filter(holds, _inherited(family, "dtypes"))}
    formats = {row["format"]: tuple(row["operators"].split("|")) for row in _inherited(family, "formats")}
    return Profile(
        chip=chip,
        version=", ".join(sorted({row.version for row in operators.values()})),
        operators=MappingProxyType(operators),
        dtypes=MappingProxyType(dtypes),
        collectives=tuple(map(_collective, filter(holds, _inherited(family, "collectives")))),
        formats=MappingProxyType(formats),
        links=(*_line_rates(chip), *(_link(row) for row in _of_chip(_inherited(family, "links"), chip))),
        rates=tuple(_rate(row) for row in _of_chip(_inherited(family, "rates"), chip)),
        numerics=tuple(map(_numeric, filter(holds, _inherited(family, "numerics")))),
    )


def _lineage(family: str) -> list[tuple[str, dict[str, str] | None]]:
    """The folders whose tables hold for a family, the most general first, with what says so of those it extends."""
    base = next(iter(_rows(family, "extends")), None)
    return [(base["family"], base), (family, None)] if base else [(family, None)]


def _inherited(family: str, table: str) -> list[dict[str, str]]:
    """Rows of a table, those of the extended family first."""
    rows = []
    for folder, taken_over in _lineage(family):
        for row in _rows(folder, table):
            rows.append({**row, **_cited(row, taken_over)} if taken_over else row)
    return rows


def _cited(row: dict[str, str], taken_over: dict[str, str]) -> dict[str, str]:
    return {
        "standing": f"{row['standing']}, {taken_over['standing']}",
        "source": f"{row['source']}; {taken_over['source']}",
    }


def _operator(
    row: dict[str, str],
    generation: str | None,
    sources: Mapping[str, dict[str, str]],
    taken_over: dict[str, str] | None,
) -> Operator:
    cautions = [caution for caution in row["caution"].split("|") if caution and _concerns(caution, generation)]
    if generation in row["documented_absent_on"].split("|"):
        cautions.append(f"documented as absent on {generation}")
    keys = row["source"].split("; ")
    cited = [sources[key] for key in keys] + ([taken_over] if taken_over else [])
    return Operator(
        name=row["operator"],
        status=_status(row["status"]),
        documented_dtypes=tuple(dtype for dtype in row["documented_dtypes"].split("|") if dtype),
        cautions=tuple(cautions),
        version=row.get("version") or sources[keys[0]]["version"],
        standing=", ".join(source["standing"] for source in cited),
        source="; ".join(source["source"] for source in cited),
    )


def _holds(row: dict[str, str], generation: str | None) -> bool:
    """A rule without generations holds for all of the family."""
    return not row.get("generations") or generation in row["generations"].split("|")


def _of_chip(rows: list[dict[str, str]], chip: str) -> list[dict[str, str]]:
    return [row for row in rows if chip in row["chips"].split("|")]


def _concerns(caution: str, generation: str | None) -> bool:
    prefix = "differs_on_"
    return not caution.startswith(prefix) or caution.removeprefix(prefix) == generation


def _dtype_rule(row: dict[str, str]) -> DtypeRule:
    action = row["action"]
    assert action == "refuse" or action == "substitute" or action == "caution", f"dtypes.csv: {action!r}"
    assert (action == "substitute") == bool(row["stands_in"]), f"dtypes.csv: {row}"
    return DtypeRule(
        dtype=row["dtype"],
        action=action,
        behaviour=row["behaviour"],
        standing=row["standing"],
        source=row["source"],
        stands_in=row["stands_in"] or None,
        warning=row["warning"],
    )


def _collective(row: dict[str, str]) -> CollectiveRule:
    action = row["action"]
    assert action == "allow" or action == "differs" or action == "refuse", f"collectives.csv: {action!r}"
    names, values = tuple(row["collectives"].split("|")), tuple(row["values"].split("|"))
    return CollectiveRule(row["kind"], names, values, action, row["behaviour"], row["standing"], row["source"])


def _line_rates(chip: str) -> list[Link]:
    """What the vendor declares of a chip's links."""
    facts = get_chip(chip)
    domain = facts.scaleup_domain
    within = _line_rate(
        "within node",
        facts.texts.get("scaleup_name", ""),
        facts.scaleup_gbs_uni,
        int(domain.value) if domain is not None and domain.value is not None else None,
    )
    return [row for row in (within, _line_rate("between nodes", "network", facts.nic_gbs_uni, None)) if row]


def _line_rate(scope: Scope, fabric: str, figure: Figure | None, ranks: int | None) -> Link | None:
    if figure is None or figure.value is None:
        return None
    standing = "assumed" if figure.source.startswith("inference") else "documented"
    return Link(fabric, scope, "line rate", ranks, float(figure.value), None, "one direction", standing, figure.source)


def _link(row: dict[str, str]) -> Link:
    scope = row["scope"]
    assert scope == "within chip" or scope == "within node" or scope == "between nodes", f"links.csv: {scope!r}"
    return Link(
        fabric=row["fabric"],
        scope=scope,
        op=row["op"],
        ranks=int(row["ranks"]) if row["ranks"] else None,
        bandwidth_gbs=float(row["bandwidth_gbs"]) if row["bandwidth_gbs"] else None,
        latency_us=float(row["latency_us"]) if row["latency_us"] else None,
        conditions=row["conditions"],
        standing=row["standing"],
        source=row["source"],
    )


def _rate(row: dict[str, str]) -> Rate:
    return Rate(row["cause"], float(row["per_chip_hour"]), row["conditions"], row["standing"], row["source"])


def _numeric(row: dict[str, str]) -> Numeric:
    kind = row["kind"]
    assert _is_numeric_kind(kind), f"numerics.csv: {kind!r}"
    operators = tuple(name for name in row["operators"].split("|") if name)
    return Numeric(kind, operators, row["value"], row["behaviour"], row["standing"], row["source"])


def _is_numeric_kind(text: str) -> TypeGuard[NumericKind]:
    return text in NUMERIC_KINDS


def _status(text: str) -> Status:
    assert text in MEANING, f"operators.csv: {text!r}"
    return text


def _rows(family: str, table: str) -> list[dict[str, str]]:
    """A table of a family's folder; none where the family has no such table."""
    path = resources.files("isthmus.chips.rehearse") / family / f"{table}.csv"
    return csv_rows(path.read_text(encoding="utf-8")) if path.is_file() else []
