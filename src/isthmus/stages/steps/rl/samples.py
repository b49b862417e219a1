"""Samples of a rollout, packed into rows for the learner. Shapes: B rows, T tokens per row, N targets, P prompts with G
samples each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.algos import Tokens, Totals
from isthmus.data.corpus import Document
from isthmus.engines import Routes
from isthmus.stages.steps.rl.rollout import Rollout
from isthmus.trainer.batch import Batch, pack


@dataclass(frozen=True)
class Samples:
    """Packed samples, or some rows of them; `count` in all. Values of a token stand where the token stands, [B, T]:
    log-probabilities of the engine, advantages, and under `known` log-probabilities of `old`, `reference`, `teacher`.
    `routes` [B, T, R], where the engine told them, are the experts of all layers for each token, -1 where unknown.
    """

    batch: Batch
    count: int
    engine: Tensor
    advantages: Tensor
    known: dict[str, Tensor] = field(default_factory=dict)
    routes: Tensor | None = None

    @classmethod
    def of(
        cls,
        rollout: Rollout,
        kept: Sequence[int],
        advantages: Tensor,
        row_length: int | None = None,
        world: int = 1,
        teacher: list[list[float]] | None = None,
    ) -> Samples:
        """The samples whose numbers are `kept`, in rows that `world` ranks can share; advantages [P, G] of all.

        `teacher` has log-probabilities of the tokens of each of them.
        """
        flat = [rollout.flat[index] for index in kept]
        batch = pack(
            [Document(rollout.prompts[p] + one.tokens, len(rollout.prompts[p])) for p, one in flat], row_length, world
        )
        places = TokenPlaces.of(batch, [len(rollout.prompts[p]) for p, _ in flat], [len(one.tokens) for _, one in flat])
        per_sample = advantages.reshape(-1)[torch.tensor(kept)]
        known = {} if teacher is None else {"teacher": places.spread(torch.tensor([v for one in teacher for v in one]))}
        return cls(
            batch,
            len(kept),
            places.spread(torch.tensor([value for _, one in flat for value in one.logprobs])),
            places.spread(per_sample.repeat_interleave(places.lengths)),
            known,
            routes=_routes(batch, [one.routes for _, one in flat]),
        )

    def with_known(self, name: str, values: Tensor) -> Samples:
        """With one more log-probability [B, T] of each token."""
        return replace(self, known={**self.known, name: values})

    def with_rows(self, rows: int) -> Samples:
        """Filled up to `rows` rows with rows of padding."""
        missing = rows - len(self.engine)
        return self._each(
            self.batch.with_rows(rows), lambda grid: F.pad(grid, (0, 0) * (grid.dim() - 1) + (0, missing))
        )

    def select(self, rows: Sequence[int]) -> Samples:
        """Some of the rows."""
        index = torch.tensor(rows, dtype=torch.long)
        return self._each(self.batch.select(rows), lambda grid: grid[index])

    def to(self, device: torch.device) -> Samples:
        return self._each(self.batch.to(device), lambda grid: grid.to(device))

    def tokens(self, logprobs: Tensor, weights: Tensor, totals: Totals) -> Tokens:
        """What a loss sees, with the trainer's log-probabilities now and the off-policy weights, [N]."""
        known = {name: self.at_targets(grid) for name, grid in self.known.items()}
        return Tokens(
            logprobs=logprobs,
            old=known.pop("old", logprobs.detach()),
            engine=self.at_targets(self.engine),
            advantages=self.at_targets(self.advantages),
            weights=weights,
            sample=self.sample,
            samples=self.count,
            totals=totals,
            **known,
        )

    @property
    def sample(self) -> Tensor:
        """The number of the sample of each target, [N]."""
        return self.at_targets(self.batch.document)

    def at_targets(self, grid: Tensor) -> Tensor:
        """[N] of [B, T]."""
        return grid[self.batch.target_mask]

    def _each(self, batch: Batch, change: Callable[[Tensor], Tensor]) -> Samples:
        known = {name: change(grid) for name, grid in self.known.items()}
        routes = None if self.routes is None else change(self.routes)
        return Samples(batch, self.count, change(self.engine), change(self.advantages), known, routes)


def _routes(batch: Batch, routes: list[Routes | None]) -> Tensor | None:
    """[B, T, R] of the experts of each sample's tokens; None if the engine told none."""
    told = [one for one in routes if one is not None]
    if not told:
        return None
    grid = torch.full((*batch.tokens.shape, told[0].shape[1]), -1, dtype=torch.int16)
    for number, one in enumerate(routes):
        if one is not None:
            own = (batch.document == number) & (batch.positions < one.shape[0])
            grid[own] = torch.from_numpy(one.array())
    return grid


@dataclass(frozen=True)
class TokenPlaces:
    """Where the tokens of completions, sample after sample, stand in a batch: `index` [N] for its N targets."""

    batch: Batch
    lengths: Tensor
    index: Tensor

    @classmethod
    def of(cls, batch: Batch, prompts: list[int], completions: list[int]) -> TokenPlaces:
        """`prompts` and `completions` are the lengths of each document's two parts."""
        sample = batch.document[batch.target_mask]
        offsets = torch.tensor([0, *completions]).cumsum(0)[:-1]
        index = offsets[sample] + batch.positions[batch.target_mask] - torch.tensor(prompts)[sample]
        return cls(batch, torch.tensor(completions), index)

    def spread(self, values: Tensor) -> Tensor:
        """[B, T] of values of all completions' tokens in turn; 0 where no target is."""
        grid = values.new_zeros(self.batch.tokens.shape)
        grid[self.batch.target_mask] = values[self.index]
        return grid
