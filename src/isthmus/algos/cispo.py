"""Clipped importance sampling policy optimisation (CISPO; MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

The ratio is clipped and detached, and weighs the gradient of log pi: a token whose ratio is beyond the clip still
teaches, where PPO's clip would silence it. Only the upper end is bounded, as the paper has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.algos import Loss, Options, Scores, Tokens
from isthmus.algos.parts.groups import STD_EPSILON, by_group, standardised
from isthmus.algos.parts.policy import aggregate
from isthmus.recipe.section import Number, key

if TYPE_CHECKING:
    from torch import Tensor


class Config(Options):
    """MiniMax does not publish its bound; 5 is that of ScaleRL (arXiv 2510.13786)."""

    ratio_cap: Number = key(5.0, "largest ratio, 1 plus the paper's upper epsilon", gt=1)
    std_epsilon: Number = key(STD_EPSILON, "added to the deviation in a group", gt=0)


def advantages(scores: Scores, config: Config) -> Tensor:
    """(r - mean) / (std + eps) within each group, [P, G]."""
    return by_group(lambda rewards: standardised(rewards, config.std_epsilon), scores.rewards)


def loss(tokens: Tokens, config: Config) -> Loss:
    """-w * min(ratio, cap) * A * log pi with the ratio detached, averaged over all tokens."""
    ratio = (tokens.logprobs.detach() - tokens.old).exp()
    weights = tokens.weights * ratio.clamp(max=config.ratio_cap) * tokens.advantages
    cut = (ratio > config.ratio_cap).sum().item()
    return Loss(-aggregate(weights * tokens.logprobs, tokens, config.aggregated()), cut)
