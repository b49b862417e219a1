"""What RL was worth: the held-out problems before and after it, and the record of the stage."""

from __future__ import annotations

import time
from collections.abc import Callable

from isthmus.parity.paired import compare_answers
from isthmus.recipe.steps import RlSection
from isthmus.records import RlRecord
from isthmus.report_page.timing import held_rollouts
from isthmus.run import Figure
from isthmus.stages.steps import heldout
from isthmus.stages.steps.heldout import Evaluation
from isthmus.stages.steps.rl.rollouts import Rollouts
from isthmus.stages.steps.step import StepRun
from isthmus.trainer.checkpoint import SavedCheckpoint

PER_STEP = {
    "mismatch_abs": ("mismatch_abs", 1, "nats/token"),
    "mismatch_k3": ("mismatch_k3", 1, "nats/token"),
    "importance_clipped": ("importance_clipped", 100, "%"),
    "parity_gap": ("parity_gap", 1, "nats/token"),
    "update_bytes": ("update_bytes", 1, "B/step"),
    "update_ratio": ("update_ratio", 100, "% of a full update"),
    "rollout_tokens_per_s": ("tokens_per_s", 1, "tokens/s"),
}
"""Figures of the record that are means over steps: the key in their events, the scale, and the unit."""


def evaluate(
    work: StepRun[RlSection], rollouts: Rollouts, which: str, weights_sha256: str, say: Callable[[str], None]
) -> Evaluation:
    """Held-out problems through an engine with these weights; stored, so that a continued run need not repeat it."""
    path = work.folder / f"heldout-{which}.json"
    if (before := heldout.stored(work.run, path)) is not None:
        return before
    section, began = work.section, time.perf_counter()
    say(f"  held-out problems {which.replace('-', ' ')}{'' if '-' in which else ' RL'}")
    asking = heldout.Asking.of(
        rollouts.tasks,
        section.heldout_problems,
        section.heldout_samples,
        section.max_new_tokens,
        section.temperature,
        work.recipe.seed,
    )
    result = heldout.answer(rollouts.engine, rollouts.tokenizer, asking)
    heldout.store(work.run, path, result, weights_sha256)
    work.event(
        "evaluate",
        which=which,
        problems=len(asking.problems),
        accuracy=round(result.accuracy, 5),
        greedy_accuracy=round(result.greedy_accuracy, 5),
        completion_tokens=round(result.mean_tokens, 3),
        seconds=round(time.perf_counter() - began, 3),
    )
    return result


class Comparison:
    """The held-out problems before and after RL, as figures."""

    def __init__(self, work: StepRun[RlSection], before: Evaluation, after: Evaluation):
        self.work, self.before, self.after = work, before, after
        self.held = held_rollouts(work.run.events(work.name), work.name)
        self.away = work.away.name
        self.rehearsed = any(work.recipe.pools[name].rehearsed for name in {*self.held, self.away})
        self.drill = work.recipe.drill is not None
        self.count = len(before.correct)
        self.source = (
            f"{self.count} held-out problems, {_each(work.section.heldout_samples)} each at temperature "
            f"{work.section.temperature}, generated on pool {', then '.join(self.held) or self.away}"
        )

    def record(self, started: float, saved: SavedCheckpoint) -> RlRecord:
        """The record of a stage that ends now, with its last checkpoint."""
        before, after, start = self.before, self.after, self.work.start
        sample_before, sample_after = self._telling_example()
        return RlRecord(
            recipe_sha256=self.work.recipe.digest(),
            started=started,
            ended=time.time(),
            step=self.work.name,
            pool=self.work.place.pool,
            drill=self.drill,
            started_from=start.name,
            started_from_sha256=start.sha256,
            rollout_pool=self.away,
            rollout_rehearsed=self.rehearsed,
            rollout_pools={name: self._held(name, seconds) for name, (seconds, _) in self.held.items()},
            algorithm=self.work.section.algorithm,
            steps=saved.step,
            resumed_from=[event["from_step"] for event in self.work.events("resume")],
            checkpoint=str(saved.folder.relative_to(self.work.run.path)),
            checkpoint_sha256=saved.sha256,
            weight_version=saved.step,
            heldout_problems=self.count,
            accuracy_before=self._accuracy(before),
            accuracy_after=self._accuracy(after),
            accuracy_gain=self._gain(),
            thought_tokens_before=self._figure(before.mean_tokens, "tokens/completion", self.source),
            thought_tokens_after=self._figure(after.mean_tokens, "tokens/completion", self.source),
            figures=self._greedy() | self._pass_at_more() | self._per_step(),
            sample_before=sample_before,
            sample_after=sample_after,
        )

    def _held(self, pool: str, seconds: float) -> Figure:
        source = f"events.jsonl: rollouts of {self.work.name} on {pool}"
        rehearsed = self.drill or self.work.recipe.pools[pool].rehearsed
        return Figure.measured(seconds, "s", source, rehearsed=rehearsed)

    def _figure(self, value: float, unit: str, source: str, *interval: float) -> Figure:
        low, high = interval or (None, None)
        return Figure.measured(value, unit, source, rehearsed=self.rehearsed or self.drill, low=low, high=high)

    def _accuracy(self, evaluation: Evaluation) -> Figure:
        return self._pass_at(evaluation, 1)

    def _pass_at(self, evaluation: Evaluation, k: int) -> Figure:
        value, low, high = (100 * one for one in evaluation.pass_at(k))
        return self._figure(value, "%", f"{self.source}, 95% Wilson interval", low, high)

    def _pass_at_more(self) -> dict[str, Figure]:
        """pass@k for each k above 1 that the answers can tell."""
        return {
            f"pass_at_{k}_{which}": self._pass_at(one, k)
            for which, one in (("before", self.before), ("after", self.after))
            for k in range(2, self.work.section.heldout_samples + 1)
        }

    def _gain(self) -> Figure:
        compared = compare_answers(self.before.correct, self.after.correct, 0.95)
        gain, low, high = compared.difference, compared.low, compared.high
        source = f"{self.source}, paired by problem, 95% interval"
        return self._figure(100 * gain, "points", source, 100 * low, 100 * high)

    def _greedy(self) -> dict[str, Figure]:
        source = f"{self.count} held-out problems, greedy"
        return {
            f"greedy_accuracy_{which}": self._figure(100 * one.greedy_accuracy, "%", source)
            for which, one in (("before", self.before), ("after", self.after))
        }

    def _per_step(self) -> dict[str, Figure]:
        """Means over the steps; `parity_gap`, the chip's side of the gap, only if versions were checked."""
        steps, figures = self.work.events("step"), dict[str, Figure]()
        for name, (key, scale, unit) in PER_STEP.items():
            values = [event[key] for event in steps if event.get(key) is not None]
            source = f"mean over {len(steps)} steps, events.jsonl"
            if name == "parity_gap":
                source = f"mean over {len(values)} versions, engine against the exact model of the format, events.jsonl"
            if values or name != "parity_gap":
                figures[name] = self._figure(scale * (sum(values) / max(len(values), 1)), unit, source)
        return figures

    def _telling_example(self) -> tuple[str, str]:
        """One held-out problem as it was answered before and after: the first that RL turned from wrong to right."""
        pairs = zip(self.before.correct, self.after.correct, strict=True)
        index = next((i for i, (old, new) in enumerate(pairs) if new[0] and not old[0]), 0)
        return self.before.texts[index], self.after.texts[index]


def _each(samples: int) -> str:
    return "one sample" if samples == 1 else f"{samples} samples"
