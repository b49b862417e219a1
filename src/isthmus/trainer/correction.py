"""Off-policy correction: the trainer's numerics are never those of the engine that generated.

With d = log p_trainer - log p_engine of a sampled token, the truncated importance weight is min(exp(d), cap)
(fengyao.notion.site/off-policy-rl, 2025), IcePop's is exp(d) within bounds and 0 beyond them
(ringtech.notion.site/icepop, 2025), and the k3 estimate of KL(engine || trainer) is exp(d) - 1 - d
(joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isthmus.recipe.steps import LossSection


@dataclass(frozen=True)
class Mismatch:
    """How far the trainer is from the engine on the same tokens, in nats: summed over `tokens`, and the largest."""

    tokens: int
    total_abs: float
    max_abs: float
    total_k3: float

    @property
    def mean_abs(self) -> float:
        return self.total_abs / self.tokens

    @property
    def k3(self) -> float:
        return self.total_k3 / self.tokens


@dataclass(frozen=True)
class Correction:
    """`weights` [N], detached; `total` of the ratios before the correction, and tokens that it cut off."""

    weights: Tensor
    total: float
    clipped: float


@torch.no_grad()
def mismatch(trainer: Tensor, engine: Tensor) -> Mismatch:
    """Of log-probabilities [N] of the same tokens."""
    difference = (trainer - engine).double()
    k3 = torch.expm1(difference) - difference
    largest = difference.abs().max().item() if len(difference) else 0.0
    return Mismatch(len(difference), difference.abs().sum().item(), largest, k3.sum().item())


@torch.no_grad()
def importance_weights(trainer: Tensor, engine: Tensor, section: LossSection) -> Correction:
    """What weighs the losses of tokens, of their log-probabilities [N] in the trainer before the update and in the
    engine."""
    ratio = (trainer - engine).exp()
    cap = section.importance_cap
    if section.importance == "truncate":
        weights, cut = ratio.clamp(max=cap), ratio > cap
    elif section.importance == "mask":
        assert section.importance_floor is not None
        cut = (ratio < section.importance_floor) | (ratio > cap)
        weights = ratio.masked_fill(cut, 0.0)
    else:
        weights, cut = torch.ones_like(ratio), torch.zeros_like(ratio, dtype=torch.bool)
    return Correction(weights, ratio.sum().item(), cut.sum().item())


@torch.no_grad()
def off_policy_samples(trainer: Tensor, engine: Tensor, advantages: Tensor, sample: Tensor, limit: float) -> Tensor:
    """[N], true for the tokens of samples that DeepSeek-V3.2 leaves out (arXiv 2512.02556, off-policy sequence
    masking): the advantage is negative, and the mean of log(engine / trainer now) is above the limit.
    """
    count = int(sample.max()) + 1 if len(sample) else 0
    gap = trainer.new_zeros(count).index_add(0, sample, engine - trainer)
    length = trainer.new_zeros(count).index_add(0, sample, torch.ones_like(trainer))
    return ((gap / length.clamp(min=1)) > limit)[sample] & (advantages < 0)
