"""The steps of a run as the dossier tells them: one chapter for each, from its record and its events."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from markupsafe import Markup

from isthmus.recipe.architecture import ModelSection
from isthmus.recipe.steps import PretrainSection, RlSection, SampleSection, SftSection, StepSection
from isthmus.records import AnyStepRecord, RlRecord, WeightsRecord
from isthmus.report_page import charts, numbers
from isthmus.report_page.charts import Mark, Series
from isthmus.run import Figure, Kind

SMOOTHED_STEPS = 9
MOST_HEAT_LAYERS = 6
TITLES = {"pretrain": "Pretraining", "sft": "Supervised fine-tuning", "rl": "Reinforcement", "sample": "Sampling"}
MEANS = {"mismatch_abs": "nats/token", "mismatch_k3": "nats/token", "importance_clipped": "share"}


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
class Chapter:
    """One step. `events` are its own; `kind` is that of numbers of the pool that trains or, of samples, generates;
    `rollout_kind` of the one that generates for RL. `command` goes on with it."""

    section: StepSection
    architecture: ModelSection
    record: AnyStepRecord | None
    events: Sequence[dict[str, Any]]
    start: str
    kind: Kind
    rollout_kind: Kind
    command: str

    @property
    def name(self) -> str:
        return self.section.name

    @property
    def anchor(self) -> str:
        return f"step-{self.name}"

    @property
    def what(self) -> str:
        """The kind of the step: pretrain, sft, rl or sample."""
        assert isinstance(self.section, PretrainSection | SftSection | RlSection | SampleSection)
        return self.section.kind

    @property
    def title(self) -> str:
        return TITLES[self.what]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [entry for entry in self.events if entry["event"] == event]

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        return self.of("step")

    @property
    def progress(self) -> str:
        """How far a step is that has no record."""
        if isinstance(self.section, SampleSection):
            return (
                f"It has answered {self.steps[-1]['step']} batches of prompts." if self.steps else "Nothing is sampled."
            )
        last = getattr(self.section, "steps", 0)
        return f"It reached update {self.steps[-1]['step']} of {last}." if self.steps else "No update is made."

    @property
    def resumed_from(self) -> list[int]:
        return self.record.resumed_from if isinstance(self.record, WeightsRecord) else []

    @property
    def data(self) -> list[str]:
        """The tasks and samples that it learns from, as the recipe names them."""
        given = getattr(self.section, "data", None) or getattr(self.section, "tasks", None) or {}
        return list(given)

    @property
    def crossings(self) -> int:
        """Updates at which weights crossed to the rollout pool so far."""
        if isinstance(self.record, RlRecord):
            return self.record.weight_version
        return max((int(step.get("weight_version", 0)) for step in self.steps), default=0)

    @cached_property
    def drawings(self) -> dict[str, Markup]:
        """The line charts of the chapter, by name."""
        return _rl_charts(self) if self.what == "rl" else {"loss": charts.line_chart(_losses(self.steps))}

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """What the dossier computes from the events of the step."""
        return rl_figures(self) if self.what == "rl" else speed_figures(self)

    @cached_property
    def expert_loads(self) -> list[HeatLayer]:
        """One heat strip for each MoE layer, or for MOST_HEAT_LAYERS of them, evenly chosen."""
        steps = [step for step in self.steps if step.get("expert_load")]
        if not steps:
            return []
        layers = len(steps[0]["expert_load"])
        count = min(layers, MOST_HEAT_LAYERS)
        chosen = sorted({round(index * (layers - 1) / max(1, count - 1)) for index in range(count)})
        same = [step for step in steps if len(step["expert_load"]) == layers]
        return [
            HeatLayer(self._layer_name(index), charts.heat_strip([(s["step"], s["expert_load"][index]) for s in same]))
            for index in chosen
        ]

    @property
    def thoughts(self) -> tuple[Thought, Thought] | None:
        """The same problem, answered before and after RL."""
        if not isinstance(self.record, RlRecord):
            return None
        return split_thought(self.record.sample_before), split_thought(self.record.sample_after)

    def _layer_name(self, index: int) -> str:
        sparse = self.architecture.sparse_layers
        return f"Layer {sparse[index]}" if index < len(sparse) else "MTP layer"


def heldout(chapter: Chapter) -> list[Mark]:
    """Held-out accuracy before and after RL, in percent: from the record, else from the evaluation events."""
    record = chapter.record
    last_step = max((int(step["step"]) for step in chapter.steps), default=0)
    ends = {"before": 0, "after": record.steps if isinstance(record, RlRecord) else last_step}
    between = {f"step-{step}": step for step in range(last_step + 1)}
    if isinstance(record, RlRecord):
        known = {"before": record.accuracy_before, "after": record.accuracy_after}
        marks = [_mark(ends[which], figure) for which, figure in known.items() if figure.value is not None]
    else:
        between |= ends
        marks = []
    evaluations = [entry for entry in chapter.of("evaluate") if entry["which"] in between]
    told = [Mark("held-out problems", between[entry["which"]], 100 * entry["accuracy"]) for entry in evaluations]
    return sorted([*marks, *told], key=lambda mark: mark.x)


def rl_figures(chapter: Chapter) -> dict[str, Figure]:
    """Means of the mismatch over the updates, and its last slope; each only where the events say it."""
    rehearsed = chapter.rollout_kind == "rehearsed"
    found: dict[str, Figure] = {}
    for key, unit in MEANS.items():
        values = [value for _, value in charts.points_of(chapter.steps, key)]
        if values:
            source = f"events.jsonl: mean of {key} over {len(values)} updates of {chapter.name}"
            found[f"{key}_mean"] = Figure.measured(sum(values) / len(values), unit, source, rehearsed=rehearsed)
    slopes = charts.points_of(chapter.steps, "mismatch_slope")
    if slopes:
        source = f"events.jsonl: mismatch_slope at update {slopes[-1][0]:g} of {chapter.name}"
        found["mismatch_slope_last"] = Figure.measured(
            slopes[-1][1], "nats/token per step", source, rehearsed=rehearsed
        )
    return found


def speed_figures(chapter: Chapter) -> dict[str, Figure]:
    """Speed, share of the declared peak and memory of training; each only where its events say it."""
    steps, rehearsed = chapter.steps, chapter.kind == "rehearsed"
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


def split_thought(text: str) -> Thought:
    """Prompt, thinking and answer of a completion. Thinking that never ended has no answer and is not `closed`."""
    prompt, _, rest = text.partition("<think>") if "<think>" in text else ("", "", text)
    thinking, closed, answer = rest.partition("</think>")
    return Thought(prompt.strip(), thinking.strip(), answer.strip(), bool(closed))


def _rl_charts(chapter: Chapter) -> dict[str, Markup]:
    rl = chapter.steps
    gain = chapter.record.accuracy_gain if isinstance(chapter.record, RlRecord) else None
    return {
        "learning": charts.line_chart(
            _smoothed(rl, "accuracy", "training problems", 100), suffix="%", marks=heldout(chapter)
        ),
        "length": charts.line_chart(_smoothed(rl, "completion_tokens", "length", 1)),
        "entropy": charts.line_chart(_smoothed(rl, "entropy", "entropy", 1)),
        "reward": charts.line_chart(_smoothed(rl, "reward", "reward", 1)),
        "language": charts.line_chart(_smoothed(rl, "language", "language", 100), suffix="%"),
        "gap": charts.line_chart(_smoothed(rl, "mismatch_abs", "|Δ log p|", 1, "away")),
        "k3": charts.line_chart(_smoothed(rl, "mismatch_k3", "KL", 1, "away")),
        "clipped": charts.line_chart(_smoothed(rl, "importance_clipped", "clipped", 100, "away"), suffix="%"),
        "slope": charts.line_chart([Series("slope", charts.points_of(rl, "mismatch_slope"), "away")]),
        "gain": _gain_bar(gain) if gain else Markup(""),
    }


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
