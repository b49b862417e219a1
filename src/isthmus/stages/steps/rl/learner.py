"""The learner: policy updates from a rollout, with the gap to the engine measured and corrected for."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.algos import Scores, Totals, algorithm_config, get_algorithm
from isthmus.algos.parts.policy import aggregate, reference_kl
from isthmus.model.model import Model
from isthmus.recipe.architecture import MixtureSection
from isthmus.slopes import least_squares_slope
from isthmus.stages.steps.rl.rollout import Rollout
from isthmus.stages.steps.rl.samples import Samples
from isthmus.stages.steps.rl.state import State
from isthmus.trainer.correction import importance_weights, mismatch, off_policy_samples
from isthmus.trainer.step import target_logprobs

SUMMED = ("loss", "clipped", "entropy", "mismatch_abs", "mismatch_k3", "importance_mean", "importance_clipped")
"""Measures of an update that are sums over its tokens; all but the loss are shown per token."""


class Learner:
    """Learns by the recipe's algorithm: advantages of a rollout's rewards, then updates of the state.

    `reference` has the weights that a KL is measured to, where the recipe asks for one.
    """

    def __init__(self, state: State, reference: Model | None = None):
        self.state, self.section, self.reference = state, state.work.section, reference
        self.algorithm, self.options = get_algorithm(self.section.algorithm), algorithm_config(self.section)

    def advantages(self, rollout: Rollout, rewards: Tensor) -> Tensor:
        """rewards [P, G] of P prompts with G samples each, NaN for what is left out; returns [P, G]."""
        lengths = torch.tensor([[len(one.tokens) for one in group] for group in rollout.completions])
        return self.algorithm.advantages(Scores(rewards, lengths), self.options)

    def update(self, rollout: Rollout, rewards: Tensor, advantages: Tensor) -> dict[str, float | None]:
        """One or more optimiser steps; their measures, averaged.

        Samples that teach nothing are not computed: those that are left out, and those whose advantage is zero unless
        the loss has a term for them all the same.
        """
        rolled = (~rewards.isnan()).flatten().nonzero().flatten().tolist()
        flat = advantages.reshape(-1).tolist()
        kept = rolled if self._teaches_all else [index for index in rolled if flat[index] != 0.0]
        if not kept:
            why = "every group has equal rewards" if rolled else "no sample has a reward"
            self.state.work.event("skipped-update", step=self.state.step + 1, why=why)
            return {}
        updates = self.section.updates_per_rollout
        chosen = [(kept[start::updates], rolled[start::updates]) for start in range(min(updates, len(kept)))]
        totals = [self._totals(rollout, *numbers) for numbers in chosen]
        parts = [Samples.of(rollout, numbers, advantages).to(self.state.device) for numbers, _ in chosen]
        parts = [self._with_known(part, needs_old=updates > 1) for part in parts]
        pairs = enumerate(zip(parts, totals, strict=True))
        measures = [self._one_update(part, total, index / updates) for index, (part, total) in pairs]
        self.state.mismatches.append(measures[0]["mismatch_abs"])
        averaged = {key: round(sum(m[key] for m in measures) / len(measures), 7) for key in measures[0]}
        slope = least_squares_slope(self.state.mismatches)
        return averaged | {"mismatch_slope": None if slope is None else round(slope, 7)}

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
        for name, model in (("old", self.state.model if needs_old else None), ("reference", self.reference)):
            if model is not None:
                logprobs, _ = self._logprobs(model, part)
                grid = torch.zeros_like(part.engine)
                grid[part.batch.target_mask] = logprobs
                part = part.with_known(name, grid)
        return part

    def _logprobs(self, model: Model, part: Samples) -> tuple[Tensor, Tensor]:
        """(log-probability, entropy) of each target. The model that learns routes as the engine did, where the recipe
        wants it; a reference routes by itself."""
        routes = part.routes if model is self.state.model else None
        if routes is not None:
            assert isinstance(model.architecture, MixtureSection)
            routes = routes.long().unflatten(-1, (-1, model.architecture.num_experts_per_tok))
        return target_logprobs(model, part.batch, self.section.temperature, routes)

    def _one_update(self, part: Samples, totals: Totals, progress: float) -> dict[str, float]:
        optimizer = self.state.optimizer
        optimizer.zero_grad()
        value, found, largest = self._loss(part, totals)
        value.backward()
        norm = optimizer.step(self.state.step + progress)
        shown = {key: found[key] / (1 if key == "loss" else totals.tokens) for key in found}
        return shown | {"grad_norm": norm, "mismatch_max": largest, "trained_tokens": float(totals.tokens)}

    def _loss(self, part: Samples, totals: Totals) -> tuple[Tensor, dict[str, float], float]:
        """(what is differentiated, its measures summed over the tokens of the part, the largest mismatch)."""
        section = self.section.loss
        logprobs, entropy = self._logprobs(self.state.model, part)
        engine = part.at_targets(part.engine)
        before = part.at_targets(part.known["old"]) if "old" in part.known else logprobs.detach()
        correction = importance_weights(before, engine, section)
        tokens = part.tokens(logprobs, correction.weights, totals)
        extra = dict[str, float]()
        if section.off_policy_mask is not None:
            masked = off_policy_samples(
                logprobs.detach(), engine, tokens.advantages, tokens.sample, section.off_policy_mask
            )
            tokens.weights.masked_fill_(masked, 0.0)
            extra["off_policy_masked"] = masked.sum().item()
        loss = self.algorithm.loss(tokens, self.options)
        value = loss.value
        if section.kl_weight:
            kl = reference_kl(tokens, section.kl_times_ratio)
            value = value + section.kl_weight * aggregate(kl, tokens, self.options.aggregated())
            extra["reference_kl"] = kl.detach().sum().item()
        gap = mismatch(before, engine)
        count = len(logprobs)
        sums = (value.item(), loss.clipped, entropy.sum().item(), gap.mean_abs * count, gap.k3 * count)
        sums += (correction.total, correction.clipped)
        return value, dict(zip(SUMMED, sums, strict=True)) | extra, gap.max_abs
