"""REINFORCE++ (arXiv 2501.03262): no critic, and rewards are held against the whole batch.

The advantage of a token is its sample's reward less the mean over all tokens of the batch, over their deviation; with
`baseline = "group"` the mean of the group is taken off first (REINFORCE++-baseline). Mean and deviation weigh samples
by their length, as OpenRLHF has it. The loss is PPO's, averaged over all tokens. The paper takes the KL to a reference
off the reward; here it is a term of the loss, `loss.kl_weight`, as in REINFORCE++-baseline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from isthmus.algos import Loss, Options, Scores, Tokens
from isthmus.algos.parts.groups import by_group, centred
from isthmus.algos.parts.policy import aggregate, clipped_objective
from isthmus.recipe.section import Number, key

if TYPE_CHECKING:
    from torch import Tensor

LEAST_VARIANCE = 1e-8
"""Of advantages, below which they are divided by its root all the same: OpenRLHF's."""


class Config(Options):
    """The clip is PPO's."""

    compares: ClassVar[Literal["group", "batch"]] = "batch"
    clip_low: Number = key(0.2, "the ratio is clipped below 1 minus this", gt=0, lt=1)
    clip_high: Number = key(0.2, "the ratio is clipped above 1 plus this", gt=0)
    baseline: Literal["none", "group"] = key("none", "what is taken off a reward before the batch is normalised")


def advantages(scores: Scores, config: Config) -> Tensor:
    """(a - mean) / std over the tokens of the batch, [P, G]; zeros where all rewards are equal."""
    rewards = scores.rewards
    known = ~rewards.isnan()
    used = known & (known.sum(dim=1, keepdim=True) > 1)
    values, weights = rewards[used], scores.lengths[used].to(rewards.dtype)
    result = rewards.new_zeros(rewards.shape)
    if not len(values) or (values == values[0]).all():
        return result
    if config.baseline == "group":
        values = by_group(centred, rewards)[used]
    total = weights.sum()
    centre = values - (values * weights).sum() / total
    variance = (centre.square() * weights).sum() / total
    result[used] = centre * variance.clamp(min=LEAST_VARIANCE).rsqrt()
    return result


def loss(tokens: Tokens, config: Config) -> Loss:
    """-w * min(ratio * A, clip(ratio) * A), averaged over all tokens."""
    ratio = (tokens.logprobs - tokens.old).exp()
    objective, cut = clipped_objective(tokens, ratio, config.clip_low, config.clip_high)
    return Loss(-aggregate(tokens.weights * objective, tokens, config.aggregated()), cut)
