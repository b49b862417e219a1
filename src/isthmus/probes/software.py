"""The live tier of software: what a chip's operators really compute, in this recipe's own calls and dtypes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

from isthmus.chips import Chip
from isthmus.formats import format_names, get_format
from isthmus.launch.crew import Called, Crew
from isthmus.pools import available_cores
from isthmus.probes.calls import Call, edge_calls, recipe_calls
from isthmus.probes.contract import Probe, Setting
from isthmus.probes.findings import finding
from isthmus.probes.trusted import trusted_errors
from isthmus.recipe.architecture import GroupedSection
from isthmus.recipe.practice import rollout_formats
from isthmus.recipe.schema import Recipe
from isthmus.records import Evidence, Limit, Use
from isthmus.verdict import ROLLOUT_FORMAT

OPERATORS = "isthmus.probes.portable.operators:check_operators"
TRAPS = "isthmus.probes.portable.traps:check_traps"
OUT_OF_RANGE = "isthmus.probes.portable.traps:check_out_of_range"
COMPILED = "isthmus.probes.portable.compiled:check_compiled"
ON_HOST = "fallback"
"""The kind of a finding that an operator runs on the host's CPU."""
REPEATS = 2
SHOWN = 4
CASES = 2
"""Failure cases that are kept of one probe: each a single operator."""
RECORD_S, CALL_S, TRAPS_S, COMPILE_S = 2.5, 0.0032, 0.1, 17.6
"""Seconds of recording, of one call in one dtype, of the traps and of a compilation: benchmarks/live_tier.py."""
CALLS = 370
"""Calls that are recorded of the tiny recipe."""
DEADLINE_S, COMPILE_DEADLINE_S = 600.0, 240.0
LONGEST_SUM = 1 << 15
_finding = partial(finding, aspect="software")


def run_dtypes(recipe: Recipe, chip: Chip) -> list[str]:
    """The floating dtypes that a run may compute in on a chip: fp32 always, bf16 where the chip has it or the recipe
    asks for it, fp16 where weights are placed in a format that computes in it."""
    formats = (*rollout_formats(recipe), recipe.handoff.format)
    dtypes = ["float32"]
    if recipe.train.precision == "bf16" or "bf16" in formats or "bf16" in (chip.dtypes or ()):
        dtypes.append("bfloat16")
    return dtypes + (["float16"] if any(name.endswith("fp16") for name in formats) else [])


def _price_of_operators(setting: Setting) -> float:
    calls = CALLS * len(run_dtypes(setting.recipe, setting.chip)) * CALL_S
    return RECORD_S + calls * _rounds(setting)


def _rounds(setting: Setting) -> float:
    """How many ranks share a core; an accelerator's rank has its host's core alone."""
    return max(1.0, setting.pool.ranks / available_cores()) if setting.device == "cpu" else 1.0


def check_operators(crew: Crew, setting: Setting) -> list[Evidence]:
    """Every operator of this recipe's work on every rank, in each dtype, forward and backward.

    One that runs on the host fails training, where every step of every rank would wait, and is told of serving.
    """
    calls = [*recipe_calls(setting.recipe), *edge_calls(bool(setting.chip.capabilities.grouped_matmul))]
    dtypes = run_dtypes(setting.recipe, setting.chip)
    trusted = trusted_errors(setting.chip.slug)
    arguments = {"calls": calls, "dtypes": dtypes, "repeats": REPEATS, "seed": setting.recipe.seed, "trusted": trusted}
    crew.stop()  # Warnings of a fallback come once in the life of a process.
    called = crew.call(OPERATORS, arguments, deadline_s=DEADLINE_S, stall_s=setting.stall_s)
    name = "operators on the chip"
    if not called.ok:
        return [_broken(crew, setting, called, name, OPERATORS, arguments)]
    findings = [_Failure(rank, **_fields(one)) for rank, value in enumerate(called.values) for one in value["findings"]]
    findings += _disagreements(called.values, calls)
    keeper = _Keeper(crew, setting, called, arguments)
    served = [one for one in findings if one.way == "forward" and "serving" in calls[one.call]["uses"]]
    serving = [one for one in served if one.kind != ON_HOST]
    waits = sorted({one.operator for one in served} - {one.operator for one in serving})
    training = [one for one in findings if one.dtype != "float16"]  # no precision of training computes in it
    return [
        _finding_of(f"{name}: serving", "serving", serving, called, setting, keeper, waits),
        _finding_of(f"{name}: training", "training", training, called, setting, keeper),
    ]


@dataclass(frozen=True)
class _Failure:
    """One operator that failed on one rank; `call` is its number."""

    rank: int
    call: int
    operator: str
    dtype: str
    way: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.operator} in {self.dtype}, {self.way}, on rank {self.rank}: {self.detail}"


def _fields(found: dict[str, Any]) -> dict[str, Any]:
    return {"way": found["pass"], **{name: found[name] for name in ("call", "operator", "dtype", "kind", "detail")}}


def _disagreements(values: list[dict[str, Any]], calls: list[Call]) -> list[_Failure]:
    """Ranks whose results have other bits than those of most ranks: equal chips must agree.

    Where an operator gives other bits each time, and that was noted, its ranks cannot agree and are not compared.
    """
    loose = {(one["call"], one["dtype"]) for value in values for one in (*value["noted"], *value["findings"])}
    found = []
    for key in set.intersection(*(set(value["digests"]) for value in values)):
        number, dtype, way = key.split(" ")
        if (int(number), dtype) in loose:
            continue
        counts = Counter(value["digests"][key] for value in values)
        usual, agree = counts.most_common(1)[0]
        if agree == len(values):
            continue
        for rank, value in enumerate(values):
            if value["digests"][key] != usual or 2 * agree <= len(values):
                text = "its result has other bits than that of " + (
                    f"{agree} other ranks" if 2 * agree > len(values) else "the other ranks"
                )
                operator = calls[int(number)]["operator"]
                found.append(_Failure(rank, int(number), operator, dtype, way, "disagreement", text))
    return found


def _finding_of(
    name: str,
    needed_for: Use,
    findings: list[_Failure],
    called: Called,
    setting: Setting,
    keeper: _Keeper,
    waits: list[str] | None = None,
) -> Evidence:
    """A failing finding, or a passing one. `waits` are operators that run on the host, and do not fail this use."""
    on_host = f"; on the host's CPU, for which {needed_for} waits: {', '.join(waits)}" if waits else ""
    checked = sum(value["checked"] for value in called.values)
    worst = max((max(one.values()) for value in called.values for one in value["errors"].values()), default=0.0)
    source = f"{checked} calls on {len(called.values)} ranks, error against float64 by what rounding explains"
    figures = {"worst_error": setting.measured(worst, "times rounding", source)} if math.isfinite(worst) else {}
    closest = max(value["closest"] for value in called.values)
    if math.isfinite(closest):
        figures["closest_to_its_limit"] = setting.measured(100.0 * closest, "% of a limit", source)
    if not findings:
        detail = _passing(called, setting, checked) + on_host
        return _finding(name, "pass", detail, checked, figures, needed_for=needed_for)
    operators = sorted({one.operator for one in findings})
    shown = "; ".join(map(str, _first_of_each(findings)[:SHOWN]))
    detail = (
        f"{len(operators)} operators fail ({', '.join(operators[:8])}{', ...' if len(operators) > 8 else ''}): {shown}"
    )
    limits, ranks = _limits(findings, needed_for, setting), sorted({one.rank for one in findings})
    failure = keeper.keep(_first_of_each(findings))
    return _finding(name, "fail", detail + on_host, checked, figures, limits, ranks, failure, needed_for=needed_for)


def _first_of_each(findings: list[_Failure]) -> list[_Failure]:
    first: dict[str, _Failure] = {}
    for one in findings:
        first.setdefault(one.operator, one)
    return list(first.values())


def _passing(called: Called, setting: Setting, checked: int) -> str:
    value = called.values[0]
    names = {key.split(" ")[0] for key in value["errors"]} | {one["operator"] for one in value["noted"]}
    dtypes = ", ".join(run_dtypes(setting.recipe, setting.chip))
    text = f"{checked} calls in {dtypes}, forward and backward, are as accurate as float64 on the host allows, "
    text += f"repeat bit by bit and agree on {len(called.values)} ranks; {len(names)} operators round"
    noted = sorted({f"{one['operator']} ({one['kind']})" for one in value["noted"]})
    text += f"; noted: {', '.join(noted)}" if noted else ""
    reasons = sorted({f"{one['operator']} in {one['dtype']}: {one['detail']}" for one in value["unchecked"]})
    return text + (f"; not checked: {'; '.join(reasons[:SHOWN])}" if reasons else "")


_PRECISIONS = {"bfloat16": "bf16", "float32": "fp32"}
"""What `train.precision` is called for a dtype."""


def _settings(dtype: str, use: Use) -> list[tuple[str, str]]:
    """What a recipe sets in order to compute in a dtype: a precision, or a format of weights."""
    if use == "training":
        return [("train.precision", _PRECISIONS[dtype])] if dtype in _PRECISIONS else []
    formats = [name for name in format_names() if str(get_format(name).dtype).removeprefix("torch.") == dtype]
    return [(key, name) for key in (ROLLOUT_FORMAT, "handoff.format") for name in formats]


def _limits(findings: list[_Failure], needed_for: Use, setting: Setting) -> list[Limit]:
    """If one dtype of several is at fault, and not the one that all work needs, the pool is fit without it.

    fp32 is in every run: norms, routers and optimisers compute in it.
    """
    bad = {one.dtype for one in findings}
    if len(bad) != 1 or bad == {"float32"} or bad == set(run_dtypes(setting.recipe, setting.chip)):
        return []
    (dtype,) = bad
    reason = f"operators fail in {dtype} alone: {', '.join(sorted({one.operator for one in findings})[:SHOWN])}"
    return [
        Limit(setting=key, excluded=[value], reason=reason, needed_for=needed_for)
        for key, value in _settings(dtype, needed_for)
    ]


@dataclass
class _Keeper:
    """Writes failure cases, each cut down to one operator if it fails alone."""

    crew: Crew
    setting: Setting
    called: Called
    arguments: dict[str, Any]
    kept: dict[int, str] | None = None

    def keep(self, findings: list[_Failure]) -> str:
        """The folder of the case of the first finding. Cases of a few more are written beside it."""
        self.kept = self.kept or {}
        for one in findings[:CASES]:
            if one.call not in self.kept:
                self.kept[one.call] = self._write(one)
        return self.kept[findings[0].call]

    def _write(self, finding: _Failure) -> str:
        trusted = self.arguments["trusted"]
        if trusted is not None:
            trusted = {
                key: one for key, one in trusted.items() if key.startswith(f"{finding.operator} {finding.dtype} ")
            }
        alone = {
            **self.arguments,
            "calls": [self.arguments["calls"][finding.call]],
            "dtypes": [finding.dtype],
            "trusted": trusted,
        }
        self.crew.stop()
        again = self.crew.call(OPERATORS, alone, deadline_s=DEADLINE_S, stall_s=self.setting.stall_s)
        fails = not again.ok or any(value["failed"] for value in again.values)
        note = "" if fails else " (in the whole list of calls; alone it did not fail again)"
        return self.setting.keep_failure(
            self.crew,
            again if fails else self.called,
            probe="operators on the chip",
            title=f"{finding.operator} in {finding.dtype}: {finding.kind}",
            function=OPERATORS,
            arguments=alone if fails else self.arguments,
            expected="the result of float64 on the host within rounding, the same bits each time and on each chip",
            observed=f"{finding}{note}",
        )


def _broken(
    crew: Crew, setting: Setting, called: Called, name: str, function: str, arguments: dict[str, Any], use: Use = "both"
) -> Evidence:
    """A call that crashed, hung or raised."""
    failure = setting.keep_failure(
        crew,
        called,
        probe=name.partition(":")[0],
        title=f"{name}: {called.describe()[:120]}",
        function=function,
        arguments=arguments,
        expected="an answer from every rank",
        observed=called.describe(),
    )
    return _finding(name, "fail", called.describe(), ranks=called.culprits(), failure=failure, needed_for=use)


def longest_sum(recipe: Recipe) -> int:
    """The longest contraction of the recipe's model, at least 4096."""
    model = recipe.model
    widths = [model.hidden_size, model.intermediate_size, 4096]
    heads = model.head_size if isinstance(model, GroupedSection) else model.v_head_dim  # pyright: ignore
    return min(LONGEST_SUM, max(*widths, model.num_attention_heads * heads))


def check_traps(crew: Crew, setting: Setting) -> list[Evidence]:
    """The traps, on every rank, and at the end the one after which an accelerator's process is of no more use."""
    dtypes = run_dtypes(setting.recipe, setting.chip)
    arguments = {"names": None, "dtypes": dtypes, "length": longest_sum(setting.recipe), "seed": setting.recipe.seed}
    called = crew.call(TRAPS, arguments, deadline_s=DEADLINE_S, stall_s=setting.stall_s)
    if not called.ok:
        return [_broken(crew, setting, called, "traps", TRAPS, arguments)]
    traps = [(rank, one) for rank, value in enumerate(called.values) for one in value["traps"]]
    found = [_traps_for(use, traps, called, crew, setting, arguments) for use in ("both", "training")]
    return [*found, _out_of_range(crew, setting)]


def _traps_for(
    use: Use, traps: list[tuple[int, dict[str, Any]]], called: Called, crew: Crew, setting: Setting, arguments: Any
) -> Evidence:
    """The traps that bear on one use. What nothing here depends on is told with those of both."""
    mine = [(rank, one) for rank, one in traps if one["needed_for"] == use]
    bad = [(rank, one) for rank, one in mine if one["failed"]]
    aside = [f"{one['name']}: {one['detail']}" for rank, one in traps if one["failed"] and not one["needed_for"]]
    names = list(dict.fromkeys(one["name"] for _, one in mine))
    detail = f"{len(names)} traps with known answers: {', '.join(names)}"
    failure = None
    if bad:
        detail = "; ".join(f"{one['name']} on rank {rank}: {one['detail']}" for rank, one in bad[:SHOWN])
        failure = setting.keep_failure(
            crew,
            called,
            probe="traps",
            title=bad[0][1]["name"],
            function=TRAPS,
            arguments={**arguments, "names": list(dict.fromkeys(one["name"] for _, one in bad))},
            expected="the answer that arithmetic gives",
            observed=detail,
        )
    if aside and use == "both":
        detail += f"; nothing here depends on it, but {'; '.join(dict.fromkeys(aside))}"
    name, ranks = f"traps of {use}" if use == "training" else "traps", sorted({rank for rank, _ in bad})
    outcome = "fail" if bad else "pass"
    return _finding(name, outcome, detail, len(mine), ranks=ranks, failure=failure, needed_for=use)


def _out_of_range(crew: Crew, setting: Setting) -> Evidence:
    """Whether a wrong target is told. The ranks end afterwards on an accelerator: its context may not outlive it."""
    arguments = {"classes": 5}
    called = crew.call(OUT_OF_RANGE, arguments, deadline_s=DEADLINE_S, stall_s=setting.stall_s)
    name = "out-of-range target"
    crashed = {reply.state for reply in called.replies} <= {"done", "crashed", "stopped"} and not called.ok
    if crew.device != "cpu" and called.ok:
        crew.stop()
    if not called.ok and not (crashed and crew.device != "cpu"):
        return _broken(crew, setting, called, name, OUT_OF_RANGE, arguments, "training")
    bad = [value["detail"] for value in called.values if value["failed"]] if called.ok else []
    failure = None
    if bad:
        failure = setting.keep_failure(
            crew,
            called,
            probe=name,
            title=name,
            function=OUT_OF_RANGE,
            arguments=arguments,
            expected="an error that names the target",
            observed=bad[0],
        )
    told = called.values[0]["error"] if called.ok else f"the process ends ({called.describe()})"
    detail = "; ".join(bad) or f"a target that is no class gives an error: {told}"
    ranks = [rank for rank, value in enumerate(called.values) if value["failed"]] if called.ok else []
    outcome = "fail" if bad else "pass"
    return _finding(name, outcome, detail, crew.world, ranks=ranks, failure=failure, needed_for="training")


def check_compiled(crew: Crew, setting: Setting) -> list[Evidence]:
    """Eager against compiled, under a deadline. A recipe that does not compile is fit within that limit."""
    name = "eager against compiled"
    arguments = {"rows": 24, "width": 32, "dtype": "float32", "seed": setting.recipe.seed}
    limits = []
    if not setting.recipe.train.compile:
        limits = [Limit(setting="train.compile", excluded=["true"], reason="torch.compile does not do what eager does")]
    if setting.pool.rehearsed:
        return [_not_compared(name, "a rehearsed chip's compiler is not here", setting)]
    called = crew.call(COMPILED, arguments, deadline_s=COMPILE_DEADLINE_S)
    if not called.ok:
        return [
            _broken(crew, setting, called, name, COMPILED, arguments, "training").model_copy(update={"limits": limits})
        ]
    value = called.values[0]
    if value["unchecked"]:
        return [_not_compared(name, value["unchecked"], setting)]
    failure = None
    if value["failed"]:
        failure = setting.keep_failure(
            crew,
            called,
            probe=name,
            title=name,
            function=COMPILED,
            arguments=arguments,
            expected="errors against float64 like those of the eager block",
            observed=value["detail"],
        )
    worst = max((compiled for _, compiled in value["errors"].values()), default=0.0)
    detail = value["detail"] or f"a gated block and its gradients, compiled, are within {worst:.1g} of float64"
    outcome, limits, ranks = ("fail", limits, [0]) if value["failed"] else ("pass", [], [])
    samples = len(value["errors"])
    return [_finding(name, outcome, detail, samples, None, limits, ranks, failure, needed_for="training")]


def _not_compared(name: str, why: str, setting: Setting) -> Evidence:
    """Without an answer a recipe that compiles is not known to be fit; another one does not need it."""
    compiles = setting.recipe.train.compile
    detail = f"not checked: {why}" + ("" if compiles else "; this recipe does not compile")
    outcome = "unknown" if compiles else "pass"
    return _finding(name, outcome, detail, needed_for="training")


PROBES: tuple[Probe, ...] = (
    Probe(
        name="operators on the chip",
        aspect="software",
        needed_for="both",
        finds=("nan", "dtype-swap", "fallback", "small-error", "flipped-bit", "crash", "hang"),
        price=_price_of_operators,
        run=check_operators,
    ),
    Probe(
        name="traps",
        aspect="software",
        needed_for="both",
        finds=("dtype-swap", "crash", "hang"),
        price=lambda setting: TRAPS_S * _rounds(setting),
        run=check_traps,
    ),
    Probe(
        name="eager against compiled",
        aspect="software",
        needed_for="training",
        finds=("hang",),
        price=lambda _setting: COMPILE_S,
        run=check_compiled,
    ),
)
