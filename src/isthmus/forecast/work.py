"""What a recipe asks for, in the terms of a forecast. This is the one place where a forecast reads a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from isthmus.recipe.architecture import ModelSection
from isthmus.recipe.schema import Recipe

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
    drill: bool = False


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
    found: list[StepWork] = []
    pretrain, sft, rl = recipe.pretrain, recipe.sft, recipe.rl
    if pretrain is not None:
        found.append(
            StepWork(
                "pretrain", "pretrain", recipe.model, pretrain.steps, pretrain.rows_per_step, float(pretrain.row_length)
            )
        )
    example = min(EXAMPLE_TOKENS, float(recipe.model.max_position_embeddings))
    found.append(StepWork("sft", "sft", recipe.model, sft.steps, sft.batch_size, example))
    prompt = min(PROMPT_TOKENS, recipe.model.max_position_embeddings / 4.0)
    mean = MEAN_SHARE * rl.max_new_tokens
    found.append(
        StepWork(
            name="rl",
            kind="rl",
            model=recipe.model,
            updates=rl.steps,
            rows=float(rl.prompts_per_step * rl.samples_per_prompt),
            row_length=prompt + mean,
            prompt=prompt,
            mean=mean,
            longest=float(rl.max_new_tokens),
            overlapped=bool(rl.staleness),
            format=rl.rollout_format,
        )
    )
    return found
