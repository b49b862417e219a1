"""The learner: policy updates from a rollout, with the gap to the engine measured and corrected for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from isthmus.algos import OfTokens, Scores, Totals, algorithm_config, get_algorithm
from isthmus.algos.parts.policy import aggregate, reference_kl, token_returns
from isthmus.launch.beats import beat
from isthmus.model.model import Model
from isthmus.recipe.architecture import MixtureSection
from isthmus.rewards import Scores as Earned
from isthmus.slopes import least_squares_slope
from isthmus.stages.steps.drilled import Drill
from isthmus.stages.steps.rl.beside import Beside
from isthmus.stages.steps.rl.rollout import Rollout
from isthmus.stages.steps.rl.samples import Samples
from isthmus.stages.steps.rl.state import State
from isthmus.supervise.guard import WATCHED_MODULES, Computed, Guard, shared_digest, watched_figures
from isthmus.supervise.signals.no_beat import ROLLOUT, UNLIMITED, UPDATE
from isthmus.trainer.batch import ROW_LENGTH
from isthmus.trainer.correction import importance_weights, mismatch, off_policy_samples
from isthmus.trainer.parallel import reduce_gradients
from isthmus.trainer.step import row_parts, target_logprobs

SUMMED = ("loss", "clipped", "entropy", "mismatch_abs", "mismatch_k3", "importance_mean", "importance_clipped")
"""Measures of an update that are sums over its tokens; all but the loss are shown per token."""


NO_SCORES = Earned({}, [])
Scored = list[list[float]]
"""A remote teacher's log-probabilities of the tokens of samples."""


@dataclass(frozen=True)
class OneUpdate:
    """What came out of one optimiser step; `made` unless it was left out."""

    measures: dict[str, float]
    watched: dict[str, Any]
    learning_rate: float
    made: bool


@dataclass(frozen=True)
class Learnt:
    """Of a rollout: `measures` for people, averaged over the optimiser steps that were made, and all of these, for the
    gate of a revert."""

    measures: dict[str, float | None]
    updates: Sequence[OneUpdate] = ()

    def recorded(self) -> dict[str, Any]:
        """For an event: nothing if nothing was learnt from the rollout."""
        if not self.updates:
            return {}
        left_out = [index for index, one in enumerate(self.updates) if not one.made]
        kept = {"learning_rate": self.updates[-1].learning_rate, "watched": together(self.updates)}
        kept |= {"updates": len(self.updates) - len(left_out)}
        return kept | ({"updates_left_out": left_out} if left_out else {})


def together(updates: Sequence[OneUpdate]) -> dict[str, Any]:
    """Watched figures of all optimiser steps of a rollout as of one: digests and losses added, norms as of one vector.

    One alone is as it is. A figure is None if one of its parts is.
    """
    parts = [one.watched for one in updates]
    if len(parts) == 1:
        return parts[0]

    def length(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return math.hypot(*known) if len(known) == len(values) else None

    losses = [part["loss"] for part in parts]
    return {
        "batch": f"{sum(int(part['batch'], 16) for part in parts) % (1 << 62):016x}",
        "loss": None if None in losses else math.fsum(losses),
        "norm": length([part["norm"] for part in parts]),
        "modules": {name: length([part["modules"][name] for part in parts]) for name in parts[0]["modules"]},
    }


def _rounded(value: float) -> float | None:
    """As an event has it: None if it is no number."""
    return round(value, 7) if math.isfinite(value) else None


@dataclass(frozen=True)
class Measures:
    """Of a part of an update: `sums` over its tokens, and the `largest` mismatch."""

    sums: Tensor
    largest: Tensor


class Learner:
    """Learns by the recipe's algorithm: advantages of a rollout's rewards, then updates of the state."""

    def __init__(self, state: State, beside: Beside, guard: Guard | None = None, drill: Drill | None = None):
        self.state, self.section, self.beside, self.guard = state, state.work.section, beside, guard
        self.drill = drill
        self.algorithm, self.options = get_algorithm(self.section.algorithm), algorithm_config(self.section)

    def under_way(self) -> AbstractContextManager[None]:
        """In a drill faults strike within this."""
        return nullcontext() if self.drill is None else self.drill.under_way()

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Tensor:
        """rewards [P, G] of P prompts with G samples each, NaN for what is left out; returns [P, G]."""
        lengths = torch.tensor([[len(one.tokens) for one in group] for group in rollout.completions])
        return self.algorithm.advantages(Scores(rewards, lengths), self.options)

    def update(self, rollout: Rollout, rewards: Tensor, advantages: Tensor, scored: Scored | None = None) -> Learnt:
        """One or more optimiser steps.

        Samples that teach nothing are not computed: those that are left out, and those whose advantage is zero unless
        the loss has a term for them all the same. `scored` is what `scores` gives, if it was asked already.
        """
        kept, rolled = self.teaching(rewards, advantages)
        if not kept:
            why = "every group has equal rewards" if rolled else "no sample has a reward"
            self.state.work.event("skipped-update", step=self.state.step + 1, why=why)
            if self.drill is not None:
                self.drill.update(self.state.step + 1)
            return Learnt({})
        step, bare = self.state.step, replace(rollout, problems=[], scores=NO_SCORES)
        scored = self.scores(rollout, rewards, advantages) if scored is None else scored
        self.state.crew.order("update", step, bare, advantages, kept, rolled, scored)
        updates = self._updates(step, rollout, advantages, kept, rolled, scored)
        measures = [one.measures for one in updates if one.made]
        if not measures:
            return Learnt({}, updates)
        averaged = {key: _rounded(sum(m[key] for m in measures) / len(measures)) for key in measures[0]}
        if math.isfinite(measures[0]["mismatch_abs"]):
            self.state.mismatches.append(measures[0]["mismatch_abs"])
        slope = least_squares_slope(self.state.mismatches)
        return Learnt(averaged | {"mismatch_slope": None if slope is None else _rounded(slope)}, updates)

    def teaching(self, rewards: Tensor, advantages: Tensor) -> tuple[list[int], list[int]]:
        """(numbers of the samples that are learnt from, of all that were not left out)."""
        judged = ~rewards.isnan()
        rolled = judged.flatten().nonzero().flatten().tolist()
        if self._reward_kl:
            return (judged & (judged.sum(1, keepdim=True) > 1)).flatten().nonzero().flatten().tolist(), rolled
        flat = advantages.reshape(-1).tolist()
        return rolled if self._teaches_all else [index for index in rolled if flat[index] != 0.0], rolled

    def scores(self, rollout: Rollout, rewards: Tensor, advantages: Tensor) -> Scored | None:
        """What a remote teacher gives the tokens of each sample that is learnt from; None without one."""
        kept, _ = self.teaching(rewards, advantages)
        return self.beside.remote.logprobs(rollout, kept) if self.beside.remote is not None and kept else None

    def again(self, rollout: Rollout, scored: Scored | None, left_out: Collection[int]) -> Learnt:
        """The optimiser steps of the next update once more, some of them left out; all ranks call it."""
        rewards = rollout.totals
        advantages = self.advantages(rollout, rewards)
        kept, rolled = self.teaching(rewards, advantages)
        found = self._updates(self.state.step, rollout, advantages, kept, rolled, scored, left_out) if kept else []
        return Learnt({}, found)

    def orders(self) -> dict[str, Callable[..., Any]]:
        """What other ranks than the first are told to do."""
        return {"update": self._updates}

    def _updates(
        self,
        step: int,
        rollout: Rollout,
        advantages: Tensor,
        kept: list[int],
        rolled: list[int],
        scored: Scored | None,
        left_out: Collection[int] = (),
    ) -> list[OneUpdate]:
        """The optimiser steps of a rollout, which all ranks make together.

        `kept` are the numbers of the samples that are learnt from, `rolled` of all that were not left out; `scored` is
        what a remote teacher gives the tokens of each that is kept. Those of the numbers `left_out` are not made.
        """
        self.state.step = step
        if self.drill is None:
            return self._made(rollout, advantages, kept, rolled, scored, left_out)
        self.drill.update(step + 1)
        with self.drill.on_chip():
            return self._made(rollout, advantages, kept, rolled, scored, left_out)

    def _made(
        self,
        rollout: Rollout,
        advantages: Tensor,
        kept: list[int],
        rolled: list[int],
        scored: Scored | None,
        left_out: Collection[int],
    ) -> list[OneUpdate]:
        step, updates = self.state.step, self.section.updates_per_rollout
        chosen = [(kept[start::updates], rolled[start::updates]) for start in range(min(updates, len(kept)))]
        totals = [self._totals(rollout, *numbers) for numbers in chosen]
        taught = [None if scored is None else scored[start::updates] for start in range(len(chosen))]
        pairs = zip(chosen, taught, strict=True)
        parts = [self._own(rollout, numbers, advantages, teacher) for (numbers, _), teacher in pairs]
        parts = [self._with_known(part, needs_old=updates > 1 or bool(self._reward_kl)) for part in parts]
        parts = self._with_token_advantages(parts) if self._reward_kl else parts
        pairs = enumerate(zip(parts, totals, strict=True))
        found = [
            self._one_update(part, total, step + index / updates, index in left_out) for index, (part, total) in pairs
        ]
        beat(ROLLOUT if self.state.crew.ranks.is_first else UNLIMITED, step)
        return found

    def _own(self, rollout: Rollout, numbers: list[int], advantages: Tensor, teacher: Scored | None) -> Samples:
        """This rank's rows of some samples, and as many empty ones as make whole microbatches."""
        ranks = self.state.crew.ranks
        row_length = ROW_LENGTH if self._rows_at_once else None
        whole = Samples.of(rollout, numbers, advantages, row_length, ranks.world, teacher)
        own = whole.select(range(ranks.rank, len(whole.engine), ranks.world))
        return own.with_rows(self._parts(own)[-1].stop).to(ranks.device)

    def _parts(self, samples: Samples) -> list[range]:
        return row_parts(len(samples.engine), self._rows_at_once, self.state.crew.ranks)

    @property
    def _rows_at_once(self) -> int | None:
        return self.state.work.recipe.train.rows_per_microbatch

    @property
    def _teaches_all(self) -> bool:
        return bool(self.section.loss.kl_weight) or self.options.learns_from == "teacher"

    def _totals(self, rollout: Rollout, kept: list[int], rolled: list[int]) -> Totals:
        lengths = [len(one.tokens) for _, one in rollout.flat]
        tokens, rolled_tokens = (sum(lengths[index] for index in numbers) for numbers in (kept, rolled))
        return Totals(tokens, len(kept), rolled_tokens, len(rolled), self.section.max_new_tokens)

    @torch.no_grad()
    def _with_known(self, part: Samples, needs_old: bool) -> Samples:
        """With what the trainer thinks before the update, where there are several, and what other models think."""
        old = self.state.model if needs_old else None
        models = {"old": old, "reference": self.beside.reference, "teacher": self.beside.teacher}
        for name, model in models.items():
            if model is not None:
                rows = [model.compute(self._grid, part.select(rows)) for rows in self._parts(part)]
                part = part.with_known(name, torch.cat(rows))
        return part

    def _with_token_advantages(self, parts: list[Samples]) -> list[Samples]:
        """With an advantage for each token of the whole rollout, of its sample's reward less what its KL takes off."""
        returns = [
            token_returns(
                part.at_targets(part.advantages),
                part.at_targets(part.known["old"] - part.known["reference"]),
                part.sample,
                self._reward_kl,
            )
            for part in parts
        ]
        found = cast(OfTokens, self.algorithm).token_advantages(returns, self._total)
        return [part.with_advantages(values) for part, values in zip(parts, found, strict=True)]

    def _total(self, sums: Tensor) -> Tensor:
        ranks = self.state.crew.ranks
        return ranks.total(sums.to(ranks.device)).cpu()

    def _grid(self, model: Model, part: Samples) -> Tensor:
        """[B, T] of log-probabilities, 0 where no target is."""
        grid = torch.zeros_like(part.engine)
        grid[part.batch.target_mask] = self._logprobs(model, part)[0]
        return grid

    def _logprobs(self, model: Model, part: Samples) -> tuple[Tensor, Tensor]:
        """(log-probability, entropy) of each target, among the tokens that the engine kept where the recipe wants that.
        The model that learns routes as the engine did, where the recipe wants it; a reference routes by itself."""
        routes = part.routes if model is self.state.model else None
        if routes is not None:
            assert isinstance(model.architecture, MixtureSection)
            routes = routes.long().unflatten(-1, (-1, model.architecture.num_experts_per_tok))
        return target_logprobs(model, part.batch, self.section.temperature, routes, part.left_out)

    def _one_update(self, samples: Samples, totals: Totals, progress: float, left_out: bool) -> OneUpdate:
        """`progress` counts finished steps, with a fraction for an update within one."""
        optimizer, ranks = self.state.optimizer, self.state.crew.ranks

        def compute() -> Computed[dict[str, float]]:
            return self.compute(samples, totals)

        if self.guard is not None:
            found, made, digest = self.guard.update(math.floor(progress) + 1, samples.batch, compute)
        else:
            found, made, digest = compute(), not left_out, shared_digest(samples.batch, ranks)
        watched = watched_figures(found, optimizer.module_norms(WATCHED_MODULES), digest)
        if made:
            optimizer.apply(progress, found.norm)
        optimizer.forget()
        rate = self.section.optimizer.learning_rate * optimizer.schedule(progress)
        return OneUpdate(found.rest, watched, rate, made)

    def compute(self, samples: Samples, totals: Totals) -> Computed[dict[str, float]]:
        """The measures of an update, with its gradients measured and not applied."""
        model, optimizer, ranks = self.state.model, self.state.optimizer, self.state.crew.ranks
        optimizer.forget()
        optimizer.zero_grad()
        parts, found = self._parts(samples), list[Measures]()
        for index, rows in enumerate(parts):
            beat(UPDATE, self.state.step + 1)
            reduce_gradients(model, now=index == len(parts) - 1)
            value, measures = model.compute(self._loss, samples.select(rows) if len(parts) > 1 else samples, totals)
            value.backward()
            found.append(measures)
        sums = ranks.total(torch.stack([one.sums for one in found]).sum(0).to(ranks.device)).tolist()
        largest = torch.stack([one.largest for one in found]).max().to(ranks.device)
        if ranks.world > 1:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        norm = optimizer.measure()
        names = [*SUMMED, *(name for name, is_there in self._optional.items() if is_there)]
        shown = {
            name: value / (1 if name == "loss" else totals.tokens) for name, value in zip(names, sums, strict=True)
        }
        measures = {"grad_norm": norm, "mismatch_max": largest.item(), "trained_tokens": float(totals.tokens)}
        return Computed(shown["loss"], norm, shown | measures)

    @property
    def _reward_kl(self) -> float:
        return self.options.reward_kl()

    @property
    def _optional(self) -> dict[str, bool]:
        section = self.section.loss
        return {
            "off_policy_masked": section.off_policy_mask is not None,
            "reference_kl": bool(section.kl_weight),
            "reward_kl": bool(self._reward_kl),
        }

    def _loss(self, model: Model, part: Samples, totals: Totals) -> tuple[Tensor, Measures]:
        """(what is differentiated of a part, its measures)."""
        section = self.section.loss
        logprobs, entropy = self._logprobs(model, part)
        engine = part.at_targets(part.engine)
        before = part.at_targets(part.known["old"]) if "old" in part.known else logprobs.detach()
        correction = importance_weights(before, engine, section)
        tokens = part.tokens(logprobs, correction.weights, totals)
        extra = list[float]()
        if section.off_policy_mask is not None:
            masked = off_policy_samples(
                logprobs.detach(), engine, tokens.advantages, tokens.sample, section.off_policy_mask
            )
            tokens.weights.masked_fill_(masked, 0.0)
            extra.append(masked.sum().item())
        loss = self.algorithm.loss(tokens, self.options)
        value = loss.value
        if section.kl_weight:
            kl = reference_kl(tokens, section.kl_times_ratio)
            value = value + section.kl_weight * aggregate(kl, tokens, self.options.aggregated())
            extra.append(kl.detach().sum().item())
        if self._reward_kl:
            assert tokens.reference is not None
            extra.append((tokens.old - tokens.reference).sum().item())
        gap = mismatch(before, engine)
        sums = [value.item(), loss.clipped, entropy.sum().item(), gap.total_abs, gap.total_k3]
        sums += [correction.total, correction.clipped, *extra]
        return value, Measures(torch.tensor(sums, dtype=torch.float64), torch.tensor(gap.max_abs, dtype=torch.float64))
