"""GRPO done right (Dr. GRPO, arXiv 2503.20783): without its two biases.

The advantage is r - mean, undivided, for the division favours questions that are nearly always or nearly never solved.
The sum over a sample's tokens is divided by a constant, the limit on its length, for its own length favours long wrong
answers. Samples that teach nothing count in the mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.algos import Aggregation, Loss, Scores, Tokens
from isthmus.algos.parts.groups import by_group, centred
from isthmus.algos.parts.policy import Clipped, aggregate, clipped_objective

if TYPE_CHECKING:
    from torch import Tensor


class Config(Clipped):
    """The clip is PPO's; the constant is `max_new_tokens`."""

    def aggregated(self) -> Aggregation:
        return "constant"


def advantages(scores: Scores, config: Config) -> Tensor:
    """r - mean within each group, [P, G]."""
    return by_group(centred, scores.rewards)


def loss(tokens: Tokens, config: Config) -> Loss:
    """-w * min(ratio * A, clip(ratio) * A), summed over tokens, over samples times the longest completion."""
    ratio = (tokens.logprobs - tokens.old).exp()
    objective, cut = clipped_objective(tokens, ratio, config.clip_low, config.clip_high)
    return Loss(-aggregate(tokens.weights * objective, tokens, config.aggregated()), cut)
