"""Floors and ceilings that a pool's figures must keep, and the check that the thresholds themselves make sense.

A rule is data, never code: `>= 228 GB/s`, `<= 40 us`, `>= 0.75 x peers' median`. The package's own rules are
`chips/thresholds.csv`; a recipe may name a file of its own with the same columns.
"""

from __future__ import annotations

import csv
import functools
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple, cast

from isthmus.chips import Chip, load_chips
from isthmus.errors import IsthmusError, suggestion
from isthmus.lines import csv_lines, explain_csv_errors, read_text
from isthmus.records import Aspect, Evidence, Outcome, Use
from isthmus.run import Figure

ANY = "*"
COLUMNS = ("chip", "metric", "ranks", "at_least", "rule", "conditions", "source")
LEAST_PEERS = 2
PEER_PROBES: dict[Aspect, str] = {"compute": "stragglers", "stability": "stragglers", "links": "pairs of ranks"}
"""The live probe that looks for a rank, or a link, that is slower than its peers."""
LEAST_SHARE = 0.2
"""A healthy chip reaches at least this share of its declared peak. Of the published floors for the memory of chips in
the tables, the lowest sound one asks for 0.33 of the peak; those with a slip ask for 0.07, 0.04 and 0.0005."""
MOST_APART = 20.0
"""No chip is this factor away from the others' median: in the tables the declared matmul, memory and link rates of
single chips are at most 14 times below or above their median (a link of 32 GB/s against 420). A slip of the unit is a
factor of 1,000."""
MOST_OF_LINE = 2.0
"""In an all-reduce that the network itself adds up, each chip sends its data once instead of 2(n-1)/n times, so the bus
bandwidth that is counted as for a ring may reach twice the line rate."""

Direction = Literal[">=", "<="]
_RULE = re.compile(r"(>=|<=)\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(?:(x peers' median)|([A-Za-z]+(?:/s)?))")
_UNITS: dict[str, tuple[str, float]] = {
    "MB/s": ("bytes per second", 1e6),
    "GB/s": ("bytes per second", 1e9),
    "TB/s": ("bytes per second", 1e12),
    "Gb/s": ("bytes per second", 1e9 / 8),
    "GFLOPS": ("floating-point operations per second", 1e9),
    "TFLOPS": ("floating-point operations per second", 1e12),
    "PFLOPS": ("floating-point operations per second", 1e15),
    "TOPS": ("operations per second", 1e12),
    "us": ("seconds", 1e-6),
    "ms": ("seconds", 1e-3),
    "s": ("seconds", 1.0),
}


@dataclass(frozen=True)
class Metric:
    """What a rule may be about. `size` says in what the size of a measurement is counted; `declared` is the fact of a
    chip that bounds the metric, with `most` as the largest plausible multiple of it."""

    unit: str
    aspect: Aspect
    needed_for: Use
    declared: str | None = None
    most: float = 1.0
    size: str | None = None


_MATRICES, _COPIED, _MESSAGE = "rows of the square matrices", "MiB copied", "MiB on each rank"
METRICS: dict[str, Metric] = {
    "matmul_tflops": Metric("TFLOPS", "compute", "both", size=_MATRICES),
    "matmul_bf16_tflops": Metric("TFLOPS", "compute", "both", "bf16_tflops", size=_MATRICES),
    "matmul_fp8_tflops": Metric("TFLOPS", "compute", "both", "fp8_tflops", size=_MATRICES),
    "matmul_int8_tops": Metric("TOPS", "compute", "both", "int8_tops", size=_MATRICES),
    "memory_gbs": Metric("GB/s", "compute", "both", "mem_bw_gbs", size=_COPIED),
    "host_device_gbs": Metric("GB/s", "links", "both", size=_COPIED),
    "peer_copy_gbs": Metric("GB/s", "links", "training", "scaleup_gbs_uni", size=_COPIED),
    "all_reduce_bus_gbs": Metric("GB/s", "links", "training", "scaleup_gbs_uni", MOST_OF_LINE, _MESSAGE),
    "all_gather_bus_gbs": Metric("GB/s", "links", "training", "scaleup_gbs_uni", size=_MESSAGE),
    "reduce_scatter_bus_gbs": Metric("GB/s", "links", "training", "scaleup_gbs_uni", MOST_OF_LINE, _MESSAGE),
    "all_to_all_bus_gbs": Metric("GB/s", "links", "training", "scaleup_gbs_uni", size=_MESSAGE),
    "p2p_slowest_gbs": Metric("GB/s", "links", "training", "scaleup_gbs_uni", size=_MESSAGE),
    "latency_8k_p50_us": Metric("us", "links", "training"),
    "latency_8k_p99_us": Metric("us", "links", "training"),
    "step_s": Metric("s", "stability", "training"),
}


@dataclass(frozen=True)
class Rule:
    """One threshold. `value` is in the metric's unit, or a multiple of the peers' median where `relative`.

    `chip` is a slug or `*` for any. `ranks` None holds for any number of ranks; `at_least` is the least size of a
    measurement for which it holds. `where` is the file and line that it comes from.
    """

    chip: str
    metric: str
    ranks: int | None
    at_least: float | None
    direction: Direction
    value: float
    relative: bool
    conditions: str
    source: str
    where: str

    @property
    def text(self) -> str:
        unit = "x peers' median" if self.relative else METRICS[self.metric].unit
        return f"{self.metric} {self.direction} {self.value:,.6g} {unit}"

    def __str__(self) -> str:
        ranks = f" with {self.ranks} ranks" if self.ranks else ""
        return f"{self.text} on {'any chip' if self.chip == ANY else self.chip}{ranks} ({self.where})"

    @property
    def key(self) -> tuple[str, str, int | None, Direction, bool]:
        return self.chip, self.metric, self.ranks, self.direction, self.relative


# -- reading ----------------------------------------------------------------------------------------------------------


def load_thresholds(path: Path | None = None, chips: Mapping[str, Chip] | None = None) -> tuple[Rule, ...]:
    """The package's rules, and those of a file in place of the package's for the same chip, metric and ranks.

    Raises IsthmusError for a file that cannot be read, and for a rule that no plausible chip could fail, or pass.
    """
    chips = load_chips() if chips is None else chips
    package = package_thresholds()
    if path is None:
        return package
    try:
        text = read_text(path)
    except OSError as error:
        raise IsthmusError(f"the thresholds {path} cannot be read: {error}") from None
    own = read_rules(text, str(path), chips)
    problems = check_sanity(own, chips, beside=package)
    if problems:
        raise IsthmusError("these thresholds make no sense:\n" + "\n".join(f"- {problem}" for problem in problems))
    replaced = {rule.key for rule in own}
    return (*own, *(rule for rule in package if rule.key not in replaced))


@functools.cache
def package_thresholds() -> tuple[Rule, ...]:
    """The rules of `chips/thresholds.csv`."""
    text = (resources.files("isthmus.chips") / "thresholds.csv").read_text(encoding="utf-8")
    return read_rules(text, "thresholds.csv", load_chips())


def read_rules(text: str, name: str, chips: Mapping[str, Chip]) -> tuple[Rule, ...]:
    """The rules of a CSV text. `name` is for messages. Raises IsthmusError, naming the line, for a wrong one."""
    reader = csv.DictReader(csv_lines(text))
    with explain_csv_errors(name):
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise IsthmusError(f"{name} is not a table of thresholds: its first line must be {','.join(COLUMNS)}")
        return tuple(
            _rule({key: value or "" for key, value in row.items()}, f"{name}:{reader.line_num}", chips)
            for row in reader
        )


def _rule(row: dict[str, str], where: str, chips: Mapping[str, Chip]) -> Rule:
    chip, metric = row["chip"].strip(), row["metric"].strip()
    if metric not in METRICS:
        raise IsthmusError(f"{where}: unknown metric {metric!r}{suggestion(metric, METRICS)}")
    if chip != ANY and chip not in chips:
        raise IsthmusError(f"{where}: unknown chip {chip!r}{suggestion(chip, chips)}; {ANY} stands for any")
    if not row["source"].strip():
        raise IsthmusError(f"{where}: the threshold of {metric} has no source; say who found it, and how")
    direction, value, relative = _parsed(row["rule"].strip(), METRICS[metric].unit, where)
    ranks, size = (_number(row[column], column, where) for column in ("ranks", "at_least"))
    if size is not None and METRICS[metric].size is None:
        raise IsthmusError(f"{where}: {metric} has no size; leave at_least empty")
    if ranks is not None and ranks != int(ranks):
        raise IsthmusError(f"{where}: ranks must be a whole number, not {row['ranks']!r}")
    whole = None if ranks is None else int(ranks)
    return Rule(chip, metric, whole, size, direction, value, relative, row["conditions"], row["source"], where)


def _parsed(text: str, unit: str, where: str) -> tuple[Direction, float, bool]:
    match = _RULE.fullmatch(text)
    if match is None:
        raise IsthmusError(
            f"{where}: {text!r} is not a rule; write `>= 228 {unit}`, `<= 40 {unit}`, `>= 0.75 x peers' median` "
            "or `<= 2 x peers' median`"
        )
    direction, value = cast(Direction, match[1]), float(match[2])
    if value <= 0:
        raise IsthmusError(f"{where}: {text!r} holds for every chip, or for none; write a value above 0")
    if match[3]:
        return direction, value, True
    return direction, _converted(value, match[4], unit, where), False


def _converted(value: float, unit: str, wanted: str, where: str) -> float:
    quantity, scale = _UNITS.get(unit, ("", 0.0))
    target, step = _UNITS[wanted]
    if quantity != target:
        able = ", ".join(name for name, (kind, _) in _UNITS.items() if kind == target)
        raise IsthmusError(f"{where}: the unit {unit!r} does not fit; write one of {able}")
    return value * scale / step


def _number(text: str, column: str, where: str) -> float | None:
    if not text.strip():
        return None
    if not re.fullmatch(r"\d+(\.\d+)?", text.strip()) or float(text) <= 0:
        raise IsthmusError(f"{where}: {column} must be a number above 0, or empty, not {text!r}")
    return float(text)


# -- sanity -----------------------------------------------------------------------------------------------------------


def check_sanity(rules: Sequence[Rule], chips: Mapping[str, Chip], beside: Sequence[Rule] = ()) -> list[str]:
    """Rules that no plausible chip fails, or none passes, each with the reason and its source; empty if all make sense.

    A figure is plausible for a chip from LEAST_SHARE of what is declared for it up to the declared peak (up to
    MOST_OF_LINE times a link that may add up on its way). A pair of chips in a full mesh has one of the links, and
    chips beyond the domain of a link have the network. Where nothing is declared, a value is plausible within
    MOST_APART of the median of the rules on the same metric for other chips, `beside` included. A multiple of the
    peers' median must let the median chip pass, and may not be looser than 1 / LEAST_SHARE. What cannot be judged is
    accepted.
    """
    problems = [
        f"{rule}: {doubt} (source: {rule.source})" for rule in rules if (doubt := _doubt(rule, rules, chips, beside))
    ]
    floors = {
        (rule.chip, rule.metric, rule.ranks): rule for rule in rules if rule.direction == ">=" and not rule.relative
    }
    for rule in rules:
        floor = floors.get((rule.chip, rule.metric, rule.ranks))
        if rule.direction == "<=" and not rule.relative and floor is not None and floor.value > rule.value:
            problems.append(f"{rule}: none passes this and {floor} (sources: {rule.source}; {floor.source})")
    return problems


def _doubt(rule: Rule, rules: Sequence[Rule], chips: Mapping[str, Chip], beside: Sequence[Rule]) -> str | None:
    if rule.relative:
        return _doubt_of_multiple(rule)
    unit = METRICS[rule.metric].unit
    bounds = _plausible(rule, chips)
    if bounds is not None:
        least, most, declared = bounds
        range_text = f"plausible is {least:,.4g} to {most:,.4g} {unit}, from {declared}"
    else:
        typical = _typical(rule, (*rules, *beside))
        if typical is None:
            return None
        least, most = typical / MOST_APART, typical * MOST_APART
        range_text = (
            f"other chips' thresholds are about {typical:,.4g} {unit}, and chips differ by less than {MOST_APART:g}"
        )
    if rule.value < least:
        return (
            f"{'no plausible chip fails it' if rule.direction == '>=' else 'no plausible chip passes it'}: {range_text}"
        )
    if rule.value > most:
        return (
            f"{'no plausible chip passes it' if rule.direction == '>=' else 'no plausible chip fails it'}: {range_text}"
        )
    return None


def _doubt_of_multiple(rule: Rule) -> str | None:
    loosest = LEAST_SHARE if rule.direction == ">=" else 1.0 / LEAST_SHARE
    strict = rule.value > 1.0 if rule.direction == ">=" else rule.value < 1.0
    loose = rule.value < loosest if rule.direction == ">=" else rule.value > loosest
    if strict:
        return "no pool of equal chips passes it: the median chip itself fails"
    return f"no plausible chip fails it: beyond {loosest:g} x the median a chip is broken, not slow" if loose else None


def _plausible(rule: Rule, chips: Mapping[str, Chip]) -> tuple[float, float, str] | None:
    """Least and most plausible value over the chips that a rule is about, and what they come from. None: unknown."""
    metric = METRICS[rule.metric]
    about = chips.values() if rule.chip == ANY else [chips[rule.chip]]
    found = [span for chip in about if (span := _span(metric, rule, chip)) is not None]
    if not found:
        return None
    declared = "what is declared for all chips" if rule.chip == ANY else found[0][2]
    return min(one[0] for one in found), max(one[1] for one in found), declared


def _span(metric: Metric, rule: Rule, chip: Chip) -> tuple[float, float, str] | None:
    figure = getattr(chip, metric.declared) if metric.declared else None
    if figure is None or figure.value is None:
        return None
    line = figure.value
    least = _narrowest(chip, rule, line) if metric.declared == "scaleup_gbs_uni" else line
    return LEAST_SHARE * least, metric.most * line, f"{line:,.6g} {figure.unit} declared for {chip.slug}"


def _narrowest(chip: Chip, rule: Rule, line: float) -> float:
    """What of a chip's link its ranks can use: a pair of a full mesh has one of its links, ranks beyond the link's
    domain go through the network."""
    domain = int(chip.scaleup_domain.value) if chip.scaleup_domain and chip.scaleup_domain.value else None
    ranks = 2 if rule.metric in ("peer_copy_gbs", "p2p_slowest_gbs") else rule.ranks
    network = chip.nic_gbs_uni.value if chip.nic_gbs_uni else None
    beyond = domain is not None and (ranks is None or ranks > domain)
    if beyond and network is not None and rule.metric != "peer_copy_gbs":
        return min(line, network)
    mesh = "mesh" in chip.texts.get("scaleup_name", "")
    return line * (ranks - 1) / (domain - 1) if mesh and domain and domain > 1 and ranks and ranks <= domain else line


def _typical(rule: Rule, rules: Sequence[Rule]) -> float | None:
    """The median of rules on the same metric for other chips; None if there are fewer than two."""
    others = [
        one.value
        for one in rules
        if (one.metric, one.direction, one.relative) == (rule.metric, rule.direction, False) and one.chip != rule.chip
    ]
    return statistics.median(others) if len(others) >= LEAST_PEERS else None


# -- applying ---------------------------------------------------------------------------------------------------------


class Applied(NamedTuple):
    """A finding for each rule that applies, and the rules on the same figures that do not, by the reason."""

    evidence: list[Evidence]
    aside: dict[str, list[Rule]]


def apply_thresholds(
    figures: Mapping[str, Figure],
    chip: str,
    rules: Sequence[Rule],
    peers: Mapping[str, Sequence[float]] | None = None,
    *,
    ranks: int | None = None,
    sizes: Mapping[str, float] | None = None,
) -> Applied:
    """Hold the figures of a chip or pool against the rules on them.

    Figures are by metric. `peers` are the values of the other chips of the pool, in the metric's unit. `sizes` are the
    sizes of the measurements, counted as the metric says. A figure whose interval spans the threshold is `unknown`.
    """
    applied = Applied([], {})
    for rule in rules:
        figure = figures.get(rule.metric)
        if figure is None or rule.chip not in (chip, ANY):
            continue
        reason = _reason_against(figure, rule, peers or {}, ranks, sizes or {})
        if reason is None:
            applied.evidence.append(_judged(figure, rule, peers or {}))
        else:
            applied.aside.setdefault(reason, []).append(rule)
    return applied


def _reason_against(
    figure: Figure, rule: Rule, peers: Mapping[str, Sequence[float]], ranks: int | None, sizes: Mapping[str, float]
) -> str | None:
    if rule.relative:
        known = 1 + len(peers.get(rule.metric, ()))
        if known > LEAST_PEERS:
            return None
        who = PEER_PROBES[METRICS[rule.metric].aspect]
        return (
            f"a chip is compared with its peers from {LEAST_PEERS + 1} chips of known rate on (here {known}); among "
            f"several ranks the probe `{who}` looks for what is slower than the rest"
        )
    if figure.kind != "measured":
        return f"the figure is {figure.kind}, and only one that is measured says something about the chip"
    if rule.ranks is not None and ranks != rule.ranks:
        return f"the figure is of {'an unknown number of' if ranks is None else ranks} ranks"
    size = sizes.get(rule.metric)
    if rule.at_least is not None and (size is None or size < rule.at_least):
        given = "a measurement of unknown size" if size is None else f"{size:g}"
        return f"it holds from {rule.at_least:g} {METRICS[rule.metric].size}, and the figure is of {given}"
    return None


def _judged(figure: Figure, rule: Rule, peers: Mapping[str, Sequence[float]]) -> Evidence:
    metric = METRICS[rule.metric]
    if rule.relative:
        median = statistics.median(peers[rule.metric])
        limit = Figure(
            value=rule.value * median,
            unit=metric.unit,
            kind=figure.kind,
            source=f"{rule.value:g} x the median of {len(peers[rule.metric])} peers ({rule.source})",
        )
    else:
        limit = Figure(value=rule.value, unit=metric.unit, kind="declared", source=rule.source)
    conditions = f"; {rule.conditions}" if rule.conditions else ""
    outcome = _outcome(figure, rule, cast(float, limit.value))
    says = {"pass": "keeps", "fail": "breaks", "unknown": "is too close to tell, or unknown, for"}[outcome]
    return Evidence(
        name=f"threshold: {rule.text}",
        aspect=metric.aspect,
        needed_for=metric.needed_for,
        outcome=outcome,
        detail=f"{figure} {says} {rule.direction} {limit}{conditions} (source: {rule.source})",
        figures={rule.metric: figure, f"{rule.metric}_threshold": limit},
    )


def _outcome(figure: Figure, rule: Rule, limit: float) -> Outcome:
    """Pass or fail only where the figure's whole interval is on one side."""
    if figure.value is None:
        return "unknown"
    scale = _converted(1.0, figure.unit, METRICS[rule.metric].unit, f"the figure {rule.metric}")
    low, high = (scale * (figure.value if end is None else end) for end in (figure.low, figure.high))
    keeps = (low >= limit, high >= limit) if rule.direction == ">=" else (low <= limit, high <= limit)
    if all(keeps):
        return "pass"
    return "unknown" if any(keeps) else "fail"
