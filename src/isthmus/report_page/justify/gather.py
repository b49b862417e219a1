"""From a run folder to the record of its justification."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import get_args

from isthmus import __version__
from isthmus.chips import get_chip
from isthmus.chips.trade import trade_facts
from isthmus.pools import get_pool, placed_pools
from isthmus.records import CheckOutcome, Evidence, ForecastOption, HandoffRecord, PlanRecord, QualifyRecord, Ruling
from isthmus.report_page.acts import TRAINING, Act, acts_of, alternatives
from isthmus.report_page.justify.record import (
    ActOf,
    AspectOf,
    CaseOf,
    Gap,
    JustifyRecord,
    Objection,
    PoolOf,
    Sealed,
    Side,
    SideShare,
    Trial,
)
from isthmus.report_page.summary import TASK, signer_of
from isthmus.rules import refusal
from isthmus.run import Figure, RunFolder
from isthmus.verdict import QUESTIONS, broken_limits

FORECAST = ("pretrain", "sft", "learn", "rollout", "sample")
"""Acts that a forecast tells of; the hand-off and serving have none."""


def gather(run: RunFolder, country: str) -> JustifyRecord:
    """All that the paper says, for an authority of a country. Raises IsthmusError if there is no plan."""
    started = time.time()
    plan = run.require_record("plan", PlanRecord, "plan")
    pools = {pool.name: _pool(run, pool.name, country) for pool in placed_pools(run.recipe)}
    qualified = {name: run.require_record(f"qualify/{name}", QualifyRecord, "qualify") for name in pools}
    forecast = alternatives(run)
    acts = acts_of(run, plan)
    used = [_act(act, pools[act.pool], forecast) for act in acts]
    foreign = [act for act in acts if pools[act.pool].side != "domestic"]
    cases = [_case(run, plan, act, pools, qualified, forecast) for act in foreign]
    gate = _gate(run)
    return JustifyRecord(
        recipe_sha256=run.recipe.digest(),
        started=started,
        ended=time.time(),
        run=run.recipe.name,
        country=country,
        as_of=run.recipe.rules.as_of if run.recipe.rules else None,
        pools=[pools[name] for name in dict.fromkeys(act.pool for act in acts)],
        acts=used,
        sides=_shares(used),
        cases=cases,
        rulings=plan.rulings,
        gate=gate,
        gaps=_gaps(plan, pools, used, cases, gate),
        isthmus=__version__,
    )


def _pool(run: RunFolder, name: str, country: str) -> PoolOf:
    pool = get_pool(run.recipe, name)
    chip = get_chip(pool.chip)
    maker = trade_facts().makers.get(chip.vendor)
    side: Side = "unlisted" if maker is None else "domestic" if maker == country else "foreign"
    return PoolOf(
        pool=name,
        chip=pool.chip,
        chip_name=chip.name,
        count=pool.count,
        maker=maker,
        side=side,
        rehearsed=pool.rehearsed,
    )


def _act(act: Act, pool: PoolOf, forecast: Mapping[tuple[str, str], ForecastOption]) -> ActOf:
    money = forecast.get((act.name, act.pool), ForecastOption(pool=act.pool)).money if act.whole else None
    return ActOf(
        name=act.name,
        kind=act.kind,
        placed=act.placed,
        pool=act.pool,
        side=pool.side,
        chip_hours=_chip_hours(act.seconds, pool.count),
        tokens=act.tokens,
        money=money,
    )


def _chip_hours(seconds: Figure | None, chips: int) -> Figure | None:
    if seconds is None or seconds.value is None:
        return None
    low, high = (None if end is None else end * chips / 3600 for end in (seconds.low, seconds.high))
    source = f"{chips} chips x ({seconds.source})"
    return Figure.derived(seconds.value * chips / 3600, "chip-hours", source, seconds, low=low, high=high)


def _shares(acts: Sequence[ActOf]) -> list[SideShare]:
    """The parts of each side. Money is added up only where every act that takes time has a price."""
    sides: list[Side] = ["domestic", "foreign", "unlisted"]
    timed = [act for act in acts if act.kind != "serve"]
    totals = {
        (side, key): _total(getattr(act, key) for act in timed if act.side == side)
        for side in sides
        for key in ("chip_hours", "tokens", "money")
    }
    all_timed = all(act.chip_hours is not None for act in timed)
    all_priced = all(act.money is not None for act in timed)

    def share(side: Side, key: str, known: bool) -> float | None:
        values = {one: total.value or 0.0 for one in sides if (total := totals[one, key]) is not None}
        whole = math.fsum(values.values())
        return values.get(side, 0.0) / whole if known and whole > 0 else None

    return [
        SideShare(
            side=side,
            chip_hours=totals[side, "chip_hours"],
            chip_hours_share=share(side, "chip_hours", all_timed),
            tokens=totals[side, "tokens"],
            tokens_share=share(side, "tokens", True),
            money=totals[side, "money"] if all_priced else None,
            money_share=share(side, "money", all_priced),
        )
        for side in sides
        if any(act.side == side for act in acts)
    ]


def _total(figures: Iterable[Figure | None]) -> Figure | None:
    known = [figure for figure in figures if figure is not None and figure.value is not None]
    if not known:
        return None
    value = math.fsum(figure.value for figure in known if figure.value is not None)
    return Figure.derived(value, known[0].unit, "sum over the acts of this side", *known)


def _case(
    run: RunFolder,
    plan: PlanRecord,
    act: Act,
    pools: Mapping[str, PoolOf],
    qualified: Mapping[str, QualifyRecord],
    forecast: Mapping[tuple[str, str], ForecastOption],
) -> CaseOf:
    rulings = plan.rulings or {}
    here = forecast.get((act.name, act.pool), ForecastOption(pool=act.pool))
    domestic = [pool for pool in pools.values() if pool.side == "domestic"]
    there = [found for pool in domestic if (found := forecast.get((act.name, pool.pool))) is not None]
    trials = [
        _trial(run, act, pool, qualified[pool.pool], rulings.get(pool.pool), forecast.get((act.name, pool.pool)))
        for pool in domestic
    ]
    look_again, because = _look_again(
        [rulings[name] for name in (act.pool, *(p.pool for p in domestic)) if name in rulings]
    )
    return CaseOf(
        act=act.name,
        kind=act.kind,
        pool=pools[act.pool],
        verdict=qualified[act.pool].verdict,
        seconds=here.seconds or act.seconds,
        chip_hours=here.chip_hours,
        money=here.money,
        trials=trials,
        flips=[*here.flips, *(flip for one in there for flip in one.flips)],
        look_again=look_again,
        because=because,
    )


def _trial(
    run: RunFolder,
    act: Act,
    pool: PoolOf,
    record: QualifyRecord,
    ruling: Ruling | None,
    expected: ForecastOption | None,
) -> Trial:
    use = "training" if act.kind in TRAINING else "serving"
    return Trial(
        pool=pool,
        verdict=record.verdict,
        outcome=_outcome(record, use),
        objection=_objection(run, act, pool, record, ruling, use),
        limits=[limit for limit in record.limits if limit.needed_for in (use, "both")],
        rule=refusal(ruling),
        seconds=expected.seconds if expected else None,
        chip_hours=expected.chip_hours if expected else None,
        money=expected.money if expected else None,
    )


def _objection(
    run: RunFolder, act: Act, pool: PoolOf, record: QualifyRecord, ruling: Ruling | None, use: str
) -> Objection:
    """What stands first against a domestic pool: the law, the recipe, the evidence, then the order of preference."""
    if refusal(ruling) is not None:
        return "rule"
    if pool.pool not in getattr(run.recipe.place, act.placed):
        return "not listed"
    if use == "training" and (pool.rehearsed or not record.present):
        return "rehearsed"
    accepted = ("fit", "fit with limits") if use == "training" else ("fit", "fit with limits", "serve-only")
    if record.verdict not in accepted:
        return "verdict"
    return "limits" if broken_limits(record.limits, run.recipe, pool.pool, use) else "order"


def _outcome(record: QualifyRecord, use: str) -> list[AspectOf]:
    scores = {score.aspect: score for score in record.scores}
    found = []
    for aspect in QUESTIONS:
        evidence = [one for one in record.evidence if one.aspect == aspect and one.needed_for in (use, "both")]
        if aspect not in scores:
            continue
        found.append(
            AspectOf(
                aspect=aspect,
                outcome=scores[aspect].outcome,
                passed=scores[aspect].passed,
                findings=scores[aspect].findings,
                looked_for=scores[aspect].looked_for,
                kinds=sorted({figure.kind for one in evidence for figure in one.figures.values()}),
                against=[one.name for one in evidence if _stands_against(one)],
            )
        )
    return found


def _stands_against(finding: Evidence) -> bool:
    return finding.outcome in ("fail", "unknown")


def _look_again(rulings: Sequence[Ruling]) -> tuple[date | None, str | None]:
    """The first day on which a record that binds has to be looked at again, and which; None if none binds."""
    binding = [(found.expires, found.record) for one in rulings for found in one.findings if found.effect != "note"]
    return min(binding, default=(None, None))


def _gate(run: RunFolder) -> Sealed | None:
    record = run.read_record("parity", HandoffRecord)
    if record is None:
        return None
    every: tuple[CheckOutcome, ...] = get_args(CheckOutcome)
    outcomes: dict[CheckOutcome, int] = {
        outcome: sum(check.outcome == outcome for check in record.checks) for outcome in every
    }
    accuracy = [check.figure for check in record.checks if check.name.endswith(TASK)]
    return Sealed(
        verdict=record.verdict,
        rehearsed=run.recipe.pools[record.target_pool].rehearsed,
        checks=len(record.checks),
        held=outcomes.get("pass", 0),
        outcomes=outcomes,
        seal_id=record.seal_id,
        signer=signer_of(run, record),
        accuracy=accuracy[-1] if accuracy else None,
    )


def _gaps(
    plan: PlanRecord,
    pools: Mapping[str, PoolOf],
    acts: Sequence[ActOf],
    cases: Sequence[CaseOf],
    gate: Sealed | None,
) -> list[Gap]:
    timed = [act for act in acts if act.kind != "serve"]
    found: dict[Gap, bool] = {
        "no rules": plan.rulings is None,
        "no domestic pool": bool(cases) and not any(pool.side == "domestic" for pool in pools.values()),
        "no forecast": any(trial.seconds is None for case in cases if case.kind in FORECAST for trial in case.trials),
        "no money": any(act.money is None for act in timed),
        "rehearsed": any(pool.rehearsed for pool in pools.values()),
        "unfinished": gate is None or any(act.chip_hours is None or act.chip_hours.kind == "forecast" for act in timed),
        "not sealed": gate is not None and gate.seal_id is None,
        "not signed": gate is not None and gate.seal_id is not None and gate.signer is None,
    }
    return [gap for gap, holds in found.items() if holds]
