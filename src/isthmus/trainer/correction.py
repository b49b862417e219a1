"""Off-policy correction: the trainer's numerics are never those of the engine that generated.

With d = log p_trainer - log p_engine of a sampled token, the truncated importance weight is min(exp(d), cap)
(fengyao.notion.site/off-policy-rl, 2025), and the k3 estimate of KL(engine || trainer) is exp(d) - 1 - d
(joschu.net/blog/kl-approx.html).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mismatch:
    """How far the trainer is from the engine on the same tokens, in nats per token."""

    mean_abs: float
    max_abs: float
    k3: float


@dataclass(frozen=True)
class Correction:
    """`weights` [N], detached; `mean` of them before truncation and the share that was truncated."""

    weights: Tensor
    mean: float
    clipped: float


@torch.no_grad()
def mismatch(trainer: Tensor, engine: Tensor) -> Mismatch:
    """Of log-probabilities [N] of the same tokens."""
    difference = (trainer - engine).double()
    k3 = torch.expm1(difference) - difference
    return Mismatch(difference.abs().mean().item(), difference.abs().max().item(), k3.mean().item())


@torch.no_grad()
def truncated_importance(trainer: Tensor, engine: Tensor, cap: float) -> Correction:
    """Weights min(p_trainer / p_engine, cap) of log-probabilities [N]."""
    ratio = (trainer - engine).exp()
    return Correction(ratio.clamp(max=cap), ratio.mean().item(), (ratio > cap).float().mean().item())
