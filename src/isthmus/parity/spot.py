"""A small check of every version that an engine has taken: a few tokens of its own, against what was sent to it.

The model of the format on the CPU (`Format.build` of the tensors that were sent) says what the engine should have
computed. Both know the same stored weights, so quantisation plays no part: what remains is the chip's and the engine's
own share, and weights that did not arrive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from isthmus.model.model import Model

LIMIT = 0.05
LIMIT_SOURCE = (
    "between what rollouts showed with a healthy engine (0.011 to 0.025) and with wrongly mapped weights "
    "(0.075 to 0.178): github.com/vllm-project/vime/pull/275"
)


@dataclass(frozen=True)
class Gap:
    """|log-probability that the engine gave - that of the model| over the tokens that the engine wrote, in nats."""

    tokens: int
    mean: float
    largest: float

    @property
    def is_over(self) -> bool:
        """Whether the mean is beyond LIMIT; a number that is none counts as beyond."""
        return not self.mean <= LIMIT


@torch.inference_mode()
def spot_gap(model: Model, prompts: list[list[int]], answers: list[tuple[list[int], list[float]]]) -> Gap:
    """Compare the greedy answer to each prompt (tokens, their log-probabilities) with what the model gives them."""
    gaps = []
    for prompt, (tokens, logprobs) in zip(prompts, answers, strict=True):
        logits = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1].double()
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        gaps.append((torch.tensor(logprobs, dtype=torch.float64) - expected).abs())
    found = torch.cat(gaps)
    return Gap(len(found), found.mean().item(), found.max().item())
