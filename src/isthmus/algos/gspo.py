"""Group sequence policy optimisation (GSPO, arXiv 2507.18071).

The ratio is that of a whole sample, (pi / pi_old) ^ (1 / length), the geometric mean of its tokens' ratios (eq. 7), and
so is the clip: a sample is cut off as one (eq. 5). Routers that choose other experts for a token change its ratio
much and the sample's little, which is why the paper needs no router replay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.algos import Aggregation, Loss, Options, Scores, Tokens
from isthmus.algos.parts.groups import STD_EPSILON, by_group, standardised
from isthmus.algos.parts.policy import clipped_samples, sample_log_ratio
from isthmus.recipe.section import Number, key

if TYPE_CHECKING:
    from torch import Tensor


class Config(Options):
    """The ranges of the clip are those of the paper's section 5.1: a mean of many ratios moves little."""

    clip_low: Number = key(3e-4, "the ratio of a sample is clipped below 1 minus this", gt=0, lt=1)
    clip_high: Number = key(4e-4, "the ratio of a sample is clipped above 1 plus this", gt=0)
    std_epsilon: Number = key(STD_EPSILON, "added to the deviation in a group", gt=0)

    def aggregated(self) -> Aggregation:
        return "sample-mean"


def advantages(scores: Scores, config: Config) -> Tensor:
    """(r - mean) / (std + eps) within each group, [P, G]."""
    return by_group(lambda rewards: standardised(rewards, config.std_epsilon), scores.rewards)


def loss(tokens: Tokens, config: Config) -> Loss:
    """-min(s * A, clip(s) * A) with the ratio s of a sample, averaged over samples."""
    log_ratio = sample_log_ratio(tokens) / tokens.lengths.clamp(min=1)
    return clipped_samples(tokens, log_ratio, config.clip_low, config.clip_high)
