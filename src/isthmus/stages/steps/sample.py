"""Rejection sampling: a model answers training problems, filters keep some answers, and they are data for a later step.

R1 made most of its second fine-tuning's data so (arXiv 2501.12948, section 2.3.3). Problems are answered in batches; a
batch that is answered is on the disk, and a run that is continued goes on after it. Problems, seeds and so the data
depend on the recipe and the weights alone.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isthmus.data.corpus import completion_of, prompt_ids
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines import Completion, Engine, Sampling
from isthmus.pools import Pool
from isthmus.progress import Watch
from isthmus.recipe.steps import SampleSection
from isthmus.records import SampleRecord
from isthmus.rewards import Sample
from isthmus.rewards.parts import filters
from isthmus.rewards.parts.filters import Filter
from isthmus.run import Figure, sha256_file
from isthmus.stages.steps.data import tokenizer_of
from isthmus.stages.steps.generate import open_engine
from isthmus.stages.steps.step import StepRun
from isthmus.tasks import Mixture, Problem, seeded, split_completion, tasks_of

SAMPLES = "samples.jsonl"


def execute(work: StepRun[SampleSection], watch: Watch) -> SampleRecord:
    """Answer the problems that are not answered yet, and write what was kept with where it comes from."""
    started, section = time.time(), work.section
    pool = work.away
    tasks = tasks_of(work.recipe, section)
    problems = chosen_problems(tasks, section.prompts, seeded(work.stream, work.recipe.seed, "problems"))
    size = section.prompts_per_batch
    batches = [problems[at : at + size] for at in range(0, len(problems), size)]
    work.event("start", pool=pool.name, start=work.start.name)
    _answer(work, Asking(work, tasks, tokenizer_of(work), chosen_filters(section, tasks)), batches, pool, watch)
    record = _record(work, pool, len(problems), [_read(work, number) for number in range(len(batches))], started)
    work.run.write_record(f"steps/{work.name}/record", record)
    work.event("end", seconds=round(record.seconds, 3))
    watch.say(f"  kept {record.kept:,} of {record.generated:,} answers to {record.prompts:,} problems")
    return record


def chosen_problems(tasks: Mixture, count: int, chance: Any) -> list[Problem]:
    """Training problems, none twice, of each task by its weight as far as it has them; `count` at most."""
    whole = sum(weight for weight in tasks.weights.values())
    chosen: list[Problem] = []
    for name, weight in tasks.weights.items():
        problems = tasks.tasks[name].train
        chosen += chance.sample(problems, min(len(problems), round(count * weight / whole)))
    chance.shuffle(chosen)
    return chosen[:count]


def chosen_filters(section: SampleSection, tasks: Mixture) -> dict[str, Filter]:
    """The filters that the recipe names, in its order."""

    def heldout_prompts() -> Iterator[str]:
        return (problem.prompt for problems in tasks.heldout.values() for problem in problems)

    made: dict[str, Callable[[], Filter]] = {
        "correct": filters.correct,
        "one-language": filters.one_language,
        "not-longer-than": lambda: filters.not_longer_than(section.longest or section.max_new_tokens),
        "no-repetition": filters.no_repetition,
        "unlike-heldout": lambda: filters.unlike_heldout(heldout_prompts()),
    }
    assert made.keys() == set(filters.FILTERS)
    return {name: made[name]() for name in section.keep}


@dataclass(frozen=True)
class Asking:
    """Lets an engine answer problems and filters judge the answers."""

    work: StepRun[SampleSection]
    tasks: Mixture
    tokenizer: Tokenizer
    filters: Mapping[str, Filter]

    def batch(self, engine: Engine, number: int, problems: Sequence[Problem]) -> dict[str, Any]:
        """What is stored of a batch: how many answers there were, what each filter dropped, and the rows that stay."""
        section = self.work.section
        prompts = [prompt_ids(self.tokenizer, problem) for problem in problems]
        seeds = [self._seed(problem) for problem in problems]
        sampling = Sampling(section.max_new_tokens, section.temperature, n=section.samples_per_prompt)
        groups = engine.generate(prompts, sampling, seeds)
        dropped: Counter[str] = Counter()
        rows: list[dict[str, Any]] = []
        for problem, group, seed in zip(problems, groups, seeds, strict=True):
            kept = [row for one in group if (row := self._row(problem, one, seed, dropped)) is not None]
            unlike = list({(row["thought"], row["answer"]): row for row in kept}.values())
            dropped["repeated"] += len(kept) - len(unlike)
            most = section.per_prompt or len(unlike)
            dropped["per-prompt"] += len(unlike[most:])
            rows += unlike[:most]
        tokens = sum(len(one.tokens) for group in groups for one in group)
        answers = sum(map(len, groups))
        return {"number": number, "generated": answers, "tokens": tokens, "dropped": dropped, "rows": rows}

    def _row(self, problem: Problem, completion: Completion, seed: int, dropped: Counter[str]) -> dict[str, Any] | None:
        """A line of the data, or None if a filter drops it; the first one that does is counted."""
        section, finished = self.work.section, completion.finish_reason != "length"
        text = completion_of(self.tokenizer, completion.tokens)
        sample = Sample(problem, self.tasks.of(problem), text, len(completion.tokens), section.max_new_tokens, finished)
        failed = (name for name, passes in self.filters.items() if not passes(sample))
        if (why := "unfinished" if not finished or sample.answer is None else next(failed, None)) is not None:
            dropped[why] += 1
            return None
        thought, answer = split_completion(text)
        return {
            "id": problem.id,
            "task": problem.task,
            "prompt": problem.prompt,
            "messages": list(problem.messages),
            "thought": thought,
            "answer": answer,
            "tokens": len(completion.tokens),
            "seed": seed,
        }

    def _seed(self, problem: Problem) -> int:
        return seeded(self.work.stream, self.work.recipe.seed, problem.task, problem.id).getrandbits(48)


def _answer(
    work: StepRun[SampleSection], asking: Asking, batches: Sequence[Sequence[Problem]], pool: Pool, watch: Watch
) -> None:
    waiting = [number for number in range(len(batches)) if not _batch_file(work, number).exists()]
    with watch.count(work.name, len(batches)) as counter:
        counter.advance_to(len(batches) - len(waiting))
        if not waiting:
            return
        if len(waiting) < len(batches):
            work.event("resume", from_step=len(batches) - len(waiting))
        weights = work.start.weights(work.architecture, work.recipe.seed, work.event)
        with open_engine(work, weights, work.section.rollout_format, asking.tokenizer, pool, pool.threads) as engine:
            for number in waiting:
                began = time.perf_counter()
                found = asking.batch(engine, number, batches[number])
                content = json.dumps(found, ensure_ascii=False).encode()
                work.run.keep(_batch_file(work, number), content, _made_from(work))
                seconds = time.perf_counter() - began
                told = {"kept": len(found["rows"]), "generated": found["generated"], "tokens": found["tokens"]}
                work.event("step", step=number + 1, seconds=round(seconds, 4), **told)
                counter.advance_to(number + 1, f"kept {told['kept']} of {told['generated']}")


def _batch_file(work: StepRun[SampleSection], number: int) -> Path:
    return work.folder / "batches" / f"{number:06d}.json"


def _read(work: StepRun[SampleSection], number: int) -> dict[str, Any]:
    path = _batch_file(work, number)
    found: dict[str, Any] = json.loads(work.run.read_kept(path, "Or delete it: its problems are then answered again"))
    return found


def _made_from(work: StepRun[SampleSection]) -> dict[str, str]:
    weights = work.start.sha256
    return {"recipe": work.recipe.digest(), **({"weights": weights} if weights else {})}


def _record(
    work: StepRun[SampleSection], pool: Pool, prompts: int, batches: Sequence[dict[str, Any]], started: float
) -> SampleRecord:
    dropped: Counter[str] = Counter()
    for batch in batches:
        dropped.update(batch["dropped"])
    rows = [row for batch in batches for row in batch["rows"]]
    path = work.folder / SAMPLES
    work.run.keep(path, b"".join(_lines(rows)), _made_from(work))
    unreal = pool.rehearsed or work.recipe.drill is not None
    generated, start = sum(batch["generated"] for batch in batches), work.start
    source = f"{generated} answers to {prompts} problems, generated on pool {pool.name}"
    shares = {
        "kept": (100 * len(rows) / max(1, generated), "%"),
        "answer_tokens": (sum(batch["tokens"] for batch in batches) / max(1, generated), "tokens/answer"),
    }
    return SampleRecord(
        recipe_sha256=work.recipe.digest(),
        started=started,
        ended=time.time(),
        step=work.name,
        pool=pool.name,
        rehearsed=pool.rehearsed,
        drill=work.recipe.drill is not None,
        weights_of=start.name,
        weights_sha256=start.sha256,
        format=work.section.rollout_format,
        seed=work.recipe.seed,
        prompts=prompts,
        generated=generated,
        kept=len(rows),
        dropped=dict(dropped),
        samples=str(path.relative_to(work.run.path)),
        samples_sha256=sha256_file(path),
        figures={
            name: Figure.measured(value, unit, source, rehearsed=unreal) for name, (value, unit) in shares.items()
        },
    )


def _lines(rows: Sequence[dict[str, Any]]) -> Iterator[bytes]:
    for row in rows:
        yield json.dumps(row, ensure_ascii=False).encode() + b"\n"
