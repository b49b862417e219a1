"""The learner: policy updates from a rollout, with the gap to the engine measured and corrected for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.algos import algorithm_config, get_algorithm
from isthmus.data.corpus import Document
from isthmus.slopes import least_squares_slope
from isthmus.stages.steps.rl.rollout import Rollout
from isthmus.stages.steps.rl.state import State
from isthmus.trainer.batch import Batch, pack
from isthmus.trainer.correction import mismatch, truncated_importance
from isthmus.trainer.step import target_logprobs


@dataclass
class Minibatch:
    """Packed samples; [N] over the target tokens: the engine's log-probabilities, advantages, sample numbers."""

    batch: Batch
    engine: Tensor
    advantages: Tensor
    sample: Tensor

    @classmethod
    def of(cls, rollout: Rollout, kept: list[int], advantages: Tensor, device: torch.device) -> Minibatch:
        """The samples of a rollout whose numbers are `kept`, with advantages [P, G] of all."""
        flat = [rollout.flat[index] for index in kept]
        documents = [Document(rollout.prompts[p] + one.tokens, len(rollout.prompts[p])) for p, one in flat]
        batch = pack(documents)
        sample = batch.document[batch.target_mask]
        offsets = torch.tensor([0, *(len(one.tokens) for _, one in flat)]).cumsum(0)[:-1]
        starts = torch.tensor([document.prompt_length for document in documents])
        place = offsets[sample] + batch.positions[batch.target_mask] - starts[sample]
        engine = torch.tensor([value for _, one in flat for value in one.logprobs])[place]
        per_sample = advantages.reshape(-1)[torch.tensor(kept)]
        return cls(batch.to(device), engine.to(device), per_sample[sample].to(device), sample.to(device))


class Learner:
    """Learns by the recipe's algorithm: advantages of a rollout's rewards, then updates of the state."""

    def __init__(self, state: State):
        self.state, self.section = state, state.work.section
        self.algorithm, self.options = get_algorithm(self.section.algorithm), algorithm_config(self.section)

    def advantages(self, rewards: Tensor) -> Tensor:
        """rewards [P, G] of P prompts with G samples each; returns [P, G]."""
        return self.algorithm.advantages(rewards, self.options)

    def update(self, rollout: Rollout, advantages: Tensor) -> dict[str, float | None]:
        """One or more optimiser steps; their measures, averaged.

        Samples whose advantage is zero teach nothing and are left out of the batch.
        """
        kept = [index for index, value in enumerate(advantages.reshape(-1).tolist()) if value != 0.0]
        if not kept:
            why = "every group has equal rewards"
            self.state.work.event("skipped-update", step=self.state.step + 1, why=why)
            return {}
        updates = self.section.updates_per_rollout
        chosen = [kept[start::updates] for start in range(min(updates, len(kept)))]
        parts = [Minibatch.of(rollout, numbers, advantages, self.state.device) for numbers in chosen]
        olds = [self._frozen_logprobs(part) for part in parts] if updates > 1 else [None]
        pairs = enumerate(zip(parts, olds, strict=True))
        measures = [self._one_update(part, old, index / updates) for index, (part, old) in pairs]
        self.state.mismatches.append(measures[0]["mismatch_abs"])
        averaged = {key: round(sum(m[key] for m in measures) / len(measures), 7) for key in measures[0]}
        slope = least_squares_slope(self.state.mismatches)
        return averaged | {"mismatch_slope": None if slope is None else round(slope, 7)}

    @torch.no_grad()
    def _frozen_logprobs(self, part: Minibatch) -> Tensor:
        return target_logprobs(self.state.model, part.batch, self.section.temperature)[0]

    def _one_update(self, part: Minibatch, old: Tensor | None, progress: float) -> dict[str, float]:
        optimizer = self.state.optimizer
        optimizer.zero_grad()
        logprobs, entropy = target_logprobs(self.state.model, part.batch, self.section.temperature)
        before = logprobs.detach() if old is None else old
        correction = truncated_importance(before, part.engine, self.section.importance_cap)
        loss = self.algorithm.loss(logprobs, before, part.advantages, correction.weights, part.sample, self.options)
        loss.value.backward()
        gap = mismatch(before, part.engine)
        return {
            "loss": loss.value.item(),
            "clipped": loss.clipped,
            "grad_norm": optimizer.step(self.state.step + progress),
            "entropy": entropy.mean().item(),
            "mismatch_abs": gap.mean_abs,
            "mismatch_max": gap.max_abs,
            "mismatch_k3": gap.k3,
            "importance_mean": correction.mean,
            "importance_clipped": correction.clipped,
            "trained_tokens": float(len(logprobs)),
        }
