"""Tokens for losses, with what a test does not care about filled in."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.algos import Tokens, Totals


def tokens_of(logprobs: Tensor, advantages: Tensor, sample: list[int] | Tensor, **changes) -> Tokens:
    """On-policy tokens [N] of a whole update, all of weight one; `longest` is the limit on a completion."""
    sample = torch.as_tensor(sample)
    samples, longest = int(sample.max()) + 1 if len(sample) else 0, changes.pop("longest", 8)
    now = logprobs.detach()
    fields = {
        "old": now,
        "engine": now,
        "weights": torch.ones_like(now),
        "samples": samples,
        "totals": Totals(len(sample), samples, len(sample), samples, longest),
    }
    return Tokens(logprobs=logprobs, advantages=advantages, sample=sample, **{**fields, **changes})
