"""On-policy distillation: the reverse KL to a teacher, on what the student itself wrote.

The advantage of a token is log pi_teacher - log pi_before of the token that was sampled, whose expectation is minus the
reverse KL of that place; the loss is -w * ratio * A, whose gradient is that of the KL where the samples are the
policy's own (thinkingmachines.ai/blog/on-policy-distillation, 2025). Rewards are shown and not learnt from. The teacher
scores tokens, so it needs the student's tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from isthmus.algos import Loss, Options, Scores, Tokens
from isthmus.algos.parts.policy import OWN_ADVANTAGES, aggregate

if TYPE_CHECKING:
    from torch import Tensor


class Config(Options):
    """No options: there is nothing to clip, for each token has an advantage of its own."""

    learns_from: ClassVar[Literal["rewards", "teacher"]] = "teacher"

    def refuses(self) -> Mapping[str, str]:
        return {"off_policy_mask": OWN_ADVANTAGES}


def advantages(scores: Scores, config: Config) -> Tensor:
    """1 for a sample that is learnt from, 0 for one that is left out, [P, G]."""
    return (~scores.rewards.isnan()).to(scores.rewards.dtype)


def loss(tokens: Tokens, config: Config) -> Loss:
    """-w * pi / pi_before * (log pi_teacher - log pi_before), averaged over all tokens."""
    assert tokens.teacher is not None
    ratio = (tokens.logprobs - tokens.old).exp()
    objective = ratio * (tokens.teacher - tokens.old)
    return Loss(-aggregate(tokens.weights * objective, tokens, config.aggregated()), 0)
