"""What a recipe asks for, in the terms of a forecast. This is the one place where a forecast reads a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from isthmus.recipe.architecture import ModelSection
from isthmus.recipe.schema import Recipe
from isthmus.recipe.steps import PretrainSection, RlSection, SftSection, Step

Kind = Literal["pretrain", "sft", "rl", "sample"]
EXAMPLE_TOKENS = 512.0
"""Tokens of a worked example, where nothing was measured: half of a short chain of thought. Assumed."""
PROMPT_TOKENS = 256.0
"""Tokens of a prompt, where nothing was measured. Assumed."""
MEAN_SHARE = 0.35
"""Mean completion over the longest allowed, where nothing was measured. Assumed."""


@dataclass(frozen=True)
class StepWork:
    """One step: `updates` of `rows` rows of `row_length` tokens each.

    Of `rl` and `sample`, rows are samples, of `prompt` tokens and a completion of `mean` tokens that never exceeds
    `longest`; `overlapped`: samples are generated while the learner works. `kind` "sample" does not learn.
    """

    name: str
    kind: Kind
    model: ModelSection
    updates: int
    rows: float
    row_length: float
    prompt: float = 0.0
    mean: float = 0.0
    longest: float = 0.0
    overlapped: bool = False
    format: str = "bf16"

    @property
    def learns(self) -> bool:
        return self.kind != "sample"

    @property
    def generates(self) -> bool:
        return self.kind in ("rl", "sample")

    @property
    def tokens(self) -> float:
        """Of all updates."""
        return self.updates * self.rows * self.row_length


@dataclass(frozen=True)
class PoolWork:
    """A pool of a recipe: `count` chips of a kind."""

    name: str
    chip: str
    count: int
    rehearsed: bool


@dataclass(frozen=True)
class Work:
    """All of a recipe: its steps, its pools, the orders of preference, and how training is laid out."""

    name: str
    steps: list[StepWork]
    pools: dict[str, PoolWork]
    train: list[str]
    rollout: list[str]
    serve: list[str]
    serve_format: str
    expert: int
    replicate: int
    checkpointing: bool
    microbatch: int | None


def work_of(recipe: Recipe) -> Work:
    """The steps of a recipe in order, and what they may run on."""
    return Work(
        name=recipe.name,
        steps=_steps(recipe),
        pools={
            name: PoolWork(name, section.chip, section.count, section.rehearsed)
            for name, section in recipe.pools.items()
        },
        train=list(recipe.place.train),
        rollout=list(recipe.place.rollout),
        serve=list(recipe.place.serve),
        serve_format=recipe.handoff.format,
        expert=recipe.train.expert,
        replicate=recipe.train.replicate,
        checkpointing=recipe.train.activation_checkpointing,
        microbatch=recipe.train.rows_per_microbatch,
    )


def _steps(recipe: Recipe) -> list[StepWork]:
    return [_step(step, recipe.architecture_of(step)) for step in recipe.step]


def _step(step: Step, model: ModelSection) -> StepWork:
    if isinstance(step, PretrainSection):
        return StepWork(step.name, "pretrain", model, step.steps, step.rows_per_step, float(step.row_length))
    if isinstance(step, SftSection):
        example = min(EXAMPLE_TOKENS, float(model.max_position_embeddings))
        return StepWork(step.name, "sft", model, step.steps, step.batch_size, example)
    prompt, mean = min(PROMPT_TOKENS, model.max_position_embeddings / 4.0), MEAN_SHARE * step.max_new_tokens
    learns = isinstance(step, RlSection)
    return StepWork(
        name=step.name,
        kind=step.kind,
        model=model,
        updates=step.steps if isinstance(step, RlSection) else 1,
        rows=float((step.prompts_per_step if isinstance(step, RlSection) else step.prompts) * step.samples_per_prompt),
        row_length=prompt + mean,
        prompt=prompt,
        mean=mean,
        longest=float(step.max_new_tokens),
        overlapped=learns and bool(step.staleness),
        format=step.rollout_format,
    )
