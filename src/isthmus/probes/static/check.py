"""The static software tier: what a chip's software makes of a recipe's own model, by share of the time; no chip needed.

A trace at full size (probes/static/trace.py) is joined with the tables of the chip. A call's time is what its
arithmetic needs at the chip's declared bf16 peak, or its bytes at the declared memory bandwidth, whichever is longer
(the roofline model, Williams, Waterman and Patterson, CACM 52(4), 2009): a lower bound, with the overhead of launches,
which nobody publishes, left out. It weighs operators against each other and predicts no speed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch

from isthmus.chips import Chip
from isthmus.chips.rehearse import Profile, RehearsalRefused
from isthmus.chips.rehearse.fused import FusedOperator, FusedTables, ShapeRule, fused_tables_of
from isthmus.chips.rehearse.tables import Status
from isthmus.formats import get_format
from isthmus.probes.findings import finding
from isthmus.probes.static.costs import BACKWARD, WHOLE_ATTENTION, Call, Costs
from isthmus.probes.static.operators import Support, support_of
from isthmus.probes.static.sites import (
    ATTENTION,
    EXCHANGE,
    EXPERTS,
    HALVES,
    LATENT_ATTENTION,
    LINEAR,
    LOSS,
    MLP,
    NORM,
    OPTIMISER,
    PAIRS,
    ROUTER,
    Site,
)
from isthmus.probes.static.trace import Layout, Options, serving_costs, training_costs
from isthmus.recipe.practice import rollout_formats
from isthmus.recipe.schema import Recipe, layout_problem
from isthmus.records import Evidence, Limit, Outcome, Use
from isthmus.run import Figure

BASES = ("time", "flops", "bytes")
BASIS_NAMES = {"time": "time", "flops": "arithmetic", "bytes": "bytes moved"}
COLLECTIVE_NAMES = {
    "all-gather": ("all_gather", None),
    "reduce-scatter": ("reduce_scatter", "sum"),
    "all-reduce": ("all_reduce", "sum"),
    "all-to-all": ("all_to_all", None),
}
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8"}
_finding = partial(finding, aspect="software")
_TIME_IN_PARTS: tuple[Status, ...] = ("generic", "decomposes")


@dataclass(frozen=True)
class OperatorShare:
    """One operator of a trace: what the chip does with it, and its shares of the whole.

    `shares` has the keys of `BASES`; time is absent where the chip's peak or its bandwidth is not known. For an
    operator that falls back the share is what it would take on the chip: the least that it costs.
    """

    operator: str
    status: Status
    dtypes: tuple[str, ...]
    calls: int
    flops: int
    bytes: int
    seconds: float | None
    shares: dict[str, float]
    cautions: tuple[str, ...] = ()
    unrepeatable: str | None = None
    refused: tuple[str, ...] = ()
    weak: tuple[str, ...] = ()

    @property
    def may_fall_back(self) -> bool:
        return any("cpu" in caution for caution in self.cautions)


@dataclass(frozen=True)
class StaticCoverage:
    """A use of the model on a chip. `rows` come with the largest share of `basis` first; `share` is of `basis`.

    Of a chip whose time is not known, operators of equal arithmetic come with the most bytes first.
    """

    use: Use
    what: str
    rows: tuple[OperatorShare, ...]
    basis: str
    seconds: float | None
    found: Support
    collectives: dict[str, str]
    collective_notes: tuple[str, ...]
    collectives_refused: str | None
    sources: tuple[str, ...]
    sites: frozenset[Site] = frozenset()
    totals: dict[str, float] = field(default_factory=dict)

    @property
    def bases(self) -> tuple[str, ...]:
        """What shares are told of: time, or else what it would come from."""
        return (self.basis,) if self.basis == "time" else BASES[BASES.index(self.basis) :]

    def share(self, *statuses: Status, basis: str | None = None) -> float:
        """Share of the operators with these statuses."""
        return sum(row.shares[basis or self.basis] for row in self.rows if row.status in statuses)

    @property
    def impossible(self) -> list[str]:
        """Why this use cannot run at all; empty if it can."""
        reasons = [f"{name} is missing" for name in self.found.operators["none"]]
        reasons += [
            f"{dtype} is refused ({_first(names)})" for dtype, names in sorted(self.found.refused_dtypes.items())
        ]
        return reasons + ([self.collectives_refused] if self.collectives_refused else [])

    @property
    def unrepeatable(self) -> list[OperatorShare]:
        return [row for row in self.rows if row.unrepeatable]

    @property
    def doubtful(self) -> list[OperatorShare]:
        """Operators that are native, and of which a caution says that the CPU may run them."""
        return [row for row in self.rows if row.status == "native" and row.may_fall_back]

    def shares_of(self, rows: Iterable[OperatorShare]) -> list[float]:
        """What these rows are of each of `bases` together."""
        chosen = list(rows)
        return [sum(row.shares[basis] for row in chosen) for basis in self.bases]

    def headline(self) -> str:
        """The shares in one sentence."""
        native = self.shares_of(row for row in self.rows if row.status == "native")
        named = [f"{percent(share)} of the {BASIS_NAMES[one]}" for share, one in zip(native, self.bases, strict=True)]
        parts = [f"{' and '.join(named)} native"]
        made = self.shares_of(row for row in self.rows if row.status in _TIME_IN_PARTS)
        if any(made):
            parts.append(f"{_percents(made)} made of other operators")
        lost: dict[Status, str] = {
            "fallback": "in operators that fall back",
            "none": "in operators that are missing",
            "unknown": "in operators that no table lists",
        }
        for status, words in lost.items():
            if self.found.operators[status]:
                parts.append(f"{_percents(self.shares_of(row for row in self.rows if row.status == status))} {words}")
        if any(doubtful := self.shares_of(self.doubtful)):
            parts.append(f"{_percents(doubtful)} in operators that are documented to fall back in some cases")
        return "; ".join(parts)


@dataclass(frozen=True)
class NeedFound:
    """What a chip offers for one need of the model in one use: fused operators that serve it, and others that do not.

    `broken` are the rules that the model does not keep, by operator.
    """

    need: str
    use: Use
    usable: tuple[FusedOperator, ...]
    unusable: tuple[FusedOperator, ...]
    broken: dict[str, tuple[ShapeRule, ...]]


def static_coverage(
    recipe: Recipe, chip: Chip, profile: Profile, layout: Layout, *, every_layer: bool = False
) -> list[StaticCoverage]:
    """A training step of one rank of `layout`, and serving on one chip, joined with the tables of `chip`."""
    dtype = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16
    whole = next((name for name in WHOLE_ATTENTION if profile.status(name) == "native"), None)
    grouped = bool(chip.capabilities.grouped_matmul) and dtype == torch.bfloat16
    options = Options(dtype, whole, grouped, every_layer)
    training = sum(training_costs(recipe, layout, options).values(), Costs())
    serving = serving_costs(recipe, options, layout.expert)
    step = "a training step" if layout.ranks == 1 else f"a training step of one of {layout.ranks} ranks"
    return [
        join("training", step, training, chip, profile),
        join("serving", "a prompt", serving["prefill"], chip, profile),
        join("serving", "a decoded token of each sequence", serving["decode"], chip, profile),
    ]


def join(use: Use, what: str, costs: Costs, chip: Chip, profile: Profile) -> StaticCoverage:
    """A trace with what the chip's tables say of each of its operators."""
    found = support_of(_called(costs, profile), profile)
    peak, bandwidth = _known(chip.bf16_tflops, 1e12), _known(chip.mem_bw_gbs, 1e9)
    seconds = {call: _seconds(call, peak, bandwidth) for call in costs.calls}
    basis = "time" if peak and bandwidth else "flops" if costs.flops else "bytes"
    order = BASES[BASES.index(basis) :]
    rows = _rows(costs, seconds, profile, fused_tables_of(chip.slug), found)
    notes, refused = _collective_rules(costs, profile)
    return StaticCoverage(
        use=use,
        what=what,
        rows=tuple(sorted(rows, key=lambda row: [*(-row.shares.get(one, 0.0) for one in order), row.operator])),
        basis=basis,
        seconds=sum(row.seconds or 0.0 for row in rows) if basis == "time" else None,
        found=found,
        collectives=_sent(costs, chip),
        collective_notes=notes,
        collectives_refused=refused,
        sources=_sources(chip, found),
        sites=costs.sites,
        totals={"flops": costs.flops, "bytes": costs.bytes},
    )


def _known(figure: Figure | None, unit: float) -> float | None:
    return figure.value * unit if figure is not None and figure.value is not None else None


def _seconds(call: Call, peak: float | None, bandwidth: float | None) -> float | None:
    return max(call.flops / peak, call.bytes / bandwidth) if peak and bandwidth else None


def _called(costs: Costs, profile: Profile) -> dict[str, set[str]]:
    """The dtypes of each operator, by the name that the table knows it by: a whole operator's gradient has none."""
    called: dict[str, set[str]] = {}
    for call in costs.calls:
        called.setdefault(_listed_name(call.operator, profile), set()).update(call.dtypes)
    return called


def _listed_name(name: str, profile: Profile) -> str:
    own = name.removesuffix(BACKWARD)
    return next((one for one in (name, f"{own}_backward") if own != name and one in profile.operators), own)


def _rows(
    costs: Costs, seconds: dict[Call, float | None], profile: Profile, tables: FusedTables, found: Support
) -> list[OperatorShare]:
    by_operator: dict[str, list[tuple[Call, int]]] = {}
    for call, count in costs.calls.items():
        by_operator.setdefault(call.operator, []).append((call, count))
    times = {call: (seconds[call] or 0.0) * count for call, count in costs.calls.items()}
    timed = any(one is not None for one in seconds.values())
    totals = {"flops": costs.flops, "bytes": costs.bytes, "time": sum(times.values())}
    unrepeatable = {one.operator: f"{one.named_as}: {one.source}" for one in tables.unrepeatable}
    rows = []
    for name, calls in by_operator.items():
        own = {
            "flops": sum(call.flops * count for call, count in calls),
            "bytes": sum(call.bytes * count for call, count in calls),
            "time": sum(times[call] for call, _ in calls),
        }
        listed = _listed_name(name, profile)
        bases = BASES if timed else BASES[1:]
        rows.append(
            OperatorShare(
                operator=name,
                status=profile.status(listed),
                dtypes=tuple(sorted({dtype for call, _ in calls for dtype in call.dtypes})),
                calls=sum(count for _, count in calls),
                flops=int(own["flops"]),
                bytes=int(own["bytes"]),
                seconds=own["time"] if timed else None,
                shares={basis: own[basis] / totals[basis] if totals[basis] else 0.0 for basis in bases},
                cautions=found.cautions.get(listed, ()),
                unrepeatable=unrepeatable.get(name),
                refused=tuple(dtype for dtype, names in found.refused_dtypes.items() if listed in names),
                weak=tuple(
                    f"{dtype}: {profile.dtypes[dtype].behaviour}"
                    for dtype, names in found.weak_dtypes.items()
                    if listed in names
                ),
            )
        )
    return rows


def _sent(costs: Costs, chip: Chip) -> dict[str, str]:
    """By kind of collective, dtype and size of group: the bytes that leave a rank, and what they take at least.

    A group that is larger than what the chip's own link joins is counted at the rate of the network.
    """
    totals: Counter[tuple[str, str, int]] = Counter()
    for one, count in costs.collectives.items():
        totals[one.kind, one.dtype, one.ranks] += one.sent * count  # pyright: ignore[reportArgumentType]
    found = {}
    for (kind, dtype, ranks), sent in sorted(totals.items()):
        domain = _known(chip.scaleup_domain, 1.0)
        link = chip.scaleup_gbs_uni if domain is not None and ranks <= domain else chip.nic_gbs_uni
        rate = _known(link, 1e9)
        least = f", {amount(sent / rate, 's')} at least at the declared {rate / 1e9:g} GB/s" if rate else ""
        found[f"{kind} of {dtype} among {ranks} ranks"] = f"{amount(sent, 'B')} leave each rank{least}"
    return found


_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("u", 1e-6))


def amount(value: float, unit: str) -> str:
    """Bytes ("B") or seconds ("s") to three digits, in the multiple of the unit that needs the fewest."""
    usual = [one for one in _PREFIXES if (one[1] >= 1.0 if unit == "B" else one[1] <= 1.0)]
    prefix, scale = next((one for one in usual if value >= one[1]), usual[-1])
    digits = max(0, 2 - int(math.log10(value / scale))) if value >= scale else 3
    return f"{value / scale:,.{digits}f} {prefix}{unit}"


def _collective_rules(costs: Costs, profile: Profile) -> tuple[tuple[str, ...], str | None]:
    """In what the chip's collectives differ from the reference, and why it refuses one, if it does."""
    notes: list[str] = []
    try:
        for one in sorted({(one.kind, one.dtype) for one in costs.collectives}):
            name, reduction = COLLECTIVE_NAMES[one[0]]
            notes += profile.check_collective(name, one[1], reduction)
    except RehearsalRefused as refusal:
        return tuple(dict.fromkeys(notes)), str(refusal)
    return tuple(dict.fromkeys(notes)), None


def _sources(chip: Chip, found: Support) -> tuple[str, ...]:
    figures = [("bf16 peak", chip.bf16_tflops), ("memory bandwidth", chip.mem_bw_gbs)]
    known = [f"{name} {figure}" for name, figure in figures if figure is not None]
    missing = [name for name, figure in figures if figure is None or figure.value is None]
    lacking = [f"no {' and no '.join(missing)} of {chip.name} is known, so there are no shares of time"]
    return (found.source, *known, *(lacking if missing else []))


NEEDS = (
    *("attention", "rms norm", "rope", "swiglu", "cross entropy", "gating", "permutation", "grouped matmul"),
    *("dispatch and combine", "W8A8", "optimiser"),
)
"""What a model may need, in the order of a pass. It needs those of which a trace met a site."""
_NEED_OF: dict[str, tuple[str, ...]] = {
    ATTENTION: ("attention",),
    LATENT_ATTENTION: ("attention",),
    NORM: ("rms norm",),
    HALVES: ("rope",),
    PAIRS: ("rope",),
    MLP: ("swiglu",),
    LOSS: ("cross entropy",),
    ROUTER: ("gating",),
    EXPERTS: ("permutation", "grouped matmul"),
    EXCHANGE: ("dispatch and combine",),
    LINEAR: ("W8A8",),
    OPTIMISER: ("optimiser",),
}
_OF_INT8 = ("W8A8",)
"""Needs of weights in int8, which are served and not trained."""


def sites_of(found: Iterable[StaticCoverage], use: Use) -> tuple[Site, ...]:
    """The sites that the traces of a use met, in one order."""
    return tuple(sorted({site for one in found if one.use == use for site in one.sites}))


def needs_of(sites: Iterable[Site], chip: Chip, profile: Profile, use: Use, *, int8: bool = True) -> list[NeedFound]:
    """For each need of a model that has these sites, the fused operators of the chip that this use can take, and those
    that it cannot.

    Without `int8` weights nobody needs W8A8. An operator counts only where the chip's software has it, and where it can
    take the place of one of the sites. One whose documented shape rules a site breaks is unusable, with the rules that
    say so.
    """
    tables, sites = fused_tables_of(chip.slug), tuple(sites)
    kinds = {site.kind for site in sites}
    needed = {need for kind in kinds for need in _NEED_OF.get(kind, ())}
    known = [one for one in tables.operators if profile.status(one.operator) == "native" and kinds & set(one.sites)]
    broken = {one.operator: broken_rules(tables.rules, one.operator, sites, use) for one in known}
    found = []
    for need in NEEDS:
        if need not in needed or (need in _OF_INT8 and (use == "training" or not int8)):
            continue
        offered = [one for one in known if one.need == need and one.use in (use, "both")]
        usable = [one for one in offered if one.serves(use) and not broken[one.operator]]
        others = [one for one in offered if one not in usable]
        rules = {one.operator: broken[one.operator] for one in offered if broken[one.operator]}
        found.append(NeedFound(need, use, tuple(usable), tuple(others), rules))
    return found


def serves_int8(recipe: Recipe) -> bool:
    """Whether the recipe generates or serves with weights in int8."""
    placed = (*rollout_formats(recipe), recipe.handoff.format)
    return any(torch.int8 in {dtype for dtype, _ in get_format(one).layout(recipe.model).values()} for one in placed)


def broken_rules(rules: Iterable[ShapeRule], operator: str, sites: Iterable[Site], use: Use) -> tuple[ShapeRule, ...]:
    """The rules on an operator that one of these sites breaks. A rule that is about none of them is not broken."""
    own = [rule for rule in rules if rule.operator == operator]
    return tuple(one.rule for one in held_rules(own, sites, use) if not one.holds)


@dataclass(frozen=True)
class HeldRule:
    """A rule, and a site that it was held against: one that breaks it, if there is such a site."""

    rule: ShapeRule
    site: Site
    holds: bool

    @property
    def here(self) -> float:
        """What the site has for the quantity of the rule."""
        return dict(self.site.sizes)[self.rule.quantity]


def held_rules(rules: Iterable[ShapeRule], sites: Iterable[Site], use: Use) -> list[HeldRule]:
    """Each rule that is about one of these sites, with what came of it. Others are left out."""
    sites, found = tuple(sites), list[HeldRule]()
    for rule in rules:
        held = [
            HeldRule(rule, site, holds)
            for site in sites
            if rule.is_about(site.kind, use) and (holds := rule.holds(dict(site.sizes))) is not None
        ]
        if held:
            found.append(min(held, key=lambda one: one.holds))
    return found


def static_findings(recipe: Recipe, chip: Chip, profile: Profile, *, ranks: int = 1) -> list[Evidence]:
    """The findings of the static tier for `isthmus qualify`, training and serving apart.

    Ranks that cannot divide the model are a failing finding, and the step of one rank is looked at.
    """
    problem = layout_problem(recipe.model, recipe.train, ranks)
    layout = Layout() if problem else Layout.of(recipe.model, recipe.train, ranks)
    found = static_coverage(recipe, chip, profile, layout)
    findings, int8 = [finding_of(one) for one in found], serves_int8(recipe)
    if fused_tables_of(chip.slug).operators:
        findings += [
            _fused_finding(needs_of(sites_of(found, use), chip, profile, use, int8=int8), use)
            for use in ("training", "serving")
        ]
    if problem:
        findings.append(_finding("layout", "fail", problem, needed_for="training"))
    training = next(one for one in found if one.use == "training")
    return [*findings, _repeatable_finding(training), *_dtype_findings(profile)]


def finding_of(found: StaticCoverage) -> Evidence:
    """Operators that are missing, or called with a dtype that the chip refuses, fail a use. Those that fall back fail
    training, where every step of every rank would wait, and are told of serving, as on the chip (probes/software.py).
    """
    fallback, unlisted = found.found.operators["fallback"], found.found.operators["unknown"]
    failed = bool(found.impossible or (fallback and found.use == "training"))
    outcome: Outcome = "fail" if failed else "unknown" if unlisted else "pass"
    words = [found.headline(), *found.impossible]
    words += [f"on the host's CPU, silently: {', '.join(fallback)}"] if fallback else []
    words += [f"not in the table: {', '.join(unlisted)}"] if unlisted else []
    words += [f"weak with {dtype}: {', '.join(names)}" for dtype, names in found.found.weak_dtypes.items()]
    cautions = [f"{name} ({', '.join(notes)})" for name, notes in found.found.cautions.items()]
    words += [f"documented limits: {', '.join(cautions)}"] if cautions else []
    name = f"operators of {found.what}"
    return _finding(name, outcome, "; ".join(words), found.found.total, _figures(found), needed_for=found.use)


def _figures(found: StaticCoverage) -> dict[str, Figure]:
    """Numbers of operators, and shares: of the time, or else of the arithmetic, and with a name of their own of the
    bytes."""
    source = f"trace of {found.what} at full size, joined with {found.found.source}"
    counts = {"operators": found.found.total, "fallback_operators": found.found.count("fallback")}
    figures = {name: Figure.measured(n, "operators", source, rehearsed=True) for name, n in counts.items()}
    statuses: dict[str, Status] = {"native": "native", "fallback": "fallback", "missing": "none"}
    for basis in found.bases:
        end = "" if basis == found.basis else f"_of_{basis}"
        for name, status in statuses.items():
            value, unit = 100 * found.share(status, basis=basis), f"% of {BASIS_NAMES[basis]}"
            figures[f"{name}_share{end}"] = Figure.measured(value, unit, source, rehearsed=True)
    return figures


def _fused_finding(needs: list[NeedFound], use: Use) -> Evidence:
    """Fused operators cost speed where they are not there, and nothing else: a model runs without them."""
    words = [need_sentence(need) for need in needs if need.usable or need.unusable]
    bare = [need.need for need in needs if not need.usable and not need.unusable]
    words += [f"nothing fused is known for {', '.join(bare)}"] if bare else []
    return _finding(f"fused operators for {use}", "pass", "; ".join(words), len(needs), needed_for=use)


def need_sentence(need: NeedFound) -> str:
    """A need, and what can be used for it, or why what is there cannot."""
    return f"{need.need}: {need_answer(need)}"


def need_answer(need: NeedFound) -> str:
    """What can be used for a need, or why what is there cannot."""
    if need.usable:
        return ", ".join(one.operator for one in need.usable)
    reasons = [f"{one.operator} {_why_not(one, need)}" for one in need.unusable]
    return f"unfused, since {', '.join(reasons)}"


def rule_text(rule: ShapeRule) -> str:
    """A rule in words, such as `row_length multiple of 128`."""
    return f"{rule.quantity} {rule.rule.replace('_of ', ' of ')}"


def _why_not(one: FusedOperator, need: NeedFound) -> str:
    if rules := need.broken.get(one.operator):
        return f"wants {' and '.join(map(rule_text, rules))}"
    if need.use == "serving":
        return "is documented for training alone"
    return "has no backward" if one.backward is False else "is documented for serving alone"


def _repeatable_finding(training: StaticCoverage) -> Evidence:
    rows = training.unrepeatable
    detail = "no operator of the step is listed as giving other bits each time"
    if rows:
        bases = " and the ".join(BASIS_NAMES[basis] for basis in training.bases)
        detail = (
            f"{_percents(training.shares_of(rows))} of the {bases} in operators that are not deterministic unless "
            f"torch.use_deterministic_algorithms is on: {', '.join(row.operator for row in rows)}"
        )
    return _finding("deterministic by default", "pass", detail, len(training.rows), needed_for="training")


def _dtype_findings(profile: Profile) -> list[Evidence]:
    """A precision that the chip refuses is a limit on training, which the other precisions keep to."""
    refused = {dtype: rule for dtype, rule in profile.dtypes.items() if rule.action == "refuse"}
    if not refused:
        return []
    reasons = {_PRECISIONS[dtype]: rule.behaviour for dtype, rule in refused.items() if dtype in _PRECISIONS}
    limits = [Limit(setting="train.precision", excluded=[name], reason=reason) for name, reason in reasons.items()]
    detail = "; ".join(f"{dtype}: {rule.behaviour} ({rule.standing})" for dtype, rule in refused.items())
    outcome = "fail" if limits else "pass"
    return [_finding("refused dtypes", outcome, detail, len(refused), limits=limits, needed_for="training")]


def percent(share: float) -> str:
    """A share in words that do not round something to nothing."""
    return f"{share:.1%}" if share == 0 or share >= 0.0005 else "under 0.1%"


def _percents(shares: Iterable[float]) -> str:
    return " and ".join(map(percent, shares))


def _first(names: tuple[str, ...], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
