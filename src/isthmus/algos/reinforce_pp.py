"""REINFORCE++ (arXiv 2501.03262): no critic, and rewards are held against the whole batch.

The advantage of a token is its sample's reward less the mean over all tokens of the batch, over their deviation; with
`baseline = "group"` the mean of the group is taken off first (REINFORCE++-baseline). Mean and deviation weigh samples
by their length, as OpenRLHF has it. The loss is PPO's, averaged over all tokens.

With `kl_in_reward`, as in the paper's eq. 8, each token pays for log(pi_before / pi_reference), and what is normalised
is the return of a token: its sample's reward, less what it and the tokens after it pay. In REINFORCE++-baseline the KL
is a term of the loss instead, which is `loss.kl_weight` here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from isthmus.algos import Loss, Scores, Tokens
from isthmus.algos.parts.groups import by_group, centred
from isthmus.algos.parts.policy import OWN_ADVANTAGES, Clipped, aggregate, clipped_objective
from isthmus.recipe.section import Number, key

if TYPE_CHECKING:
    from torch import Tensor

LEAST_VARIANCE = 1e-8
"""Of advantages, below which they are divided by its root all the same: OpenRLHF's."""
ROUNDING = 1e-28
"""Of a variance, in squares of the mean, that rounding in float64 makes."""


class Config(Clipped):
    """The clip is PPO's."""

    compares: ClassVar[Literal["group", "batch"]] = "batch"
    baseline: Literal["none", "group"] = key("none", "what is taken off a reward before the batch is normalised")
    kl_in_reward: Number = key(
        0.0, "weight of a token's KL to the weights that the step began with, off its reward", ge=0
    )

    def reward_kl(self) -> float:
        return self.kl_in_reward

    def refuses(self) -> Mapping[str, str]:
        return {"off_policy_mask": OWN_ADVANTAGES} if self.kl_in_reward else {}


def advantages(scores: Scores, config: Config) -> Tensor:
    """(a - mean) / std over the tokens of the batch, [P, G]; zeros where all rewards are equal. With `kl_in_reward` a,
    the rewards less their baseline, which is not normalised yet."""
    rewards = scores.rewards
    known = ~rewards.isnan()
    used = known & (known.sum(dim=1, keepdim=True) > 1)
    values, weights = rewards[used], scores.lengths[used].to(rewards.dtype)
    result = rewards.new_zeros(rewards.shape)
    if not len(values) or ((values == values[0]).all() and not config.kl_in_reward):
        return result
    if config.baseline == "group":
        values = by_group(centred, rewards)[used]
    if config.kl_in_reward:
        result[used] = values
        return result
    total = weights.sum()
    centre = values - (values * weights).sum() / total
    variance = (centre.square() * weights).sum() / total
    result[used] = centre * variance.clamp(min=LEAST_VARIANCE).rsqrt()
    return result


def token_advantages(returns: Sequence[Tensor], total: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """(return - mean) / std over all tokens of the batch; zeros where all are equal but for rounding."""
    sums = [float(sum(map(len, returns))), sum(one.sum().item() for one in returns)]
    count, added = total(returns[0].new_tensor(sums)).tolist()
    mean = added / count
    squares = sum((one - mean).square().sum().item() for one in returns)
    variance = total(returns[0].new_tensor([squares])).item() / count
    if variance <= ROUNDING * max(1.0, mean * mean):
        return [one.new_zeros(one.shape) for one in returns]
    return [(one - mean) / max(variance, LEAST_VARIANCE) ** 0.5 for one in returns]


def loss(tokens: Tokens, config: Config) -> Loss:
    """-w * min(ratio * A, clip(ratio) * A), averaged over all tokens."""
    ratio = (tokens.logprobs - tokens.old).exp()
    objective, cut = clipped_objective(tokens, ratio, config.clip_low, config.clip_high)
    return Loss(-aggregate(tokens.weights * objective, tokens, config.aggregated()), cut)
