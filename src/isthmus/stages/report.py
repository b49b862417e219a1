"""The report: a run folder becomes one HTML file that says what happened and who says so.

It reads the records, the events and the recipe, and nothing else; a stage that is not done is said to be not done.
Equal run folders give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemBytecodeCache, FunctionLoader, StrictUndefined
from jinja2.bccache import Bucket
from markupsafe import Markup
from pydantic import BaseModel

from isthmus.parity.paired import compare_answers
from isthmus.pools import placed_pools
from isthmus.progress import Watch
from isthmus.recipe.lineage import line
from isthmus.recipe.steps import RlSection, SampleSection
from isthmus.records import (
    AnyStepRecord,
    DrillRecord,
    EvaluationRecord,
    HandoffRecord,
    IncidentRecord,
    PlanRecord,
    PlayedPolicy,
    QualifyRecord,
    RlRecord,
    WeightsRecord,
    costliest,
    evaluation_of,
    incidents,
    step_record,
)
from isthmus.report_page import charts, lineage, numbers, pools, timing
from isthmus.report_page import summary as first_screen
from isthmus.report_page.chapters import Chapter
from isthmus.report_page.charts import Series
from isthmus.report_page.timeline import Timeline, timelines
from isthmus.rules import NOT_LOOKED_AT, notice
from isthmus.run import Figure, Kind, Record, RunFolder
from isthmus.verdict import describe_limit, without_pairs

PAGE = "isthmus.report_page"
TOTAL = "total"


class NamedFigure(NamedTuple):
    """A figure and where in the run folder it stands."""

    place: str
    name: str
    figure: Figure


class Compared(NamedTuple):
    """Two steps, and by how much the second answers better."""

    first: str
    second: str
    gain: Figure


class EstimateRow(NamedTuple):
    """What the plan expected of a stage, what came, and truth divided by estimate."""

    name: str
    estimate: Figure
    truth: Figure | None
    ratio: Figure | None


@dataclass(frozen=True)
class Dossier:
    """All that a run folder holds, read once."""

    run: RunFolder
    qualify: dict[str, QualifyRecord | None]
    plan: PlanRecord | None
    steps: dict[str, AnyStepRecord | None]
    evaluations: dict[str, EvaluationRecord]
    handoff: HandoffRecord | None
    events: list[dict[str, Any]]

    def of(self, stage: str, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self.events if entry["stage"] == stage and entry["event"] == event]

    def any_stage(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self.events if entry["event"] == event]

    def pool_of(self, stage: str) -> str | None:
        """Where the plan put a stage, or None while there is no plan or it names no such stage."""
        placements = self.plan.placements if self.plan else []
        return next((placement.pool for placement in placements if placement.stage == stage), None)

    def kind_on(self, pool: str | None, preferred: list[str]) -> Kind:
        """The kind of a number read off a pool; of any of the `preferred` ones while it is not known which."""
        pools = self.run.recipe.pools
        rehearsed = self.run.recipe.drill is not None or any(
            pools[name].rehearsed for name in ([pool] if pool in pools else preferred)
        )
        return "rehearsed" if rehearsed else "measured"

    @cached_property
    def chapters(self) -> list[Chapter]:
        """One for each step, in the order of the recipe."""
        recipe, path = self.run.recipe, self.run.path
        return [
            Chapter(
                section=step,
                architecture=recipe.architecture_of(step),
                record=self.steps[step.name],
                events=[entry for entry in self.events if entry["stage"] == step.name],
                start=recipe.start_of(step),
                kind=self.rollout_kind if isinstance(step, SampleSection) else self.train_kind,
                rollout_kind=self.rollout_kind,
                command=f"isthmus run {path} --until {step.name}",
            )
            for step in recipe.step
        ]

    @property
    def weights(self) -> list[WeightsRecord]:
        return [record for record in self.steps.values() if isinstance(record, WeightsRecord)]

    @property
    def rl(self) -> RlRecord | None:
        """The last RL that is done on the way to the weights that are handed off, else of any."""
        recipe = self.run.recipe
        way = {step.name for step in line(recipe.step, recipe.handed_off.name)}
        done = [record for record in self.steps.values() if isinstance(record, RlRecord)]
        return next((one for one in reversed(done) if one.step in way), done[-1] if done else None)

    @property
    def learns_on_both(self) -> bool:
        return any(isinstance(step, RlSection | SampleSection) for step in self.run.recipe.step)

    @property
    def train_pool(self) -> str | None:
        return self.weights[-1].pool if self.weights else self.pool_of("train")

    @property
    def rollout_pool(self) -> str | None:
        return self.rl.rollout_pool if self.rl else self.pool_of("rollout")

    @property
    def serve_pool(self) -> str | None:
        return self.handoff.target_pool if self.handoff else self.pool_of("serve")

    @property
    def incidents(self) -> list[IncidentRecord]:
        """What watched steps met, and what was done."""
        return [one for name in self.steps for one in incidents(self.run, name)]

    @cached_property
    def timelines(self) -> list[Timeline]:
        """Of the steps that met something."""
        return timelines(self.run)

    @property
    def policies(self) -> list[PlayedPolicy]:
        """What a drill and other policies came to; none where nothing was played beside it."""
        record = self.run.read_record("drill", DrillRecord) if self.run.recipe.drill is not None else None
        return record.policies if record is not None else []

    @property
    def drilled(self) -> str | None:
        """What came of a drill in a sentence; None while its steps are not done."""
        if not self.steps or not all(self.steps.values()):
            return None
        lines = self.timelines
        moved = [f"{one.step} moved to {pool} after update {update}" for one in lines for _, pool, update in one.moves]
        begun, lost = sum(one.begun for one in lines), sum(one.lost for one in lines)
        what = "; ".join(moved) if moved else "nothing moved" if lines else "nothing went wrong"
        return f"A drill: {what}." + (f" {lost} of {begun} updates were made again." if lines else "")

    @property
    def crossings(self) -> int:
        """RL updates at which weights crossed to the rollout pool so far."""
        return sum(chapter.crossings for chapter in self.chapters)

    @property
    def train_kind(self) -> Kind:
        return self.kind_on(self.train_pool, self.run.recipe.place.train)

    @property
    def rollout_kind(self) -> Kind:
        if self.rl and self.rl.rollout_rehearsed:
            return "rehearsed"
        return self.kind_on(self.rollout_pool, self.run.recipe.place.rollout)


def execute(run: RunFolder, watch: Watch) -> Path:
    """Write `report.html` into the run folder and return its path. Raises DamagedFile for an unreadable record."""
    path = run.path / "report.html"
    run.keep(path, compose(read_dossier(run)).encode(), {"recipe": run.recipe.digest()})
    watch.say(f"The dossier of this run: {path}")
    return path


def outcome(run: RunFolder) -> list[str]:
    """What came of a run, in a line each: what was learnt, what was sealed."""
    dossier = read_dossier(run)
    lines = []
    if rl := dossier.rl:
        before, after = (f"{figure.value:.3g} {figure.unit}" for figure in (rl.accuracy_before, rl.accuracy_after))
        lines.append(f"  learnt {before} of {rl.heldout_problems} held-out problems right before RL, {after} after")
    if handoff := dossier.handoff:
        sealed = f"sealed as {handoff.seal_id}" if handoff.seal_id else "not sealed"
        lines.append(f"  gate   {handoff.format} for pool {handoff.target_pool}: {handoff.verdict}, {sealed}")
    return lines


def read_dossier(run: RunFolder) -> Dossier:
    """Read every record and event that the run folder has."""
    names = [pool.name for pool in placed_pools(run.recipe)]
    return Dossier(
        run=run,
        qualify={pool: run.read_record(f"qualify/{pool}", QualifyRecord) for pool in names},
        plan=run.read_record("plan", PlanRecord),
        steps={step.name: step_record(run, step.name) for step in run.recipe.step},
        evaluations={name: found for name in run.recipe.evaluation.after if (found := evaluation_of(run, name))},
        handoff=run.read_record("parity", HandoffRecord),
        events=run.events(),
    )


class _Compiled(FileSystemBytecodeCache):
    """Compiled templates in this user's temporary folder, which jinja2 checks against their source. What cannot be kept
    is compiled again the next time."""

    def dump_bytecode(self, bucket: Bucket) -> None:
        with suppress(OSError):
            super().dump_bytecode(bucket)


def _compiled() -> _Compiled | None:
    """None where there is no folder for them that is this user's alone."""
    try:
        return _Compiled()
    except (OSError, RuntimeError):
        return None


def compose(dossier: Dossier) -> str:
    """The whole page as text."""
    environment = Environment(
        loader=FunctionLoader(_page_file), autoescape=True, undefined=StrictUndefined, bytecode_cache=_compiled()
    )
    environment.filters |= {"quantity": numbers.quantity, "interval": numbers.interval}
    environment.filters |= {"label": numbers.label, "phrase": numbers.phrase}
    environment.filters |= {"sentence": numbers.sentence, "prose": numbers.prose}
    environment.filters |= {"plain": numbers.plain, "duration": numbers.duration}
    environment.filters |= {"rules_notice": notice}
    environment.globals |= {"gate_in_words": first_screen.gate_in_words, "lost": first_screen.lost}
    environment.globals |= {"not_looked_at": NOT_LOOKED_AT}
    environment.filters |= {"act": partial(_act, dossier)}
    environment.globals |= {"points": numbers.points, "describe_limit": describe_limit}
    environment.globals |= {"pair_rates": pools.pair_rates, "without_pairs": without_pairs}
    template = environment.get_template("page.html.jinja")
    computed = computed_figures(dossier)
    figures = all_figures(dossier, computed)
    return template.render(
        d=dossier,
        recipe=dossier.run.recipe,
        style=Markup(_page_file("page.css")),
        computed=computed,
        figures=figures,
        figure_groups={place: list(group) for place, group in groupby(figures, key=lambda item: item.place)},
        state_of=state_of(dossier),
        lineage=lineage.picture(dossier.chapters, dossier.run.recipe.handed_off.name),
        comparisons=comparisons(dossier),
        warnings=dossier.run.recipe.unused_steps,
        side_by_side=pools.side_by_side(list(dossier.qualify.values())),
        commands=commands(dossier),
        told=first_screen.summary(
            dossier.run, dossier.qualify, dossier.plan, dossier.handoff, timing.attempts(dossier.events)
        ),
        estimates=estimate_rows(dossier),
        parts=time_parts(dossier),
        attempts=timing.attempts(dossier.events),
        ledger=costliest(dossier.handoff.ledger if dossier.handoff else []),
        serve_kind=dossier.kind_on(dossier.serve_pool, dossier.run.recipe.place.serve),
        **draw(dossier),
    )


def draw(dossier: Dossier) -> dict[str, Markup]:
    """The charts of the page that are of no single step, by name."""
    return {"ledger_chart": charts.line_chart(_ledger_lines(dossier), suffix="%")}


def computed_figures(dossier: Dossier) -> dict[str, Figure]:
    """What the report itself computes from the events."""
    found = {f"{one.name}_{name}": figure for one in dossier.chapters for name, figure in one.figures.items()}
    return found | wall_clock(dossier)


def comparisons(dossier: Dossier) -> list[Compared]:
    """Each pair of steps that the recipe compares, where both were evaluated."""
    found = []
    for first, second in dossier.run.recipe.evaluation.compare:
        one, other = (dossier.evaluations.get(name) for name in (first, second))
        if one is not None and other is not None:
            found.append(Compared(first, second, better_by(one, other)))
    return found


def better_by(one: EvaluationRecord, other: EvaluationRecord) -> Figure:
    """Points of accuracy by which the second is better, paired by problem."""
    pairs = compare_answers(one.correct, other.correct, 0.95)
    source = f"{pairs.problems} held-out problems, paired, 95% interval (Newcombe)"
    difference, low, high = (100 * value for value in (pairs.difference, pairs.low, pairs.high))
    return Figure.derived(difference, "points", source, one.accuracy, other.accuracy, low=low, high=high)


def wall_clock(dossier: Dossier) -> dict[str, Figure]:
    """Seconds of each stage and of all of them, by this machine's clock."""
    stages = timing.spent(dossier.events)
    source = "events.jsonl: start to end of every attempt, this machine's clock"
    times = {
        f"{stage}_seconds": Figure.measured(spent, "s", source, rehearsed=False) for stage, spent in stages.items()
    }
    if times:
        times["all_seconds"] = Figure.derived(sum(stages.values()), "s", "sum of the stages", *times.values())
    return times


def estimate_rows(dossier: Dossier) -> list[EstimateRow]:
    """The plan's estimates beside what the events say. A stage that has not ended has no truth yet."""
    if dossier.plan is None:
        return []
    estimate = dossier.plan.estimate
    ended, spent = timing.finished_stages(dossier.events), timing.spent(dossier.events)
    listed = [act for act in estimate if act != TOTAL]
    truth = {act: spent[act] for act in listed if act in ended}
    if listed and len(truth) == len(listed):
        truth[TOTAL] = sum(truth.values())
    return [_estimate_row(_act(dossier, act), figure, truth.get(act)) for act, figure in estimate.items()]


def time_parts(dossier: Dossier) -> dict[str, Any]:
    """The bar of where time went, and its rows: (name, seconds, share, css class)."""
    parts = timing.breakdown(dossier.events, {step.name: step.kind for step in dossier.run.recipe.step})
    whole = sum(seconds for _, seconds, _ in parts)
    rows = [(name, seconds, seconds / whole, css) for name, seconds, css in parts]
    return {
        "bar": charts.stacked_bar([(name, seconds, css) for name, seconds, _, css in rows]),
        "rows": rows,
        "whole": whole,
        "beside": timing.rollouts_beside_training(dossier.events),
    }


def commands(dossier: Dossier) -> dict[str, str]:
    """For each stage that is not done, the command that does it."""
    done = {
        "qualify": all(dossier.qualify.values()),
        "plan": dossier.plan is not None,
        **{name: record is not None for name, record in dossier.steps.items()},
        "handoff": dossier.handoff is not None or dossier.run.recipe.drill is not None,
    }
    return {act: f"isthmus run {dossier.run.path} --until {act}" for act, is_done in done.items() if not is_done}


def state_of(dossier: Dossier) -> str:
    """When the newest thing in the run folder happened, UTC."""
    times = [entry["time"] for entry in dossier.events] + [record.ended for record in _records(dossier).values()]
    return datetime.fromtimestamp(max(times), UTC).strftime("%-d %B %Y, %H:%M UTC") if times else "nothing has run yet"


def all_figures(dossier: Dossier, computed: dict[str, Figure]) -> list[NamedFigure]:
    """Every figure of every record, then what the report computed."""
    stored = [
        NamedFigure(f"{name}.json", place, figure)
        for name, record in _records(dossier).items()
        for place, figure in figures_in(record)
    ]
    return stored + [NamedFigure("events.jsonl", name, figure) for name, figure in computed.items()]


def figures_in(part: Any, place: str = "") -> Iterator[tuple[str, Figure]]:
    """Every figure inside a record, with the path to it."""
    if isinstance(part, Figure):
        yield place, part
    elif isinstance(part, BaseModel):
        for name in type(part).model_fields:
            yield from figures_in(getattr(part, name), f"{place}.{name}".lstrip("."))
    elif isinstance(part, dict):
        for name, inner in part.items():
            yield from figures_in(inner, f"{place}.{name}".lstrip("."))
    elif isinstance(part, list):
        for index, inner in enumerate(part):
            yield from figures_in(inner, f"{place}[{getattr(inner, 'name', index)}]")


def _records(dossier: Dossier) -> dict[str, Record]:
    named: dict[str, Record | None] = {f"qualify/{pool}": record for pool, record in dossier.qualify.items()}
    named |= {"plan": dossier.plan}
    named |= {f"steps/{name}/record": record for name, record in dossier.steps.items()}
    named |= {f"steps/{name}/evaluation": record for name, record in dossier.evaluations.items()}
    named |= {"parity": dossier.handoff}
    return {name: record for name, record in named.items() if record is not None}


def _ledger_lines(dossier: Dossier) -> list[Series]:
    """Both costs of each module and the floor of the second, in percent, in the order of the model."""
    rows = dossier.handoff.ledger if dossier.handoff else []

    def line(name: str, key: str, tone: str, **style: bool) -> Series:
        values = [(float(place), getattr(row, key)) for place, row in enumerate(rows)]
        return Series(name, [(x, 100 * y) for x, y in values if y is not None], tone, **style)

    return [
        line("quantisation: trained weights to emulator", "quantisation", "home"),
        line("chip: emulator to target", "chip", "away"),
        line("what rounding on a healthy target costs", "floor", "ink", dashed=True),
    ]


def _act(dossier: Dossier, name: str) -> str:
    """A step by its name as the recipe has it, a stage in words."""
    return name if name in dossier.steps else numbers.label(name)


def _estimate_row(name: str, estimate: Figure, seconds: float | None) -> EstimateRow:
    if seconds is None or estimate.unit not in numbers.SECOND_UNITS:
        return EstimateRow(name, estimate, None, None)
    truth = Figure.measured(seconds, "s", "events.jsonl", rehearsed=False)
    if not estimate.value:
        return EstimateRow(name, estimate, truth, None)
    return EstimateRow(
        name, estimate, truth, Figure.derived(seconds / estimate.value, "×", "truth / estimate", estimate, truth)
    )


def _page_file(name: str) -> str:
    return (resources.files(PAGE) / name).read_text(encoding="utf-8")
