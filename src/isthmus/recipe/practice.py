"""What probes and estimates take for the work of a recipe where its steps differ: one of each kind."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.recipe.schema import Recipe
from isthmus.recipe.steps import PretrainSection, RlSection, SampleSection, SftSection, TextSection


@dataclass(frozen=True)
class Generating:
    """How engines generate in a run: `max_new_tokens` is the longest completion."""

    max_new_tokens: int
    temperature: float
    rollout_format: str
    staleness: int


def taught(recipe: Recipe) -> SftSection:
    """Supervised training on worked examples: the first such step, or one of the length and with the optimiser of the
    first step that trains at all."""
    for step in recipe.step:
        if isinstance(step, SftSection):
            return step
    like = next(step for step in recipe.step if not isinstance(step, SampleSection))
    return SftSection(name="practice", kind="sft", steps=like.steps, optimizer=like.optimizer)


def pretrained(recipe: Recipe) -> PretrainSection | None:
    """The first step that trains on plain text, or None."""
    return next((step for step in recipe.step if isinstance(step, PretrainSection)), None)


def first_text(recipe: Recipe) -> TextSection:
    """What a pool that trains is asked first: pretraining, or worked examples."""
    return pretrained(recipe) or taught(recipe)


def generating(recipe: Recipe) -> Generating:
    """The first step whose samples an engine makes; what the hand-off asks, in the served format, if there is none."""
    for step in recipe.step:
        if isinstance(step, RlSection):
            return Generating(step.max_new_tokens, step.temperature, step.rollout_format, step.staleness)
        if isinstance(step, SampleSection):
            return Generating(step.max_new_tokens, step.temperature, step.rollout_format, 0)
    asked = answering(recipe)
    return Generating(*asked, recipe.handoff.format, 0)


ANSWER_TOKENS, ANSWER_TEMPERATURE = 256, 1.0


def answering(recipe: Recipe) -> tuple[int, float]:
    """(longest answer in tokens, temperature) of the held-out problems of the hand-off."""
    learnt = [step for step in recipe.step if isinstance(step, RlSection)]
    tokens, temperature = (
        (learnt[-1].max_new_tokens, learnt[-1].temperature) if learnt else (ANSWER_TOKENS, ANSWER_TEMPERATURE)
    )
    section = recipe.handoff
    return section.max_new_tokens or tokens, section.temperature or temperature


def rollout_formats(recipe: Recipe) -> list[str]:
    """The formats of the weights that generate samples in any step."""
    found = [step.rollout_format for step in recipe.step if isinstance(step, RlSection | SampleSection)]
    return sorted(set(found))


def stream(recipe: Recipe, name: str) -> str:
    """What the random choices of a step are drawn by, beside the seed: its kind, and its number among those of it."""
    step = recipe.named(name)
    same = [one.name for one in recipe.step if one.kind == step.kind]
    number = same.index(name)
    return step.kind if not number else f"{step.kind} {number + 1}"
