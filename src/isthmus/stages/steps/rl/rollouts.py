"""The engine at work: rollouts, step by step, ahead of the learner where they may be."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from isthmus.algos import algorithm_config
from isthmus.data.corpus import completion_of, prompt_ids
from isthmus.data.tokenizer import Tokenizer
from isthmus.engines import Completion, Engine, Sampling
from isthmus.errors import DamagedFile
from isthmus.recipe.steps import RlSection
from isthmus.rewards import Rewards, Sample
from isthmus.stages.steps.rl.resampling import telling, telling_groups
from isthmus.stages.steps.rl.rollout import Rollout
from isthmus.stages.steps.step import StepRun
from isthmus.tasks import Mixture, Problem, seeded


@dataclass
class Replay:
    """What an update learns from; `scored` is what a remote teacher gave its tokens. `attempt` counts the starts of the
    step until then: another one may have had other samples."""

    rollout: Rollout
    scored: list[list[float]] | None
    attempt: int

    @property
    def samples(self) -> bytes:
        """The same for the same samples, whenever they were written."""
        return _REPLAY.dump_json(self, exclude={"attempt": True, "rollout": {"seconds", "pool"}})


_ROLLOUT, _REPLAY = TypeAdapter(Rollout), TypeAdapter(Replay)


def replay_path(work: StepRun[RlSection], step: int) -> Path:
    """Of the update after `step` finished ones."""
    return work.folder / f"replay-{step + 1:06d}.json"


def read_replay(work: StepRun[RlSection], step: int) -> Replay | None:
    """What the update after `step` finished ones learnt from; None if it was not kept. Raises DamagedFile."""
    path = replay_path(work, step)
    if not path.exists():
        return None
    advice = "Or delete it: the gate of a revert then has one update less to compare"
    try:
        return _REPLAY.validate_json(work.run.read_kept(path, advice))
    except ValidationError as error:
        raise DamagedFile(f"{path} cannot be read ({error}). {advice}.") from None


def sampling_of(section: RlSection) -> Sampling:
    """How the samples of a step are drawn, and what is told with them."""
    return Sampling(
        section.max_new_tokens,
        section.temperature,
        n=section.samples_per_prompt,
        routes=section.loss.router_replay,
        top_p=section.top_p,
        top_k=section.top_k,
        min_p=section.min_p,
        kept=section.loss.keep_sampling_mask,
    )


@dataclass
class Rollouts:
    """The engine at work on the task, step by step.

    With `staleness` k it generates the samples of the next k steps in the background while this step's are learnt from,
    one rollout after the other: their first tokens come from weights of k steps before at most, and a checkpoint keeps
    them, for a continued run has other weights. `pool` names that of the engine now.
    """

    work: StepRun[RlSection]
    tasks: Mixture
    tokenizer: Tokenizer
    rewards: Rewards
    engine: Engine
    background: Executor
    pool: Callable[[], str] = str
    _begun: deque[Future[Rollout]] = field(default_factory=deque)

    def take(self, step: int) -> Rollout:
        """The samples of a step. The next ones are begun, as many as may lag behind."""
        rollout = self._begun.popleft().result() if self._begun else self.generate(step)
        section = self.work.section
        for number in range(step + 1 + len(self._begun), min(step + 1 + section.staleness, section.steps)):
            self._begun.append(self.background.submit(self.generate, number))
        return rollout

    def wait(self) -> None:
        """Until new weights may cross: when the engine is idle, or at once if they may reach what is being written."""
        if not self.work.section.update_while_writing:
            for begun in self._begun:
                begun.result()

    def generate(self, step: int) -> Rollout:
        """Samples for the prompts of a step; prompts and sampling depend on the seed and the step alone.

        Where the algorithm wants prompts that tell something, others are drawn until there are enough.
        """
        section = self.work.section
        chance = seeded(self.work.stream, self.work.recipe.seed, step)
        most, wanted = algorithm_config(section).rollouts_at_most(), section.prompts_per_step
        rollouts = [self._rollout(chance)]
        if most == 1:
            return rollouts[0]
        while len(rollouts) < most and sum(len(telling_groups(one)) for one in rollouts) < wanted:
            rollouts.append(self._rollout(chance))
        return telling(rollouts, wanted)

    def _rollout(self, chance: random.Random) -> Rollout:
        began, section = time.perf_counter(), self.work.section
        problems = self.tasks.draw(chance, section.prompts_per_step)
        seeds = [chance.getrandbits(48) for _ in problems]
        prompts = self.prompts(problems)
        completions = self.engine.generate(prompts, sampling_of(section), seeds)
        pairs = [(problem, one) for problem, group in zip(problems, completions, strict=True) for one in group]
        scores = self.rewards.score([self.sample(problem, one) for problem, one in pairs])
        return Rollout(problems, prompts, completions, scores, time.perf_counter() - began, pool=self.pool())

    def prompts(self, problems: Sequence[Problem]) -> list[list[int]]:
        return [prompt_ids(self.tokenizer, problem) for problem in problems]

    def sample(self, problem: Problem, completion: Completion) -> Sample:
        """A completion, for rewards."""
        text, limit = completion_of(self.tokenizer, completion.tokens), self.work.section.max_new_tokens
        finished = completion.finish_reason != "length"
        return Sample(problem, self.tasks.of(problem), text, len(completion.tokens), limit, finished)

    def store(self, step: int, weights_sha256: str) -> None:
        """Keep the samples that older weights, with this hash, generated for the steps from this one on: a continued
        run learns from the same ones."""
        path, section, run = self._path(step), self.work.section, self.work.run
        made_from = {"recipe": run.recipe.digest(), "weights": weights_sha256}
        for number, begun in enumerate(self._begun, step):
            run.keep(self._path(number), _ROLLOUT.dump_json(begun.result()), made_from)
        oldest = self._path(step - section.checkpoint_every * (section.keep_checkpoints + 1))
        self._drop(stored for stored in path.parent.glob("rollout-*.json") if stored.name < oldest.name)

    def keep(self, step: int, replay: Replay, weights_sha256: str) -> None:
        """Keep what an update soon after a checkpoint learns from: the gate of a revert computes it again."""
        section, run = self.work.section, self.work.run
        before = read_replay(self.work, step)
        if before is not None and before.samples == replay.samples:
            return
        made_from = {"recipe": run.recipe.digest(), "weights": weights_sha256}
        run.keep(replay_path(self.work, step), _REPLAY.dump_json(replay), made_from)
        oldest = replay_path(self.work, step - section.checkpoint_every * (section.keep_checkpoints + 1))
        self._drop(stored for stored in self.work.folder.glob("replay-*.json") if stored.name < oldest.name)

    def _drop(self, stored: Iterable[Path]) -> None:
        old = list(stored)
        self.work.run.forget(*old)
        for path in old:
            path.unlink()

    def restore(self, step: int) -> None:
        """Take up the samples that were stored for the steps from this one on, if there are any. Raises DamagedFile."""
        for number in range(step, step + self.work.section.staleness):
            path = self._path(number)
            if not path.exists():
                return
            advice = "Or delete it: its samples are then generated anew"
            try:
                stored = _ROLLOUT.validate_json(self.work.run.read_kept(path, advice))
            except ValidationError as error:
                raise DamagedFile(f"{path} cannot be read ({error}). {advice}.") from None
            done: Future[Rollout] = Future()
            done.set_result(stored)
            self._begun.append(done)

    def _path(self, step: int) -> Path:
        return self.work.folder / f"rollout-{step:06d}.json"
