"""Losses of tokens, and how they become one number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.algos import Aggregation, Loss, Options, Tokens
from isthmus.recipe.section import Number, key

if TYPE_CHECKING:
    from torch import Tensor


OWN_ADVANTAGES = "it masks samples of negative advantage, and here each token has an advantage of its own"
"""Why `off_policy_mask` is refused."""


class Clipped(Options):
    """Options of an algorithm whose ratio, of a token or of a sample, is clipped as PPO's is."""

    clip_low: Number = key(0.2, "the ratio is clipped below 1 minus this", gt=0, lt=1)
    clip_high: Number = key(0.2, "the ratio is clipped above 1 plus this", gt=0)


def clipped_objective(tokens: Tokens, ratio: Tensor, low: float, high: float) -> tuple[Tensor, float]:
    """(min(ratio * A, clip(ratio, 1 - low, 1 + high) * A) [N], tokens that the clip cuts off): PPO's objective, arXiv
    1707.06347 eq. 7."""
    advantages = tokens.advantages
    clipped = ratio.clamp(1 - low, 1 + high)
    cut = (clipped * advantages < ratio * advantages).sum().item()
    return (ratio * advantages).minimum(clipped * advantages), cut


def sample_log_ratio(tokens: Tokens) -> Tensor:
    """The sum over each sample of log(trainer now / trainer before), [samples]. An off-policy weight scales what its
    token passes on of the gradient, so that a token of weight 0 passes on nothing."""
    moved = tokens.logprobs - tokens.logprobs.detach()
    return tokens.summed(tokens.weights * moved + tokens.logprobs.detach() - tokens.old)


def clipped_samples(tokens: Tokens, log_ratio: Tensor, low: float, high: float) -> Loss:
    """PPO's objective with one ratio for each sample, `log_ratio` [samples], averaged over samples; `clipped` counts
    the tokens of those that the clip cuts off."""
    lengths = tokens.lengths
    advantages = tokens.summed(tokens.advantages) / lengths.clamp(min=1)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    cut = lengths[clipped * advantages < ratio * advantages].sum().item()
    objective = (ratio * advantages).minimum(clipped * advantages)
    return Loss(-objective[lengths > 0].sum() / tokens.totals.samples, cut)


def reference_kl(tokens: Tokens, times_ratio: bool) -> Tensor:
    """The k3 estimate [N] of KL(trainer || reference), r - 1 - log r with r = reference / trainer
    (joschu.net/blog/kl-approx.html). Times trainer now / trainer before, value and gradient have no bias
    (DeepSeek-V3.2, arXiv 2512.02556)."""
    assert tokens.reference is not None
    difference = tokens.reference - tokens.logprobs
    k3 = difference.exp() - 1 - difference
    return k3 * (tokens.logprobs - tokens.old).exp() if times_ratio else k3


def token_returns(rewards: Tensor, kl: Tensor, sample: Tensor, weight: float) -> Tensor:
    """What is still to come at each token [N], in float64 on the host: the reward of its sample, less `weight` times
    the `kl` of this token and of those after it (REINFORCE++, arXiv 2501.03262, eq. 8). Tokens stand sample by sample.

    OpenRLHF gives the reward to the last token and adds up from behind: `compute_reward`, `get_cumulative_returns`.
    """
    rewards, kl, sample = rewards.cpu().double(), kl.cpu().double(), sample.cpu()
    until = kl.cumsum(0)
    _, of, lengths = sample.unique_consecutive(return_inverse=True, return_counts=True)
    return rewards - weight * (until[lengths.cumsum(0) - 1][of] - until + kl)


def aggregate(values: Tensor, tokens: Tokens, how: Aggregation) -> Tensor:
    """One number of values [N], by the denominators of the whole update."""
    totals = tokens.totals
    if how == "token-mean":
        return values.sum() / totals.tokens
    if how == "constant":
        return values.sum() / (totals.rolled_samples * totals.longest)
    lengths = tokens.lengths
    per_sample = tokens.summed(values) / lengths.clamp(min=1)
    return per_sample[lengths > 0].sum() / totals.samples
