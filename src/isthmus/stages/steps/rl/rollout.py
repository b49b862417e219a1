"""Rollouts: what the engine wrote for the prompts of a step, and what it earned."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from isthmus.data.corpus import completion_of, prompt_ids
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines import Completion, Engine, Sampling
from isthmus.errors import DamagedFile
from isthmus.recipe.steps import RlSection
from isthmus.rewards import Rewards, Sample, Scores
from isthmus.stages.steps.step import StepRun
from isthmus.tasks import Mixture, Problem, seeded


@dataclass
class Rollout:
    """Samples of one step: G completions for each of P prompts, with the scores of all P * G."""

    problems: list[Problem]
    prompts: list[list[int]]
    completions: list[list[Completion]]
    scores: Scores
    seconds: float

    @property
    def flat(self) -> list[tuple[int, Completion]]:
        """(prompt index, completion), sample by sample."""
        return [(index, one) for index, group in enumerate(self.completions) for one in group]

    @property
    def version(self) -> int:
        return min(completion.version for _, completion in self.flat)

    @property
    def totals(self) -> Tensor:
        """[P, G], what is maximised; NaN for a sample that could not be judged."""
        return torch.tensor(self.scores.numbers).reshape(len(self.prompts), -1)

    def shown(self) -> dict[str, Any]:
        """For an event."""
        samples, tokens = len(self.flat), sum(len(one.tokens) for _, one in self.flat)
        return {
            **self.scores.shown(),
            "completion_tokens": round(tokens / samples, 3),
            "truncated": sum(one.finish_reason == "length" for _, one in self.flat) / samples,
            "tokens": tokens,
            "tokens_per_s": round(tokens / self.seconds, 1),
            "rollout_s": round(self.seconds, 4),
        }


_ROLLOUT = TypeAdapter(Rollout)


@dataclass
class Rollouts:
    """The engine at work on the task, step by step.

    With `staleness` it generates the next step's samples in the background while this step's are learnt from: those
    come from the weights of one step before, and a checkpoint keeps them, for a continued run has other weights.
    """

    work: StepRun[RlSection]
    tasks: Mixture
    tokenizer: Tokenizer
    rewards: Rewards
    engine: Engine
    background: Executor
    _next: Future[Rollout] | None = None

    def take(self, step: int) -> Rollout:
        """The samples of a step. The next ones are begun, if they may lag behind."""
        rollout = self._next.result() if self._next else self.generate(step)
        section = self.work.section
        begun = section.staleness and step + 1 < section.steps
        self._next = self.background.submit(self.generate, step + 1) if begun else None
        return rollout

    def wait(self) -> None:
        """Until the engine is idle: weights cross between two rollouts, never within one."""
        if self._next is not None:
            self._next.result()

    def generate(self, step: int) -> Rollout:
        """Samples for the prompts of a step; prompts and sampling depend on the seed and the step alone."""
        began = time.perf_counter()
        section = self.work.section
        chance = seeded(self.work.stream, self.work.recipe.seed, step)
        problems = self.tasks.draw(chance, section.prompts_per_step)
        seeds = [chance.getrandbits(48) for _ in problems]
        prompts = self.prompts(problems)
        replay = section.loss.router_replay
        sampling = Sampling(section.max_new_tokens, section.temperature, n=section.samples_per_prompt, routes=replay)
        completions = self.engine.generate(prompts, sampling, seeds)
        pairs = [(problem, one) for problem, group in zip(problems, completions, strict=True) for one in group]
        scores = self.rewards.score([self.sample(problem, one) for problem, one in pairs])
        return Rollout(problems, prompts, completions, scores, time.perf_counter() - began)

    def prompts(self, problems: Sequence[Problem]) -> list[list[int]]:
        return [prompt_ids(self.tokenizer, problem) for problem in problems]

    def sample(self, problem: Problem, completion: Completion) -> Sample:
        """A completion, for rewards."""
        text, limit = completion_of(self.tokenizer, completion.tokens), self.work.section.max_new_tokens
        finished = completion.finish_reason != "length"
        return Sample(problem, self.tasks.of(problem), text, len(completion.tokens), limit, finished)

    def is_correct(self, problem: Problem, completion: Completion) -> bool:
        return self.tasks.of(problem).accuracy(problem, completion_of(self.tokenizer, completion.tokens)) == 1.0

    def store(self, step: int, weights_sha256: str) -> None:
        """Keep the samples that older weights, with this hash, generated for this step: a continued run learns from
        the same ones."""
        path, section, run = self._path(step), self.work.section, self.work.run
        if self._next is not None:
            made_from = {"recipe": run.recipe.digest(), "weights": weights_sha256}
            run.keep(path, _ROLLOUT.dump_json(self._next.result()), made_from)
        oldest = self._path(step - section.checkpoint_every * (section.keep_checkpoints + 1))
        old = [stored for stored in path.parent.glob("rollout-*.json") if stored.name < oldest.name]
        run.forget(*old)
        for stored in old:
            stored.unlink()

    def restore(self, step: int) -> None:
        """Take up the samples that were stored for this step, if there are any. Raises DamagedFile."""
        path = self._path(step)
        if not path.exists():
            return
        advice = "Or delete it: its samples are then generated anew"
        try:
            stored = _ROLLOUT.validate_json(self.work.run.read_kept(path, advice))
        except ValidationError as error:
            raise DamagedFile(f"{path} cannot be read ({error}). {advice}.") from None
        self._next = Future()
        self._next.set_result(stored)

    def _path(self, step: int) -> Path:
        return self.work.folder / f"rollout-{step:06d}.json"
