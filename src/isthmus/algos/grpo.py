"""Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300; R1), with token ratios.

The advantage of a sample is its reward against its group: (r - mean) / (std + eps), or without the division, as in
Dr. GRPO (arXiv 2503.20783). The loss of a token is -w * min(ratio * A, clip(ratio) * A) with the off-policy weight w.
`clip_high` above `clip_low` is DAPO's clip-higher (arXiv 2503.14476).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from isthmus.algos import Loss
from isthmus.recipe.section import Number, Section, key

if TYPE_CHECKING:
    from torch import Tensor


class Config(Section):
    """`token-mean` weighs all tokens of the step equally (DAPO), `sample-mean` all samples (the original GRPO)."""

    clip_low: Number = key(0.2, "the ratio is clipped below 1 minus this", gt=0, lt=1)
    clip_high: Number = key(0.2, "the ratio is clipped above 1 plus this", gt=0)
    divide_by_std: bool = key(True, "divide advantages by the deviation in their group")
    std_epsilon: Number = key(1e-6, "added to that deviation", gt=0)
    aggregation: Literal["token-mean", "sample-mean"] = key("token-mean", "of the tokens' losses")


def advantages(rewards: Tensor, config: Config) -> Tensor:
    """rewards [P, G] of P prompts with G samples each; returns [P, G].

    A group of equal rewards gets exact zeros: their rounded mean may differ from them.
    """
    is_equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    centred = (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(is_equal, 0.0)
    if not config.divide_by_std:
        return centred
    return centred / (rewards.std(dim=1, keepdim=True) + config.std_epsilon)


def loss(logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, sample: Tensor, config: Config) -> Loss:
    """All [N], over the target tokens: see `isthmus.algos.Algorithm`."""
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    objective = (ratio * advantages).minimum(clipped * advantages)
    share = (clipped * advantages < ratio * advantages).float().mean().item()
    return Loss(-_aggregate(weights * objective, sample, config), share)


def _aggregate(objective: Tensor, sample: Tensor, config: Config) -> Tensor:
    if config.aggregation == "token-mean":
        return objective.mean()
    count = int(sample.max()) + 1
    lengths = objective.new_zeros(count).index_add(0, sample, objective.new_ones(len(sample)))
    per_sample = objective.new_zeros(count).index_add(0, sample, objective) / lengths.clamp(min=1)
    return per_sample[lengths > 0].mean()
