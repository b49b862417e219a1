"""Advantages within groups of which some samples may be left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def by_group(formula: Callable[[Tensor], Tensor], rewards: Tensor) -> Tensor:
    """`formula` makes [P, G] of rewards [P, G], group by group; here samples with the reward NaN are left out.

    A group is then computed of the samples that it has left. One that has none or one left gets exact zeros, and so
    does what is left out.
    """
    left_out = rewards.isnan()
    if not left_out.any():
        return formula(rewards)
    result = rewards.new_zeros(rewards.shape)
    whole = ~left_out.any(dim=1)
    if whole.any():
        result[whole] = formula(rewards[whole])
    for group in (~whole).nonzero().flatten().tolist():
        kept = ~left_out[group]
        if int(kept.sum()) > 1:
            result[group, kept] = formula(rewards[group, kept].unsqueeze(0)).squeeze(0)
    return result


def centred(rewards: Tensor) -> Tensor:
    """Rewards [P, G] less the mean of their group. A group of equal rewards gets exact zeros: their rounded mean may
    differ from them."""
    is_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(is_equal, 0.0)


def standardised(rewards: Tensor, epsilon: float) -> Tensor:
    """Rewards [P, G] less the mean of their group, over its deviation (of a sample, n - 1) plus epsilon."""
    return centred(rewards) / (rewards.std(dim=1, keepdim=True) + epsilon)


STD_EPSILON = 1e-6
"""verl's `compute_grpo_outcome_advantage`; TRL has 1e-4."""
