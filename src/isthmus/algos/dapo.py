"""Decoupled clip and dynamic sampling policy optimisation (DAPO, arXiv 2503.14476).

Against GRPO: the ratio may rise further than it may fall (clip-higher, eq. 10); all tokens of a step weigh the same
(eq. 12); and prompts whose samples all earn the same are replaced by others until the step has as many as it wants
(dynamic sampling, eq. 11). The paper's soft punishment of overlong answers is a reward, not a part of the loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.algos import Loss, Options, Scores, Tokens
from isthmus.algos.parts.groups import STD_EPSILON, by_group, standardised
from isthmus.algos.parts.policy import aggregate, clipped_objective
from isthmus.recipe.section import Count, Number, key

if TYPE_CHECKING:
    from torch import Tensor


class Config(Options):
    """Defaults are the paper's. verl gives up after 10 rollouts too, and it raises an error then."""

    clip_low: Number = key(0.2, "the ratio is clipped below 1 minus this", gt=0, lt=1)
    clip_high: Number = key(0.28, "the ratio is clipped above 1 plus this", gt=0)
    std_epsilon: Number = key(STD_EPSILON, "added to the deviation in a group", gt=0)
    most_rollouts: Count = key(10, "rollouts of a step at most, until every prompt has samples of unequal reward")

    def rollouts_at_most(self) -> int:
        return self.most_rollouts


def advantages(scores: Scores, config: Config) -> Tensor:
    """(r - mean) / (std + eps) within each group, [P, G]."""
    return by_group(lambda rewards: standardised(rewards, config.std_epsilon), scores.rewards)


def loss(tokens: Tokens, config: Config) -> Loss:
    """-w * min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), averaged over all tokens."""
    ratio = (tokens.logprobs - tokens.old).exp()
    objective, cut = clipped_objective(tokens, ratio, config.clip_low, config.clip_high)
    return Loss(-aggregate(tokens.weights * objective, tokens, config.aggregated()), cut)
