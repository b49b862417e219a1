"""Who else gives log-probabilities of what the policy wrote: a reference, and a teacher."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from isthmus.algos import algorithm_config
from isthmus.engines.remote import HttpEngine
from isthmus.errors import IsthmusError
from isthmus.model.model import Model
from isthmus.stages.steps.rl.rollout import Rollout
from isthmus.stages.steps.rl.state import State, empty_model
from isthmus.stages.steps.step import StepRun


@dataclass(frozen=True)
class RemoteTeacher:
    """A server that scores prompts: ours, vLLM, or one with vLLM's `prompt_logprobs`. It must have the student's
    tokenizer. Servers score at temperature 1."""

    engine: HttpEngine

    def logprobs(self, rollout: Rollout, kept: list[int]) -> list[list[float]]:
        """Of the completions' tokens, for the samples whose numbers are `kept`. Raises EngineError."""
        flat = [rollout.flat[number] for number in kept]
        scored = self.engine.score([rollout.prompts[prompt] + one.tokens for prompt, one in flat])
        tails = zip(flat, scored, strict=True)
        return [[place.logprob for place in places[-len(one.tokens) :]] for (_, one), places in tails]


@dataclass(frozen=True)
class Beside:
    """`reference` has the weights that a KL is measured to; the teacher is a model here or a server."""

    reference: Model | None = None
    teacher: Model | None = None
    remote: RemoteTeacher | None = None

    @classmethod
    def of(cls, state: State, *, models_alone: bool = False) -> Beside:
        """What the step's section asks for, or of that only what is a model here.

        Raises IsthmusError for a teacher that cannot teach this model.
        """
        section = state.work.section
        measured = section.loss.kl_weight or algorithm_config(section).reward_kl()
        reference = reference_model(state) if measured else None
        asked = section.teacher
        if asked is None or (models_alone and asked.url is not None):
            return cls(reference)
        if asked.url is None:
            assert asked.step is not None
            return cls(reference, teacher_model(state, asked.step))
        key = os.environ.get(asked.key_variable) if asked.key_variable else None
        engine = HttpEngine(asked.url, key)
        engine.start(Path())
        return cls(reference, remote=RemoteTeacher(engine))


def reference_model(state: State) -> Model:
    """A model with the weights that the step began with."""
    work, ranks = state.work, state.crew.ranks
    model = empty_model(work.architecture, work.recipe.train, ranks)
    work.start.fill(model, work.recipe.seed, ranks.storage, state.tell)
    return model.requires_grad_(False)


def teacher_model(state: State, step: str) -> Model:
    """A model with the weights that another step left."""
    work, ranks = state.work, state.crew.ranks
    theirs = StepRun.of(work.run, step)
    if theirs.architecture.vocab_size != work.architecture.vocab_size:
        raise IsthmusError(
            f"step.{work.name}.teacher: {step} has {theirs.architecture.vocab_size} tokens and {work.name} "
            f"{work.architecture.vocab_size}: a teacher scores its student's tokens, so they need one tokenizer"
        )
    model = empty_model(theirs.architecture, work.recipe.train, ranks)
    theirs.left.fill(model, work.recipe.seed, ranks.storage, state.tell)
    return model.requires_grad_(False)
