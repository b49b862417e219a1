"""Held-out problems: what a model answers to problems that nothing is trained on, sampled and greedy."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from isthmus.data.corpus import completion_of, prompt_ids
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines import Completion, Engine, Sampling
from isthmus.parity.paired import wilson_interval
from isthmus.pools import Pool
from isthmus.progress import Watch
from isthmus.records import EvaluationRecord, read_weights
from isthmus.run import Figure, RunFolder
from isthmus.stages.steps.data import tokenizer_of
from isthmus.stages.steps.generate import open_engine
from isthmus.stages.steps.step import StepRun
from isthmus.tasks import Mixture, Problem, interleaved, load_tasks, seeded, split_completion
from isthmus.tasks.parts.languages import language_of, share_in

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Asking:
    """Held-out problems, and how they are asked. `samples` are the answers to each."""

    tasks: Mixture
    problems: Sequence[Problem]
    samples: int
    max_new_tokens: int
    temperature: float
    seed: int

    @classmethod
    def of(cls, tasks: Mixture, count: int, samples: int, max_new_tokens: int, temperature: float, seed: int) -> Asking:
        return cls(tasks, interleaved(tasks.heldout, count), samples, max_new_tokens, temperature, seed)


@dataclass(frozen=True)
class Evaluation:
    """Held-out results, problem by problem: `correct` has each sampled answer, the others are of the first one."""

    correct: list[list[bool]]
    tokens: list[int]
    texts: list[str]
    greedy_correct: list[bool]

    @property
    def accuracy(self) -> float:
        """pass@1: the share of right answers."""
        answers = [one for row in self.correct for one in row]
        return sum(answers) / len(answers)

    @property
    def greedy_accuracy(self) -> float:
        return sum(self.greedy_correct) / len(self.greedy_correct)

    @property
    def mean_tokens(self) -> float:
        return sum(self.tokens) / len(self.tokens)

    def pass_at(self, k: int) -> tuple[float, float, float]:
        """(share, low, high): of problems of which one of k answers is right, as Chen et al. estimate it without bias
        (arXiv 2107.03374, equation 1)."""
        return share_with_interval([_pass_at(sum(row), len(row), k) for row in self.correct])


def _pass_at(right: int, count: int, k: int) -> float:
    return 1.0 - math.comb(count - right, k) / math.comb(count, k)


def share_with_interval(shares: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of one share for each problem: Wilson's interval, as if each problem had been answered once.
    That is wide enough, for the answers to one problem vary less than those to several."""
    mean = fmean(shares)
    low, high = wilson_interval(mean, len(shares), CONFIDENCE)
    return mean, 0.0 if mean == 0.0 else low, 1.0 if mean == 1.0 else high


def answer(engine: Engine, tokenizer: Tokenizer, asking: Asking) -> Evaluation:
    """Let an engine answer. The random numbers of a problem depend on the seed and the problem alone."""
    prompts = [prompt_ids(tokenizer, problem) for problem in asking.problems]
    seeds = [seeded("heldout", asking.seed, problem.id).getrandbits(48) for problem in asking.problems]

    def answers(temperature: float, count: int) -> list[list[Completion]]:
        return engine.generate(prompts, Sampling(asking.max_new_tokens, temperature, n=count), seeds)

    def right(groups: list[list[Completion]]) -> list[list[bool]]:
        pairs = zip(asking.problems, groups, strict=True)
        return [[_is_right(asking.tasks, tokenizer, problem, one) for one in group] for problem, group in pairs]

    sampled, greedy = answers(asking.temperature, asking.samples), answers(0.0, 1)
    first = [group[0] for group in sampled]
    texts = [completion_of(tokenizer, one.tokens) for one in first]
    return Evaluation(right(sampled), [len(one.tokens) for one in first], texts, [row[0] for row in right(greedy)])


def _is_right(tasks: Mixture, tokenizer: Tokenizer, problem: Problem, completion: Completion) -> bool:
    return tasks.of(problem).accuracy(problem, completion_of(tokenizer, completion.tokens)) == 1.0


def stored(run: RunFolder, path: Path) -> Evaluation | None:
    """An evaluation that was stored, so that a continued run need not repeat it. Raises DamagedFile if touched."""
    if not path.exists():
        return None
    return Evaluation(**json.loads(run.read_kept(path, "Or delete it: its problems are then asked again")))


def store(run: RunFolder, path: Path, evaluation: Evaluation, weights_sha256: str) -> None:
    """Keep what weights with this hash answered."""
    run.keep(path, json.dumps(evaluation.__dict__).encode(), {"recipe": run.recipe.digest(), "weights": weights_sha256})


def evaluate(step: StepRun[Any], watch: Watch) -> EvaluationRecord:
    """Answer the problems of [evaluation] with the weights that a step left, and write the record."""
    started, section, recipe = time.time(), step.recipe.evaluation, step.recipe
    pool = step.away
    tasks = load_tasks(recipe)
    asking = Asking.of(
        Mixture(tasks, section.tasks or dict.fromkeys(tasks, 1.0), heldout_alone=True),
        section.problems,
        section.samples,
        section.max_new_tokens,
        section.temperature,
        recipe.seed,
    )
    watch.say(f"  {len(asking.problems)} held-out problems after {step.name}")
    tokenizer, left = tokenizer_of(step), step.left
    weights = left.weights(step.architecture, recipe.seed, step.event)
    with open_engine(step, weights, section.format, tokenizer, pool, pool.threads) as engine:
        found = answer(engine, tokenizer, asking)
    record = _record(step, pool, asking, found, started)
    weights_sha256 = read_weights(step.run, step.name).checkpoint_sha256
    step.run.write_record(f"steps/{step.name}/evaluation", record, {"weights": weights_sha256})
    seconds = round(record.seconds, 3)
    step.event("evaluate", which="end", accuracy=round(found.accuracy, 5), problems=len(found.correct), seconds=seconds)
    watch.say(f"  held-out accuracy {record.accuracy}, greedy {record.greedy_accuracy}")
    return record


def _record(step: StepRun[Any], pool: Pool, asking: Asking, found: Evaluation, started: float) -> EvaluationRecord:
    source = (
        f"{len(found.correct)} held-out problems, {asking.samples} answers each at temperature {asking.temperature}, "
        f"generated in {step.recipe.evaluation.format} on pool {pool.name}; {CONFIDENCE:.0%} interval"
    )

    unreal = pool.rehearsed or step.recipe.drill is not None

    def percent(share: tuple[float, float, float], of: str = source) -> Figure:
        value, low, high = (100 * one for one in share)
        return Figure.measured(value, "%", of, rehearsed=unreal, low=low, high=high)

    greedy = [float(one) for one in found.greedy_correct]
    by_task = {
        name: percent(share_with_interval([fmean(row) for row in rows]))
        for name in asking.tasks.tasks
        if (rows := [row for problem, row in zip(asking.problems, found.correct, strict=True) if problem.task == name])
    }
    spoken = [
        share_in(split_completion(text)[0], language_of(problem.prompt))
        for problem, text in zip(asking.problems, found.texts, strict=True)
    ]
    return EvaluationRecord(
        recipe_sha256=step.recipe.digest(),
        started=started,
        ended=time.time(),
        step=step.name,
        pool=pool.name,
        rehearsed=pool.rehearsed,
        drill=step.recipe.drill is not None,
        format=step.recipe.evaluation.format,
        problems=[problem.id for problem in asking.problems],
        correct=found.correct,
        accuracy=percent(found.pass_at(1)),
        greedy_accuracy=percent(share_with_interval(greedy), f"{len(greedy)} held-out problems, greedy"),
        pass_at={k: percent(found.pass_at(k)) for k in range(2, asking.samples + 1)},
        by_task=by_task,
        language=percent(share_with_interval(spoken)),
        tokens=Figure.measured(found.mean_tokens, "tokens", source, rehearsed=unreal),
    )
