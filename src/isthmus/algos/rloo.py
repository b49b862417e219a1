"""REINFORCE with a leave-one-out baseline (RLOO, arXiv 2402.14740).

A sample's reward is held against the mean of the others of its group: r_i - mean of r_j, j != i. The whole completion
is one action: its log-probability is the sum of its tokens', and the loss is averaged over samples. Where several
updates are made of a rollout, the ratio of a sample is clipped as PPO's is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from isthmus.algos import Aggregation, Loss, Scores, Tokens
from isthmus.algos.parts.groups import by_group, centred
from isthmus.algos.parts.policy import Clipped, clipped_samples, sample_log_ratio

if TYPE_CHECKING:
    from torch import Tensor


class Config(Clipped):
    """With one update for each rollout the ratio is 1, and the clip does nothing."""

    def aggregated(self) -> Aggregation:
        return "sample-mean"


def advantages(scores: Scores, config: Config) -> Tensor:
    """r_i - mean of the other rewards of the group, which is G / (G - 1) * (r_i - mean of all); [P, G]."""

    def left_out(rewards: Tensor) -> Tensor:
        group = rewards.shape[1]
        return centred(rewards) * (group / (group - 1))

    return by_group(left_out, scores.rewards)


def loss(tokens: Tokens, config: Config) -> Loss:
    """-min(ratio * A, clip(ratio) * A) with pi / pi_old of whole samples, averaged over samples."""
    return clipped_samples(tokens, sample_log_ratio(tokens), config.clip_low, config.clip_high)
