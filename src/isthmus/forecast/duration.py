"""How long this run will take, from what its qualification measured.

Each estimate has a middle (P50) and a P10 and P90. Two things are not known beforehand: how much longer thoughts get
during reinforcement learning, and how well a short pilot predicts a long run.
"""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.recipe.practice import answering, taught
from isthmus.recipe.schema import Recipe
from isthmus.recipe.steps import RlSection, SampleSection, SftSection, StepSection
from isthmus.records import QualifyRecord
from isthmus.run import Figure

# Ratio of P90 to P50 when a measurement of one model on a chip predicts another model on the same chip: 24 % error at
# the 90th percentile over llm-foundry's published dense rows.
WIDTH = 1.24
# Mean thought over the whole of RL, and its longest, as multiples of those in the supervised data. R1's thoughts grew
# all through RL (arXiv 2501.12948, figure 3); the middle case lets them double, the high case fills the token limit.
GROWTH = {"low": (1.0, 1.0), "middle": (1.5, 2.0), "high": (3.0, float("inf"))}
SLOTS = 256


@dataclass(frozen=True)
class Span:
    """Seconds at P10, P50 and P90."""

    low: float
    middle: float
    high: float

    def __add__(self, other: Span) -> Span:
        return Span(self.low + other.low, self.middle + other.middle, self.high + other.high)

    def __mul__(self, factor: float) -> Span:
        return Span(self.low * factor, self.middle * factor, self.high * factor)

    def widened(self) -> Span:
        return Span(self.low / WIDTH, self.middle, self.high * WIDTH)


@dataclass(frozen=True)
class Pace:
    """Seconds that the pilots took. Decoding n samples for T steps takes `decode_step` T + `decode_token` n T."""

    sft_step: float
    learn_token: float
    prompt_tokens: float
    completion_tokens: float
    longest_completion: float
    engine_start: float
    crossing: float
    decode_step: float
    decode_token: float

    @classmethod
    def of(cls, train: QualifyRecord, rollout: QualifyRecord) -> Pace | None:
        """The pace of two qualified pools; None if a pilot did not run."""
        found = {
            name: _value(record, name)
            for record, names in ((train, _LEARNING), (rollout, _GENERATING))
            for name in names
        }
        known = {name: value for name, value in found.items() if value is not None}
        return cls(**{_FIELDS[name]: value for name, value in known.items()}) if len(known) == len(found) else None


_FIELDS = {
    "sft_step_s": "sft_step",
    "learn_token_s": "learn_token",
    "prompt_tokens": "prompt_tokens",
    "completion_tokens": "completion_tokens",
    "longest_completion_tokens": "longest_completion",
    "engine_start_s": "engine_start",
    "crossing_s": "crossing",
    "decode_step_s": "decode_step",
    "decode_token_s": "decode_token",
}
_LEARNING = ("sft_step_s", "learn_token_s", "prompt_tokens", "completion_tokens", "longest_completion_tokens")
_GENERATING = ("engine_start_s", "crossing_s", "decode_step_s", "decode_token_s")


def estimate(recipe: Recipe, train: QualifyRecord, rollout: QualifyRecord) -> dict[str, Figure]:
    """Seconds of each step by name, and of "handoff". Unknown, not guessed, where nothing like it was timed: a pilot
    did not run, text that is no worked example, or another model than the recipe's own."""
    pace = Pace.of(train, rollout)
    missing = f"pilots did not run on both {train.pool} and {rollout.pool}"
    source = f"pilots on {train.pool} and {rollout.pool}; P50, with P10 and P90"
    spans = {step.name: None if pace is None else step_seconds(recipe, step, pace) for step in recipe.step}
    spans["handoff"] = None if pace is None else handoff_seconds(recipe, pace)
    untimed = missing if pace is None else "no pilot does the like of this step"
    return {
        act: Figure(value=None, unit="s", kind="forecast", source=untimed)
        if span is None
        else _forecast(span.widened(), source)
        for act, span in spans.items()
    }


def total(parts: dict[str, Figure]) -> Figure:
    """The sum of the stages; unknown if one is. P10 and P90 are added as if all stages were slow together."""
    figures = list(parts.values())
    values = [figure.value for figure in figures if figure.value is not None]
    if len(values) < len(figures):
        return Figure(value=None, unit="s", kind="forecast", source="a stage has no estimate")
    low = sum(_or(figure.low, value) for figure, value in zip(figures, values, strict=True))
    high = sum(_or(figure.high, value) for figure, value in zip(figures, values, strict=True))
    source = f"sum of {', '.join(parts)}; P50, with P10 and P90"
    return Figure(value=float(sum(values)), unit="s", kind="forecast", source=source, low=low, high=high)


def step_seconds(recipe: Recipe, step: StepSection, pace: Pace) -> Span | None:
    """Seconds of a step; None if the pilots did nothing of its kind."""
    if recipe.architecture_of(step) != recipe.model:
        return None
    if isinstance(step, SftSection):
        return sft_seconds(step, taught(recipe), pace)
    if isinstance(step, RlSection):
        return rl_seconds(step, pace)
    return sample_seconds(step, pace) if isinstance(step, SampleSection) else None


def sft_seconds(step: SftSection, timed: SftSection, pace: Pace) -> Span:
    """Supervised fine-tuning: its updates, in proportion to the batch of the step that was timed."""
    seconds = step.steps * pace.sft_step * step.batch_size / timed.batch_size
    return Span(seconds, seconds, seconds)


def sample_seconds(step: SampleSection, pace: Pace) -> Span:
    """Starting the engine, and the answers."""
    count, limit = step.prompts * step.samples_per_prompt, step.max_new_tokens
    low, middle, high = (_generate(limit, pace, count, case) for case in GROWTH)
    return Span(low, middle, high) + _start(pace)


def rl_seconds(rl: RlSection, pace: Pace) -> Span:
    """Starting the engine, the steps, and the held-out problems before and after, sampled and greedy.

    With samples one version old the two pools work at the same time, and the slower one sets the pace.
    """
    samples, limit = rl.prompts_per_step * rl.samples_per_prompt, rl.max_new_tokens
    steps = [
        _overlapped(rl, _generate(limit, pace, samples, case), _learn(rl, pace, case)) + pace.crossing
        for case in GROWTH
    ]
    low, middle, high = (rl.steps * step for step in steps)
    return Span(low, middle, high) + _answers(limit, pace, rl.heldout_problems) * 4 + _start(pace)


def handoff_seconds(recipe: Recipe, pace: Pace) -> Span:
    """Reference and target answer the held-out problems side by side, two samples each; golden prompts are scored."""
    golden = recipe.handoff.golden_prompts * (pace.prompt_tokens + 2.0 * pace.completion_tokens) * pace.learn_token
    limit, _ = answering(recipe)
    return _answers(limit, pace, 2 * recipe.handoff.heldout_problems) + _start(pace) + Span(golden, golden, golden)


def _overlapped(rl: RlSection, generate: float, learn: float) -> float:
    return max(generate, learn) if rl.staleness else generate + learn


def _generate(limit: int, pace: Pace, samples: int, case: str) -> float:
    mean, longest = _lengths(limit, pace, case)
    waves = -(-samples // SLOTS)
    return waves * longest * pace.decode_step + samples * mean * pace.decode_token


def _learn(rl: RlSection, pace: Pace, case: str) -> float:
    """The learner computes a prompt once for all of its samples."""
    mean, _ = _lengths(rl.max_new_tokens, pace, case)
    return rl.prompts_per_step * (pace.prompt_tokens + rl.samples_per_prompt * mean) * pace.learn_token


def _answers(limit: int, pace: Pace, problems: int) -> Span:
    low, middle, high = (_generate(limit, pace, problems, case) for case in GROWTH)
    return Span(low, middle, high)


def _start(pace: Pace) -> Span:
    return Span(pace.engine_start, pace.engine_start, pace.engine_start)


def _lengths(limit: int, pace: Pace, case: str) -> tuple[float, float]:
    """(mean, longest) completion in tokens, `limit` at most."""
    mean, longest = GROWTH[case]
    return min(limit, mean * pace.completion_tokens), min(limit, longest * pace.longest_completion)


def _forecast(span: Span, source: str) -> Figure:
    return Figure(value=span.middle, unit="s", kind="forecast", source=source, low=span.low, high=span.high)


def _value(record: QualifyRecord, name: str) -> float | None:
    figure = record.figures.get(name)
    return None if figure is None else figure.value


def _or(value: float | None, other: float) -> float:
    return other if value is None else value
