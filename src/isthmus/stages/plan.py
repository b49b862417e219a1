"""Which stage runs on which pool: the recipe's order, cut by what each pool was found fit for.

Training needs a `fit` from a pool that is present: a rehearsal can refuse a pool, never vouch for it. Rollouts and
serving need `serve-only` or better, because the parity gate stands behind them. A pool that is fit with limits is good
for a recipe that keeps to them. Where the recipe says who buys and where, a pool that a rule forbids is refused, and
what needs a licence is said.
"""

from __future__ import annotations

import time
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from isthmus.chips import get_chip, load_chips
from isthmus.errors import GateRefused, IsthmusError
from isthmus.forecast.choose import Pair, choose
from isthmus.forecast.duration import estimate, total
from isthmus.forecast.known import pool_facts
from isthmus.forecast.outlook import Outlook, Outlooks
from isthmus.forecast.pace import PoolFacts
from isthmus.forecast.told import Teller, figure_of
from isthmus.forecast.work import work_of
from isthmus.pools import placed_pools
from isthmus.progress import Watch
from isthmus.recipe.elsewhere import elsewhere_problem
from isthmus.recipe.schema import AimSection, PlacedStage, Recipe
from isthmus.records import Candidate, ForecastRecord, Placement, PlanRecord, QualifyRecord, Rejection, Ruling
from isthmus.rules import NOT_LOOKED_AT, notice, refusal, rule_pools, warning
from isthmus.run import Figure, RunFolder
from isthmus.verdict import ROLLOUT_FORMAT, broken_limits, deciding, describe_limit

NAME = "plan"
NO_RULINGS: Mapping[str, Ruling] = MappingProxyType({})
_NEEDS = {
    "train": "training needs a `fit` from a pool that is present, or a `fit with limits` and a recipe within them",
    "rollout": "rollouts need `serve-only` or better",
    "serve": "serving needs `serve-only` or better",
}


def execute(run: RunFolder, watch: Watch) -> PlanRecord:
    """Place every stage, say what was rejected and why, and estimate how long it all takes."""
    started = time.time()
    run.event(NAME, "start")
    qualified = {
        pool.name: run.require_record(f"qualify/{pool.name}", QualifyRecord, "qualify")
        for pool in placed_pools(run.recipe)
    }
    rulings = rule_pools(run.recipe)
    outlooks = _outlooks(run)
    outlook = outlooks.outlook()
    candidates = aimed(run.recipe, outlook, qualified, rulings or {})
    placements, rejected = place(run.recipe, qualified, rulings or {}, candidates)
    pool_of = {placement.stage: placement.pool for placement in placements}
    parts = {
        "qualify": _spent(qualified),
        **estimate(run.recipe, qualified[pool_of["train"]], qualified[pool_of["rollout"]]),
    }
    record = PlanRecord(
        recipe_sha256=run.recipe.digest(),
        started=started,
        ended=time.time(),
        placements=placements,
        rejected=rejected,
        estimate={**parts, "total": total(parts)},
        rulings=rulings,
        candidates=candidates,
    )
    run.write_record("forecast", _forecast(run, outlooks, outlook, record))
    run.write_record(NAME, record)
    run.event(NAME, "end", seconds=round(record.seconds, 3))
    watch.say("  " + ", ".join(f"{stage} on [bold]{pool}[/]" for stage, pool in pool_of.items()))
    return record


def _outlooks(run: RunFolder) -> Outlooks:
    known, prices = pool_facts(run), run.recipe.aim.prices if run.recipe.aim else {}
    facts = {name: replace(known.get(name, PoolFacts()), price=prices.get(name)) for name in run.recipe.pools}
    return Outlooks(work_of(run.recipe), facts)


def aimed(
    recipe: Recipe,
    outlook: Outlook,
    qualified: Mapping[str, QualifyRecord],
    rulings: Mapping[str, Ruling] = NO_RULINGS,
) -> list[Candidate]:
    """Every pair of pools held against the recipe's aim, one of them chosen; none without an aim."""
    if recipe.aim is None:
        return []
    vendors = {name: get_chip(section.chip).vendor for name, section in recipe.pools.items()}
    makers = {get_chip(slug).vendor for slug in load_chips()}
    if unknown := sorted(set(recipe.aim.least) - makers):
        raise IsthmusError(
            f"aim.least names {', '.join(unknown)}; the vendors of chips are {', '.join(sorted(makers))}"
        )

    objections = {stage: _objections(recipe, stage, qualified, rulings) for stage in ("train", "rollout")}
    pairs = choose(work_of(recipe), outlook, recipe.aim, lambda stage, pool: objections[stage][pool], vendors)
    return [_candidate(pair, recipe.aim.currency) for pair in pairs]


def _candidate(pair: Pair, currency: str) -> Candidate:
    source = "forecast of all steps; P50, with P10 and P90" if pair.hours else pair.why or "no forecast"
    return Candidate(
        train=pair.train,
        rollout=pair.rollout,
        hours=figure_of(pair.hours, "h", source),
        chip_hours=figure_of(pair.chip_hours, "chip-hours", source),
        cost=figure_of(pair.cost, currency, source),
        shares=pair.shares,
        chosen=pair.chosen,
        keeps_aim=pair.keeps_aim,
        why=pair.why,
    )


def _forecast(run: RunFolder, outlooks: Outlooks, outlook: Outlook, plan: PlanRecord) -> ForecastRecord:
    aim = run.recipe.aim or AimSection()
    chosen = (plan.pool_of("train"), plan.pool_of("rollout"))
    found = Teller(outlooks, outlook, *chosen, aim.prices, aim.currency).acts()
    return ForecastRecord(recipe_sha256=plan.recipe_sha256, started=plan.started, ended=plan.ended, steps=found)


def place(
    recipe: Recipe,
    qualified: Mapping[str, QualifyRecord],
    rulings: Mapping[str, Ruling] = NO_RULINGS,
    candidates: Sequence[Candidate] = (),
) -> tuple[list[Placement], list[Rejection]]:
    """The pool of each stage: of the chosen candidate, else the first acceptable one in the stage's order.

    Raises GateRefused, with every reason, if a stage has none.
    """
    by_aim = next((one for one in candidates if one.chosen), None)
    objections = {stage: _objections(recipe, stage, qualified, rulings) for stage in typing.get_args(PlacedStage)}
    placements: list[Placement] = []
    rejected: list[Rejection] = []
    for stage in typing.get_args(PlacedStage):
        order: list[str] = getattr(recipe.place, stage)
        first = next((name for name in order if objections[stage][name] is None), None)
        chosen = first if by_aim is None or stage == "serve" else getattr(by_aim, stage)
        if chosen is None:
            raise GateRefused(_nowhere(stage, order, objections[stage], qualified))
        asked = warning(rulings.get(chosen))
        found = _reason(order, chosen, qualified[chosen]) if chosen == first else _by_aim(qualified[chosen])
        told = [found, asked, "" if stage == "serve" else _undecided(recipe, by_aim)]
        reason = "; ".join(filter(None, told))
        if recipe.drill is not None and stage == "train" and qualified[chosen].rehearsed:
            reason += "; in a drill it may train all the same"
        placements.append(Placement(stage=stage, pool=chosen, reason=reason))
        pairs = [] if stage == "serve" else _to_tell(candidates, stage, objections, recipe)
        others = [name for name in order if name != chosen]
        rejected += [_rejection(stage, name, chosen, objections[stage][name], pairs) for name in others]
    return placements, rejected


def _objections(
    recipe: Recipe, stage: str, qualified: Mapping[str, QualifyRecord], rulings: Mapping[str, Ruling]
) -> dict[str, str | None]:
    """By pool of the stage's order: why it may not run there."""
    order: list[str] = getattr(recipe.place, stage)
    return {name: refusal(rulings.get(name)) or objection(stage, qualified[name], recipe) for name in order}


def _undecided(recipe: Recipe, by_aim: Candidate | None) -> str:
    """What is said where the aim asks for numbers and no pair of pools has any."""
    if by_aim is None or recipe.aim is None or recipe.aim.choose == "order" or by_aim.hours.value is not None:
        return ""
    return f"the order decided, for [aim] has no numbers to choose by: {by_aim.why}"


def _to_tell(
    candidates: Sequence[Candidate], stage: str, objections: Mapping[str, Mapping[str, str | None]], recipe: Recipe
) -> list[Candidate]:
    """Pairs that lost, those first that lost by least; none that lost only by what stands against the other pool."""
    other = "rollout" if stage == "train" else "train"

    def weight(one: Candidate) -> tuple[bool, float]:
        figure = one.cost if recipe.aim is not None and recipe.aim.choose == "cost" else one.hours
        return figure.value is None, figure.value or 0.0

    lost = [one for one in candidates if not one.chosen and objections[other][getattr(one, other)] is None]
    return sorted(lost, key=weight)


def objection(stage: str, pool: QualifyRecord, recipe: Recipe) -> str | None:
    """Why a stage may not run on a pool; None if it may."""
    use = "training" if stage == "train" else "serving"
    accepted = ("fit", "fit with limits") if use == "training" else ("fit", "fit with limits", "serve-only")
    if use == "training" and pool.rehearsed and recipe.drill is not None:
        return None
    if use == "training" and (pool.rehearsed or not pool.present):
        return (
            f"it is rehearsed, and a rehearsal can refuse a pool, never vouch for it; its verdict is `{pool.verdict}`"
        )
    if stage == "rollout" and recipe.pools[pool.pool].engines and (why := elsewhere_problem(recipe)):
        return f"its engines are elsewhere: {why}"
    if pool.verdict not in accepted:
        return f"its verdict is `{pool.verdict}`: {_reason_of(pool, use)}"
    elsewhere = {"rollout": "handoff.", "serve": ROLLOUT_FORMAT}.get(stage)
    limits = [limit for limit in pool.limits if elsewhere is None or not limit.setting.startswith(elsewhere)]
    broken = broken_limits(limits, recipe, pool.pool, use)
    return (
        f"its verdict is `{pool.verdict}`, and the recipe does not keep to it: {'; '.join(broken)}" if broken else None
    )


def _reason_of(pool: QualifyRecord, use: str) -> str:
    """The finding that decided."""
    decided = deciding(pool.evidence, use)
    if decided is not None:
        return f"{decided.name}: {decided.detail}"
    return pool.reasons[0] if pool.reasons else "no reason was recorded"


def _reason(order: list[str], chosen: str, pool: QualifyRecord) -> str:
    if order[0] == chosen:
        return f"the recipe's first choice, {_verdict_of(pool)}"
    earlier = ", ".join(order[: order.index(chosen)])
    return f"{_verdict_of(pool)}; {earlier} stands before it in the recipe, and was refused"


def _by_aim(pool: QualifyRecord) -> str:
    return f"chosen by [aim] before those that stand first in the recipe; {_verdict_of(pool)}"


def _verdict_of(pool: QualifyRecord) -> str:
    """With its limits, and who stands behind it."""
    found = f"{'rehearsed as' if pool.rehearsed else 'found'} `{pool.verdict}`"
    gate = ", and the parity gate stands behind it" if pool.verdict == "serve-only" else ""
    kept = f", which the recipe keeps to ({'; '.join(map(describe_limit, pool.limits))})" if pool.limits else ""
    return f"{found}{kept}{gate}"


def _rejection(stage: str, name: str, chosen: str, why: str | None, pairs: Sequence[Candidate]) -> Rejection:
    """Why not; by the aim's numbers where it was held against them, those of the first of the pairs that has it."""
    by_aim = next((one.why for one in pairs if getattr(one, stage) == name and one.why), None)
    lost = by_aim and f"acceptable, and {by_aim}"
    return Rejection(
        stage=stage,
        pool=name,
        reason=why or lost or f"acceptable, but {chosen} comes first in the recipe's order",
        acceptable=why is None,
    )


def _nowhere(
    stage: str, order: list[str], objections: Mapping[str, str | None], qualified: Mapping[str, QualifyRecord]
) -> str:
    lines = [f"no pool of place.{stage} is acceptable: {_NEEDS[stage]}."]
    lines += [f"  {name} ({qualified[name].chip}): {objections[name]}" for name in order]
    untried = f'add a pool that is present to place.{stage}, for example one with chip = "cpu"'
    lines.append(
        f"Either {untried}, or mend what the verdict names and qualify again (`isthmus qualify RUN --again`); "
        "`isthmus chips` lists the known chips."
    )
    return "\n".join(lines)


def _spent(qualified: Mapping[str, QualifyRecord]) -> Figure:
    """Qualification is over when the plan is made: what it took."""
    seconds = sum(record.seconds for record in qualified.values())
    source = f"records of {', '.join(qualified)}, already done"
    return Figure(value=seconds, unit="s", kind="measured", source=source)


def render(record: PlanRecord) -> RenderableType:
    """Placements, what lost and why, and the estimate."""
    placed = Table(box=box.SIMPLE_HEAD)
    for title in ("stage", "pool", "why"):
        placed.add_column(title, overflow="fold")
    for placement in record.placements:
        placed.add_row(f"[bold]{placement.stage}[/]", f"[green]{escape(placement.pool)}[/]", escape(placement.reason))
    for rejection in record.rejected:
        placed.add_row(rejection.stage, f"[red]not {escape(rejection.pool)}[/]", escape(rejection.reason), style="dim")
    held = [_render_candidates(record.candidates)] if record.candidates else []
    return Group(placed, *held, _render_rulings(record), _render_estimate(record.estimate))


def _render_candidates(candidates: Sequence[Candidate]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="pairs of pools and the aim", title_justify="left", title_style="bold")
    for title in ("train, rollouts", "hours P50 [P10, P90]", "cost", "why not"):
        table.add_column(title, overflow="fold")
    for one in candidates:
        pair = escape(f"{one.train}, {one.rollout}")
        told = ("unknown" if figure.value is None else str(figure) for figure in (one.hours, one.cost))
        table.add_row(f"[green]{pair}[/]" if one.chosen else pair, *map(escape, told), escape(one.why) or "chosen")
    return table


def _render_rulings(record: PlanRecord) -> RenderableType:
    if record.rulings is None:
        return Text(NOT_LOOKED_AT, style="dim")
    table = Table(box=box.SIMPLE_HEAD, title="rules", title_justify="left", title_style="bold")
    for title in ("pool", "chip", "class", "answer"):
        table.add_column(title, overflow="fold")
    for pool, ruling in record.rulings.items():
        held = f" (the buyer names {ruling.licence})" if ruling.licence else ""
        table.add_row(escape(pool), ruling.chip, ruling.export_class, escape(f"{ruling.answer}{held}"))
    return Group(table, *(Text(line, style="dim") for line in dict.fromkeys(map(notice, record.rulings.values()))))


def _render_estimate(parts: Mapping[str, Figure]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="estimate", title_justify="left", title_style="bold")
    for title in ("stage", "P50", "P10", "P90", "kind"):
        table.add_column(title, justify="left" if title in ("stage", "kind") else "right")
    for stage, figure in parts.items():
        table.add_row(stage, *(_seconds(value) for value in (figure.value, figure.low, figure.high)), figure.kind)
    return table


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f} s" if value < 600 else f"{value / 60:,.0f} min"
