"""Samples of a rollout, packed into rows for the learner. Shapes: B rows, T tokens per row, N targets, P prompts with G
samples each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.algos import Tokens, Totals
from isthmus.data.corpus import Document
from isthmus.engines import Routes
from isthmus.engines.kept import Kept, KeptSet
from isthmus.stages.steps.rl.rollout import Rollout
from isthmus.trainer.batch import Batch, pack


@dataclass(frozen=True)
class Samples:
    """Packed samples, or some rows of them; `count` in all. Values of a token stand where the token stands, [B, T]:
    log-probabilities of the engine, advantages, and under `known` log-probabilities of `old`, `reference`, `teacher`.
    `routes` [B, T, R], where the engine told them, are the experts of all layers for each token, -1 where unknown.
    `kept` has what each token was drawn among, where that was told: `draw` [B, T] numbers its sets.
    """

    batch: Batch
    count: int
    engine: Tensor
    advantages: Tensor
    known: dict[str, Tensor] = field(default_factory=dict)
    routes: Tensor | None = None
    draw: Tensor | None = None
    kept: KeptSets | None = None

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

        `teacher` has log-probabilities of the tokens of each of them. Samples of one prompt share it.
        """
        flat = [rollout.flat[index] for index in kept]
        documents = [Document(rollout.prompts[p] + one.tokens, len(rollout.prompts[p])) for p, one in flat]
        longest = max((len(document.tokens) for document in documents), default=0)
        most = None if row_length is None else max(row_length, longest)
        batch = pack(documents, row_length, world, _together([p for p, _ in flat], documents, most))
        places = TokenPlaces.of(batch, [len(rollout.prompts[p]) for p, _ in flat], [len(one.tokens) for _, one in flat])
        per_sample = advantages.reshape(-1)[torch.tensor(kept)]
        known = {} if teacher is None else {"teacher": places.spread(torch.tensor([v for one in teacher for v in one]))}
        return cls(
            batch,
            len(kept),
            places.spread(torch.tensor([value for _, one in flat for value in one.logprobs])),
            places.spread(per_sample.repeat_interleave(places.lengths)),
            known,
            _routes(batch, [one.routes for _, one in flat]),
            *_kept(places, [one.kept for _, one in flat]),
        )

    def with_known(self, name: str, values: Tensor) -> Samples:
        """With one more log-probability [B, T] of each token."""
        return replace(self, known={**self.known, name: values})

    def with_advantages(self, values: Tensor) -> Samples:
        """With one for each target, [N]."""
        grid = torch.zeros_like(self.advantages)
        grid[self.batch.target_mask] = values.to(grid)
        return replace(self, advantages=grid)

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

    @property
    def left_out(self) -> Tensor | None:
        """[N, V], true for tokens that a target was not drawn among; None where that was not told."""
        return None if self.kept is None or self.draw is None else self.kept.left_out(self.at_targets(self.draw))

    def at_targets(self, grid: Tensor) -> Tensor:
        """[N] of [B, T]."""
        return grid[self.batch.target_mask]

    def _each(self, batch: Batch, change: Callable[[Tensor], Tensor]) -> Samples:
        known = {name: change(grid) for name, grid in self.known.items()}
        routes, draw = (None if grid is None else change(grid) for grid in (self.routes, self.draw))
        kept = None if self.kept is None else self.kept.to(batch.tokens.device)
        return Samples(batch, self.count, change(self.engine), change(self.advantages), known, routes, draw, kept)


@dataclass(frozen=True)
class KeptSets:
    """Sets of tokens of a model that has `vocabulary`, [S + 1]: the first leaves nothing out. `ids` of set s begin at
    `first[s]` and are `count[s]`; they are what it `lists_left_out[s]`, or else what it kept."""

    ids: Tensor
    first: Tensor
    count: Tensor
    lists_left_out: Tensor
    vocabulary: int

    @classmethod
    def of(cls, told: Sequence[Kept]) -> KeptSets:
        sets = [KeptSet(np.zeros(0, dtype=np.int32), True), *(one for kept in told for one in kept.sets())]
        count = torch.tensor([len(one.ids) for one in sets])
        ids = torch.from_numpy(np.concatenate([one.ids for one in sets]))
        lists_left_out = torch.tensor([one.left_out for one in sets])
        return cls(ids, count.cumsum(0) - count, count, lists_left_out, told[0].vocabulary)

    def to(self, device: torch.device) -> KeptSets:
        ids, first, count = self.ids.to(device), self.first.to(device), self.count.to(device)
        return KeptSets(ids, first, count, self.lists_left_out.to(device), self.vocabulary)

    def left_out(self, draw: Tensor) -> Tensor:
        """[N, V] of the numbers [N] of sets."""
        count = self.count[draw]
        row = torch.arange(len(draw), device=draw.device).repeat_interleave(count)
        within = torch.arange(len(row), device=draw.device) - (count.cumsum(0) - count)[row]
        listed = torch.zeros(len(draw), self.vocabulary, dtype=torch.bool, device=draw.device)
        listed[row, self.ids[self.first[draw][row] + within].long()] = True
        return listed == self.lists_left_out[draw].unsqueeze(1)


def _together(prompts: Sequence[int], documents: Sequence[Document], most: int | None) -> list[list[int]]:
    """The numbers of samples with one prompt, in parts of up to `most` tokens with the prompt counted once."""
    parts: list[list[int]] = []
    open_ones: dict[int, tuple[list[int], int]] = {}
    for number, (prompt, document) in enumerate(zip(prompts, documents, strict=True)):
        own = len(document.tokens) - document.prompt_length
        part, tokens = open_ones.get(prompt, ([], 0))
        if not part or (most is not None and tokens + own > most):
            part, tokens = [], document.prompt_length
            parts.append(part)
        part.append(number)
        open_ones[prompt] = part, tokens + own
    return parts


def _kept(places: TokenPlaces, kept: list[Kept | None]) -> tuple[Tensor, KeptSets] | tuple[None, None]:
    """The number [B, T] of each token's set, and the sets; nothing if the engine told none."""
    told = [one for one in kept if one is not None]
    if not told:
        return None, None
    assert len(told) == len(kept), "an engine tells what all of its samples were drawn among, or none"
    return places.spread(torch.arange(1, len(places.index) + 1)), KeptSets.of(told)


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
