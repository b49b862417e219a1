"""The report: a run folder becomes one HTML file that says what happened and who says so.

It reads the records, the events and the recipe, and nothing else; a stage that is not done is said to be not done.
Equal run folders give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel

from isthmus.pools import placed_pools
from isthmus.progress import Watch
from isthmus.records import HandoffRecord, PlanRecord, QualifyRecord, RlRecord, TrainRecord, costliest
from isthmus.report_page import charts, numbers, pools, timing
from isthmus.report_page import summary as first_screen
from isthmus.report_page.charts import Mark, Series
from isthmus.rules import NOT_LOOKED_AT, notice
from isthmus.run import Figure, Kind, Record, RunFolder, write_atomic
from isthmus.verdict import describe_limit, without_pairs

PAGE = "isthmus.report_page"
SMOOTHED_STEPS = 9
MOST_HEAT_LAYERS = 6
STAGE_ALIASES = {"sft": "train"}
TOTAL = "total"
TRAINING_PHASES = {"pretrain": "pretrain-step", "sft": "step"}
"""The phases of the stage train, with the event that each writes for a step."""
TIME_COLOURS = {
    "Qualify": "p-desk",
    "Plan": "p-desk",
    "Pretraining": "p-pretrain",
    "SFT": "p-sft",
    "RL rollouts": "p-rollout",
    "RL waiting for rollouts": "p-rollout",
    "RL training": "p-train",
    "RL weight crossings": "p-sync",
    "RL evaluation": "p-evaluation",
    "Hand-off": "p-handoff",
}


class NamedFigure(NamedTuple):
    """A figure and where in the run folder it stands."""

    place: str
    name: str
    figure: Figure


class EstimateRow(NamedTuple):
    """What the plan expected of a stage, what came, and truth divided by estimate."""

    name: str
    estimate: Figure
    truth: Figure | None
    ratio: Figure | None


class HeatLayer(NamedTuple):
    name: str
    strip: Markup


class Thought(NamedTuple):
    """A completion, taken apart at its thinking tags."""

    prompt: str
    thinking: str
    answer: str
    closed: bool


@dataclass(frozen=True)
class Dossier:
    """All that a run folder holds, read once."""

    run: RunFolder
    qualify: dict[str, QualifyRecord | None]
    plan: PlanRecord | None
    train: TrainRecord | None
    rl: RlRecord | None
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
        rehearsed = any(pools[name].rehearsed for name in ([pool] if pool in pools else preferred))
        return "rehearsed" if rehearsed else "measured"

    @property
    def train_pool(self) -> str | None:
        return self.train.pool if self.train else self.pool_of("train")

    @property
    def rollout_pool(self) -> str | None:
        return self.rl.rollout_pool if self.rl else self.pool_of("rollout")

    @property
    def serve_pool(self) -> str | None:
        return self.handoff.target_pool if self.handoff else self.pool_of("serve")

    @property
    def crossings(self) -> int:
        """RL steps at which weights crossed to the rollout pool so far."""
        if self.rl:
            return self.rl.weight_version
        return max((int(step.get("weight_version", 0)) for step in self.of("rl", "step")), default=0)

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
    write_atomic(path, compose(read_dossier(run)).encode())
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
        train=run.read_record("train", TrainRecord),
        rl=run.read_record("rl", RlRecord),
        handoff=run.read_record("parity", HandoffRecord),
        events=run.events(),
    )


def compose(dossier: Dossier) -> str:
    """The whole page as text."""
    environment = Environment(loader=FunctionLoader(_page_file), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"quantity": numbers.quantity, "interval": numbers.interval}
    environment.filters |= {"label": numbers.label, "phrase": numbers.phrase}
    environment.filters |= {"sentence": numbers.sentence, "prose": numbers.prose}
    environment.filters |= {"plain": numbers.plain, "duration": numbers.duration}
    environment.filters |= {"rules_notice": notice}
    environment.globals |= {"gate_in_words": first_screen.gate_in_words, "lost": first_screen.lost}
    environment.globals |= {"not_looked_at": NOT_LOOKED_AT}
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
        side_by_side=pools.side_by_side(list(dossier.qualify.values())),
        commands=commands(dossier),
        told=first_screen.summary(
            dossier.run, dossier.qualify, dossier.plan, dossier.handoff, timing.attempts(dossier.events)
        ),
        estimates=estimate_rows(dossier),
        training={phase: training_figures(dossier, phase) for phase in TRAINING_PHASES},
        parts=time_parts(dossier),
        attempts=timing.attempts(dossier.events),
        has_pretraining=dossier.run.recipe.pretrain is not None or bool(dossier.of("train", "pretrain-step")),
        expert_loads=expert_loads(dossier),
        before=split_thought(dossier.rl.sample_before) if dossier.rl else None,
        after=split_thought(dossier.rl.sample_after) if dossier.rl else None,
        ledger=costliest(dossier.handoff.ledger if dossier.handoff else []),
        serve_kind=dossier.kind_on(dossier.serve_pool, dossier.run.recipe.place.serve),
        **draw(dossier),
    )


def draw(dossier: Dossier) -> dict[str, Markup]:
    """All line charts and bars of the page, by name."""
    sft, rl = dossier.of("train", "step"), dossier.of("rl", "step")
    gain = dossier.rl.accuracy_gain if dossier.rl else None
    return {
        "pretrain_chart": charts.line_chart(_losses(dossier.of("train", TRAINING_PHASES["pretrain"]))),
        "loss_chart": charts.line_chart(_losses(sft)),
        "learning_chart": charts.line_chart(
            _smoothed(rl, "accuracy", "training problems", 100), suffix="%", marks=heldout(dossier)
        ),
        "length_chart": charts.line_chart(_smoothed(rl, "completion_tokens", "length", 1)),
        "entropy_chart": charts.line_chart(_smoothed(rl, "entropy", "entropy", 1)),
        "reward_chart": charts.line_chart(_smoothed(rl, "reward", "reward", 1)),
        "gap_chart": charts.line_chart(_smoothed(rl, "mismatch_abs", "|Δ log p|", 1, "away")),
        "k3_chart": charts.line_chart(_smoothed(rl, "mismatch_k3", "KL", 1, "away")),
        "clipped_chart": charts.line_chart(_smoothed(rl, "importance_clipped", "clipped", 100, "away"), suffix="%"),
        "slope_chart": charts.line_chart([Series("slope", charts.points_of(rl, "mismatch_slope"), "away")]),
        "gain_bar": _gain_bar(gain) if gain else Markup(""),
        "ledger_chart": charts.line_chart(_ledger_lines(dossier), suffix="%"),
    }


def heldout(dossier: Dossier) -> list[Mark]:
    """Held-out accuracy before and after RL, in percent: from the record, else from the evaluation events."""
    last_step = max((int(step["step"]) for step in dossier.of("rl", "step")), default=0)
    ends = {"before": 0, "after": dossier.rl.steps if dossier.rl else last_step}
    if dossier.rl:
        known = {"before": dossier.rl.accuracy_before, "after": dossier.rl.accuracy_after}
        return [_mark(ends[which], figure) for which, figure in known.items() if figure.value is not None]
    evaluations = dossier.of("rl", "evaluate")
    return [Mark("held-out problems", ends[entry["which"]], 100 * entry["accuracy"]) for entry in evaluations]


def computed_figures(dossier: Dossier) -> dict[str, Figure]:
    """What the report itself computes from the events."""
    steps = dossier.of("rl", "step")
    rehearsed = dossier.rollout_kind == "rehearsed"
    found: dict[str, Figure] = {}
    for key, unit in {"mismatch_abs": "nats/token", "mismatch_k3": "nats/token", "importance_clipped": "share"}.items():
        values = [value for _, value in charts.points_of(steps, key)]
        if values:
            source = f"events.jsonl: mean of {key} over {len(values)} RL steps"
            found[f"{key}_mean"] = Figure.measured(sum(values) / len(values), unit, source, rehearsed=rehearsed)
    slopes = charts.points_of(steps, "mismatch_slope")
    if slopes:
        source = f"events.jsonl: mismatch_slope at step {slopes[-1][0]:g}"
        found["mismatch_slope_last"] = Figure.measured(
            slopes[-1][1], "nats/token per step", source, rehearsed=rehearsed
        )
    phases = {phase: training_figures(dossier, phase) for phase in TRAINING_PHASES}
    found |= {f"{phase}_{name}": figure for phase, figures in phases.items() for name, figure in figures.items()}
    return found | wall_clock(dossier)


def training_figures(dossier: Dossier, phase: str) -> dict[str, Figure]:
    """Speed, share of the declared peak and memory of a phase of training; each only where its events say it."""
    steps = dossier.of("train", TRAINING_PHASES[phase])
    rehearsed = dossier.train_kind == "rehearsed"
    found: dict[str, Figure] = {}
    timed = [(s["tokens"], s["seconds"]) for s in steps if s.get("tokens") and s.get("seconds")]
    if timed:
        tokens, seconds = (math.fsum(values) for values in zip(*timed, strict=True))
        source = f"events.jsonl: {tokens:,.0f} tokens in {seconds:,.1f} s of {len(timed)} steps"
        found["mean_tokens_per_s"] = Figure.measured(tokens / seconds, "tokens/s", source, rehearsed=rehearsed)
    shares = [(s["mfu"] * s["seconds"], s["seconds"]) for s in steps if s.get("mfu") is not None and s.get("seconds")]
    if shares:
        work, seconds = (math.fsum(values) for values in zip(*shares, strict=True))
        source = f"events.jsonl: mean of mfu over {len(shares)} steps, measured speed over the chip's declared peak"
        kind: Kind = "rehearsed" if rehearsed else "declared"
        found["mfu"] = Figure(value=work / seconds, unit="share", kind=kind, source=source)
    memory = [value for _, value in charts.points_of(steps, "memory_gib")]
    if memory:
        source = f"events.jsonl: largest memory_gib of {len(memory)} steps, of one process"
        found["peak_memory"] = Figure.measured(max(memory), "GiB", source, rehearsed=rehearsed)
    return found


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
    stages = {key: _stage_of(key) for key in estimate}
    listed = [stage for stage in dict.fromkeys(stages.values()) if stage != TOTAL]
    truth = {stage: spent[stage] for stage in listed if stage in ended}
    if listed and len(truth) == len(listed):
        truth[TOTAL] = sum(truth.values())
    return [_estimate_row(key, figure, truth.get(stages[key])) for key, figure in estimate.items()]


def time_parts(dossier: Dossier) -> dict[str, Any]:
    """The bar of where time went, and its rows: (name, seconds, share, css class)."""
    parts = timing.breakdown(dossier.events)
    whole = sum(seconds for _, seconds in parts)
    rows = [(name, seconds, seconds / whole, TIME_COLOURS.get(name, "p-other")) for name, seconds in parts]
    return {
        "bar": charts.stacked_bar([(name, seconds, css) for name, seconds, _, css in rows]),
        "rows": rows,
        "whole": whole,
        "beside": timing.rollouts_beside_training(dossier.events),
    }


def expert_loads(dossier: Dossier) -> list[HeatLayer]:
    """One heat strip for each MoE layer, or for MOST_HEAT_LAYERS of them, evenly chosen."""
    steps = [step for step in dossier.of("train", "step") if step.get("expert_load")]
    if not steps:
        return []
    layers = len(steps[0]["expert_load"])
    count = min(layers, MOST_HEAT_LAYERS)
    chosen = sorted({round(index * (layers - 1) / max(1, count - 1)) for index in range(count)})
    same = [step for step in steps if len(step["expert_load"]) == layers]
    return [
        HeatLayer(_layer_name(dossier, index), charts.heat_strip([(s["step"], s["expert_load"][index]) for s in same]))
        for index in chosen
    ]


def commands(dossier: Dossier) -> dict[str, str]:
    """For each stage that is not done, the command that does it."""
    done = {
        "qualify": all(dossier.qualify.values()),
        "plan": dossier.plan is not None,
        "train": dossier.train is not None,
        "rl": dossier.rl is not None,
        "handoff": dossier.handoff is not None,
    }
    return {verb: f"isthmus {verb} {dossier.run.path}" for verb, is_done in done.items() if not is_done}


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


def split_thought(text: str) -> Thought:
    """Prompt, thinking and answer of a completion. Thinking that never ended has no answer and is not `closed`."""
    prompt, _, rest = text.partition("<think>") if "<think>" in text else ("", "", text)
    thinking, closed, answer = rest.partition("</think>")
    return Thought(prompt.strip(), thinking.strip(), answer.strip(), bool(closed))


def _records(dossier: Dossier) -> dict[str, Record]:
    named: dict[str, Record | None] = {f"qualify/{pool}": record for pool, record in dossier.qualify.items()}
    named |= {"plan": dossier.plan, "train": dossier.train, "rl": dossier.rl, "parity": dossier.handoff}
    return {name: record for name, record in named.items() if record is not None}


def _losses(events: Sequence[dict[str, Any]]) -> list[Series]:
    return [
        Series("next token", charts.points_of(events, "loss"), "home"),
        Series("token after next (MTP)", charts.points_of(events, "mtp_loss"), "away", dashed=True),
    ]


def _smoothed(events: Sequence[dict[str, Any]], key: str, name: str, factor: float, tone: str = "home") -> list[Series]:
    raw = charts.points_of(events, key, factor)
    if len(raw) < 2 * SMOOTHED_STEPS:
        return [Series(f"{name}, each step", raw, tone)]
    mean = charts.moving_average(raw, SMOOTHED_STEPS)
    return [Series(f"{name}, each step", raw, tone, faint=True), Series(f"mean of {SMOOTHED_STEPS} steps", mean, tone)]


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


def _mark(step: int, figure: Figure) -> Mark:
    factor = 100 if figure.unit in numbers.SHARE_UNITS else 1
    value, low, high = (None if end is None else factor * end for end in (figure.value, figure.low, figure.high))
    assert value is not None
    return Mark("held-out problems", step, value, low, high)


def _gain_bar(gain: Figure) -> Markup:
    if gain.value is None or gain.low is None or gain.high is None:
        return Markup("")
    factor = 100 if gain.unit in numbers.SHARE_UNITS else 1
    return charts.interval_bar(factor * gain.value, factor * gain.low, factor * gain.high)


def _estimate_row(key: str, estimate: Figure, seconds: float | None) -> EstimateRow:
    name = numbers.label(key.removesuffix("_seconds"))
    if seconds is None or estimate.unit not in numbers.SECOND_UNITS:
        return EstimateRow(name, estimate, None, None)
    truth = Figure.measured(seconds, "s", "events.jsonl", rehearsed=False)
    if not estimate.value:
        return EstimateRow(name, estimate, truth, None)
    return EstimateRow(
        name, estimate, truth, Figure.derived(seconds / estimate.value, "×", "truth / estimate", estimate, truth)
    )


def _stage_of(estimate_key: str) -> str:
    stage = estimate_key.removesuffix("_seconds").removesuffix("_s")
    return STAGE_ALIASES.get(stage, stage)


def _layer_name(dossier: Dossier, index: int) -> str:
    model = dossier.run.recipe.model
    sparse = model.sparse_layers
    return f"Layer {sparse[index]}" if index < len(sparse) else "MTP layer"


def _page_file(name: str) -> str:
    return (resources.files(PAGE) / name).read_text(encoding="utf-8")
