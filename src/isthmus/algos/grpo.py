"""Group relative policy optimisation (DeepSeekMath, arXiv 2402.03300; R1), with token ratios.

The advantage of a sample is its reward against its group: (r - mean) / (std + eps), or without the division, as in
Dr. GRPO (arXiv 2503.20783). The loss of a token is -w * min(ratio * A, clip(ratio) * A) with the off-policy weight w.
`clip_high` above `clip_low` is DAPO's clip-higher (arXiv 2503.14476).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from isthmus.algos import Aggregation, Loss, Scores, Tokens
from isthmus.algos.parts.groups import STD_EPSILON, by_group, centred, standardised
from isthmus.algos.parts.policy import Clipped, aggregate, clipped_objective
from isthmus.recipe.section import Number, key

if TYPE_CHECKING:
    from torch import Tensor


class Config(Clipped):
    """`token-mean` weighs all tokens of the step equally (DAPO), `sample-mean` all samples (the original GRPO)."""

    divide_by_std: bool = key(True, "divide advantages by the deviation in their group")
    std_epsilon: Number = key(STD_EPSILON, "added to that deviation", gt=0)
    aggregation: Literal["token-mean", "sample-mean"] = key("token-mean", "of the tokens' losses")

    def aggregated(self) -> Aggregation:
        return self.aggregation


def advantages(scores: Scores, config: Config) -> Tensor:
    """[P, G]; exact zeros for a group of equal rewards."""

    def of_groups(rewards: Tensor) -> Tensor:
        if not config.divide_by_std:
            return centred(rewards)
        return standardised(rewards, config.std_epsilon)

    return by_group(of_groups, scores.rewards)


def loss(tokens: Tokens, config: Config) -> Loss:
    """See `isthmus.algos.Algorithm`."""
    ratio = (tokens.logprobs - tokens.old).exp()
    objective, cut = clipped_objective(tokens, ratio, config.clip_low, config.clip_high)
    return Loss(-aggregate(tokens.weights * objective, tokens, config.aggregation), cut)
