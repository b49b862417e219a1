"""The forecast: which step runs where and how long, when it ends, what it costs, and what would change that."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from isthmus.errors import IsthmusError, suggestion
from isthmus.forecast.calibrate import calibrate, parse_point, read_calibrations, write_calibration
from isthmus.forecast.check import Score, scores
from isthmus.forecast.known import pool_facts
from isthmus.forecast.outlook import Option, Outlook, Outlooks, Span
from isthmus.forecast.pace import PoolFacts
from isthmus.forecast.points import Calibration
from isthmus.forecast.sensitivity import Bar, BreakEven, break_evens, tornado
from isthmus.forecast.serving import Serving, serving_of
from isthmus.forecast.work import Work, work_of
from isthmus.progress import Watch
from isthmus.recipe.read import apply_override, load_recipe, resolved_recipe
from isthmus.recipe.schema import Recipe
from isthmus.recipe.section import RecipeError
from isthmus.records import PlanRecord
from isthmus.run import RunFolder, meant_run, write_atomic


@dataclass(frozen=True)
class Question:
    """A recipe with what is known of its pools, and its outlook."""

    work: Work
    facts: dict[str, PoolFacts]
    outlooks: Outlooks
    outlook: Outlook
    serving: list[Serving]


@dataclass(frozen=True)
class ForecastReport:
    """What `isthmus forecast` found. `changed` is the outlook with --what-if, where that was asked."""

    question: Question
    changed: Question | None
    bars: list[Bar]
    evens: list[BreakEven]
    start: datetime

    def as_json(self) -> dict[str, Any]:
        """Everything, with units in the names: hours `_h`, seconds `_s`, GB `_gb`."""
        found: dict[str, Any] = {
            "recipe": self.question.work.name,
            "kind": "forecast",
            "start": self.start.isoformat(),
            **_outlook_json(self.question.outlook, self.start),
            "serving": [asdict(one) for one in self.question.serving],
            "tornado": [asdict(bar) for bar in self.bars],
            "break_even": [asdict(even) for even in self.evens],
        }
        if self.changed is not None:
            found["what_if"] = _outlook_json(self.changed.outlook, self.start)
        return found


def execute(
    target: Path,
    watch: Watch,
    *,
    overrides: Sequence[str] = (),
    what_if: Sequence[str] = (),
    prices: Sequence[str] = (),
    spares: Sequence[str] = (),
    calibration: Path | None = None,
    start: datetime | None = None,
    as_json: bool = False,
    csv_file: Path | None = None,
) -> ForecastReport:
    """Forecast a recipe, or a run folder with what its pools were found to do, and print or write it."""
    recipe, folder = _read(target, overrides)
    known = pool_facts(RunFolder.open(folder)) if folder is not None else {}
    given = (_amounts("--price", prices, recipe), _amounts("--spares", spares, recipe))
    measured = read_calibrations(calibration) if calibration is not None else {}
    question = _ask(recipe, known, *given, measured)
    changed = _ask(_changed(recipe, what_if), known, *given, measured) if what_if else None
    report = ForecastReport(
        question,
        changed,
        tornado(question.outlooks, question.outlook),
        break_evens(question.outlooks, question.outlook),
        start or datetime.now(UTC),
    )
    if csv_file is not None:
        write_atomic(csv_file, _csv(question.outlook).encode())
    if as_json:
        watch.console.print_json(json.dumps(report.as_json()))
    else:
        watch.console.print(render(report))
    return report


def _ask(
    recipe: Recipe,
    known: Mapping[str, PoolFacts],
    prices: Mapping[str, float],
    spares: Mapping[str, float],
    measured: Mapping[str, tuple[str, Calibration]],
) -> Question:
    work = work_of(recipe)
    facts: dict[str, PoolFacts] = {}
    for name, pool in work.pools.items():
        chip, found = measured.get(name, (pool.chip, Calibration()))
        if chip != pool.chip:
            raise IsthmusError(
                f"the calibration of the pool {name!r} was measured on {chip}, and the recipe has {pool.chip} there"
            )
        facts[name] = replace(
            known.get(name, PoolFacts()),
            price=prices.get(name),
            spares=int(spares.get(name, 0)),
            calibration=found,
        )
    outlooks = Outlooks(work, facts)
    serving = [serving_of(work, outlooks.pools[name]) for name in work.serve]
    return Question(work, facts, outlooks, outlooks.outlook(), serving)


def _read(target: Path, overrides: Sequence[str]) -> tuple[Recipe, Path | None]:
    if not target.is_dir():
        return load_recipe(target, tuple(overrides)), None
    if overrides:
        raise IsthmusError("--set goes with a recipe; a run folder keeps the recipe it was made from. Try --what-if")
    run = RunFolder.open(meant_run(target))
    return run.recipe, run.path


def _changed(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    tree = recipe.model_dump(mode="json", by_alias=True)
    for change in changes:
        apply_override(tree, change)
    try:
        return resolved_recipe(tree)
    except RecipeError as error:
        raise RecipeError(f"with --what-if {' '.join(changes)}, {error}") from None


def _amounts(option: str, given: Sequence[str], recipe: Recipe) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in given:
        name, _, amount = text.partition("=")
        if name not in recipe.pools:
            raise IsthmusError(f"{option} {text!r}: no pool {name!r}{suggestion(name, list(recipe.pools))}")
        try:
            found[name] = float(amount)
        except ValueError:
            raise IsthmusError(f"{option} {text!r}: write {option} POOL=NUMBER") from None
        if not 0.0 <= found[name] < 1e9:
            raise IsthmusError(f"{option} {text!r}: the number has to be 0 or more")
    return found


def run_calibrate(target: Path, watch: Watch, *, pool: str, points: Sequence[str], out: Path) -> Calibration:
    """Learn from measured points of a pool, and keep it in a file that `--calibration` reads."""
    recipe, _ = _read(target, ())
    work = work_of(recipe)
    if pool not in work.pools:
        raise IsthmusError(f"no pool {pool!r} in the recipe{suggestion(pool, list(work.pools))}")
    found = calibrate(Outlooks(work, {}), pool, [parse_point(text) for text in points])
    of = work.pools[pool]
    write_calibration(out, recipe.name, pool, of.chip, of.count, found)
    watch.say(
        f"{pool}: {found.factor:.3g} times the forecast time and {found.overhead_s:.3g} s per update, from "
        f"{found.points} point{'s' * (found.points > 1)}; written to {out}"
    )
    return found


def run_check(folder: Path, watch: Watch, *, as_json: bool) -> list[Score]:
    """Score a finished run's own forecast, part by part."""
    run = RunFolder.open(meant_run(folder))
    plan = run.require_record("plan", PlanRecord, "plan")
    found = scores(run.path, plan.estimate)
    if as_json:
        content = [{**asdict(one), "inside": one.inside, "error": one.error} for one in found]
        watch.console.print_json(json.dumps(content))
    else:
        watch.console.print(_score_table(found))
    return found


def render(report: ForecastReport) -> RenderableType:
    """Options, calendar, what matters and where decisions flip."""
    outlook = report.question.outlook
    parts: list[RenderableType] = [_options(outlook.options), _calendar_table(outlook, report.start)]
    if report.question.serving:
        parts.append(_serving(report.question.serving))
    if report.changed is not None:
        parts.append(_what_if(outlook, report.changed.outlook))
    if report.bars:
        parts.append(_tornado_table(report.bars))
    if report.evens:
        parts.append(_even_table(report.evens))
    return Group(*parts)


def _options(options: Sequence[Option]) -> RenderableType:
    """What each step would take where it can run; below, on what that rests, and why it cannot run elsewhere."""
    possible = [one for one in options if one.hours is not None]
    impossible = [one for one in options if one.hours is None]
    rests: dict[str, list[str]] = {}
    for one in possible:
        rests.setdefault(one.basis, []).append(f"{one.step} on {_place(one)}")
    parts: list[RenderableType] = [_option_table(possible)] if possible else []
    parts += [Text(f"  {'; '.join(which)}: {basis}", style="dim") for basis, which in rests.items()]
    why = _reasons((f"{one.step} on {_place(one)}", one.why) for one in impossible)
    return Group(*parts, *why)


def _reasons(found: Iterable[tuple[str, str]]) -> list[RenderableType]:
    """What cannot run or is not known, those with one reason together."""
    whose: dict[str, list[str]] = {}
    for name, why in found:
        whose.setdefault(why, []).append(name)
    lines = [Padding(Text(f"{'; '.join(names)}: {why}"), (0, 0, 0, 2)) for why, names in whose.items()]
    return [Text("cannot run, or is not known", style="bold"), *lines] if lines else []


def _place(option: Option) -> str:
    alone = option.generator in (None, option.pool)
    return option.pool if alone else f"{option.pool}, rollouts on {option.generator}"


def _option_table(options: Sequence[Option]) -> Table:
    table = _table("forecast", ("step", "pool", "chips", "P50", "P10", "P90", "chip-h", "GB", "useful"))
    for one in options:
        assert one.hours is not None and one.chip_hours is not None and one.goodput is not None
        pool = escape(_place(one))
        table.add_row(
            f"[bold]{one.step}[/]" if one.chosen else one.step,
            f"[green]{pool}[/]" if one.chosen else pool,
            f"{one.chips:,}",
            *(_time(value) for value in (one.hours.middle, one.hours.low, one.hours.high)),
            _short(one.chip_hours.middle),
            "-" if one.memory_gb is None else _short(one.memory_gb),
            f"{one.goodput.share:.0%}",
        )
    return table


def _calendar_table(outlook: Outlook, start: datetime) -> RenderableType:
    table = _table(
        "calendar (UTC), from the first that can run each step", ("step", "P50", "P10", "P90", "cost", "kWh")
    )
    for one in outlook.chosen():
        span = outlook.ends[one.step]
        cost = "-" if one.cost is None else f"{one.cost.middle:,.0f}"
        kwh = "-" if one.kwh is None else f"{one.kwh:,.0f}"
        table.add_row(
            escape(one.step), *(_date(start, hours) for hours in (span.middle, span.low, span.high)), cost, kwh
        )
    if outlook.total is None:
        words = "The recipe as a whole has no forecast: a step has no pool that can run it, or none known."
        return Group(table, words) if table.rows else Text(words)
    total = outlook.total
    cost = "-" if outlook.cost is None else f"{outlook.cost.middle:,.0f}"
    kwh = "-" if outlook.kwh is None else f"{outlook.kwh:,.0f}"
    table.add_row("all", *(_time(hours) for hours in (total.middle, total.low, total.high)), cost, kwh, style="bold")
    missing = [] if outlook.cost is not None else ["No price is assumed: give --price POOL=NUMBER per chip-hour."]
    return Group(table, *missing)


def _serving(found: Sequence[Serving]) -> RenderableType:
    """What each pool serves; below, what cannot serve and why."""
    columns = ("pool", "chips", "engine", "at once", "bound", "ms/token", "answers", "prompts", "per M")
    table = _table("serving, requests of 2,048 tokens and 1,024 back, tokens/s", columns)
    for one in found:
        if one.sequences is None:
            continue
        assert one.token_ms is not None and one.answer_tokens_per_s is not None and one.prompt_tokens_per_s is not None
        table.add_row(
            escape(one.pool),
            f"{one.chips:,}",
            f"{one.engine_chips:,}",
            f"{one.sequences:,}",
            one.bound,
            f"{one.token_ms:.3g}",
            _short(one.answer_tokens_per_s),
            _short(one.prompt_tokens_per_s),
            "-" if one.cost_per_million is None else f"{one.cost_per_million:,.3g}",
        )
    why = _reasons((f"serving on {one.pool}", one.why) for one in found if one.sequences is None)
    return Group(*([table] if table.rows else []), *why)


def _what_if(now: Outlook, then: Outlook) -> RenderableType:
    table = _table("what if", ("", "P50", "P10", "P90", "chip-hours"))
    lines: list[Text] = []
    for name, outlook in (("as it stands", now), ("what if", then)):
        if outlook.total is None or outlook.chip_hours is None:
            done = {option.step for option in outlook.chosen()}
            stuck = next(option for option in outlook.options if option.step not in done)
            lines.append(Text(f"{name}: cannot run: {stuck.step} on {_place(stuck)}: {stuck.why}"))
            continue
        spans = (outlook.total.middle, outlook.total.low, outlook.total.high)
        table.add_row(name, *(_time(hours) for hours in spans), _short(outlook.chip_hours.middle))
    return Group(*([table] if table.rows else []), *lines)


def _tornado_table(bars: Sequence[Bar]) -> Table:
    table = _table(
        "what matters: the whole recipe, all else as expected", ("assumption", "factor", "then", "factor", "then")
    )
    for bar in bars:
        table.add_row(
            bar.assumption,
            f"{bar.low_factor:g}",
            _time(bar.at_low_h),
            f"{bar.high_factor:g}",
            _time(bar.at_high_h),
        )
    return table


def _even_table(evens: Sequence[BreakEven]) -> Table:
    table = _table("where the choice flips", ("step", "chosen", "rather than", "at"))
    for even in evens:
        at = f"{even.value:.3g} {even.meaning}" if even.value is not None else f"nowhere: no value {even.meaning}"
        table.add_row(even.step, escape(even.chosen), escape(even.other), escape(at))
    return table


def _score_table(found: Sequence[Score]) -> Table:
    table = _table("forecast against truth", ("part", "P50", "P10", "P90", "took", "P50 off by", "within P10 to P90"))
    for one in found:
        times = (
            "-" if value is None else _time(value / 3600.0) for value in (one.middle, one.low, one.high, one.truth)
        )
        error = "-" if one.error is None else f"{one.error:+.0%}"
        table.add_row(one.part, *times, error, {None: "-", True: "yes", False: "no"}[one.inside])
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=number == 0)
    return table


def _short(value: float) -> str:
    """Three digits, and whole numbers as they are."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(hours: float) -> str:
    if hours == float("inf"):
        return "cannot run"
    if hours < 1.0 / 6.0:
        return f"{hours * 3600.0:,.3g} s"
    if hours < 72.0:
        return f"{hours:,.1f} h"
    return f"{hours / 24.0:,.1f} d"


def _date(start: datetime, hours: float) -> str:
    return (start + timedelta(hours=min(hours, 1e6))).strftime("%Y-%m-%d %H:%M")


def _outlook_json(outlook: Outlook, start: datetime) -> dict[str, Any]:
    return {
        "options": [asdict(option) for option in outlook.options],
        "ends_h": {name: asdict(span) for name, span in outlook.ends.items()},
        "end_dates": {name: _dates(start, span) for name, span in outlook.ends.items()},
        "total_h": None if outlook.total is None else asdict(outlook.total),
        "chip_hours": None if outlook.chip_hours is None else asdict(outlook.chip_hours),
        "cost": None if outlook.cost is None else asdict(outlook.cost),
        "kwh": outlook.kwh,
    }


def _dates(start: datetime, span: Span) -> dict[str, str]:
    return {name: _date(start, hours) for name, hours in asdict(span).items()}


_COLUMNS = ("step", "pool", "generator", "chips", "chosen", "why", "basis", "update_s", "tokens_per_s", "memory_gb")


def _csv(outlook: Outlook) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*_COLUMNS, "p10_h", "p50_h", "p90_h", "chip_hours_p50", "cost_p50", "kwh", "goodput", "revert_h"])
    for one in outlook.options:
        spans = ("", "", "") if one.hours is None else (one.hours.low, one.hours.middle, one.hours.high)
        writer.writerow(
            [
                *(getattr(one, name) if getattr(one, name) is not None else "" for name in _COLUMNS),
                *spans,
                "" if one.chip_hours is None else one.chip_hours.middle,
                "" if one.cost is None else one.cost.middle,
                "" if one.kwh is None else one.kwh,
                "" if one.goodput is None else one.goodput.share,
                "" if one.revert_h is None else one.revert_h,
            ]
        )
    return file.getvalue()
