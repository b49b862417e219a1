"""What faster ways through a model are held against, written out plainly."""

from __future__ import annotations

import torch
from torch import Tensor

from isthmus.model.attention import Mask
from isthmus.model.model import Model


def document_mask(document: Tensor) -> Tensor:
    """Additive mask [B, 1, T, T] for packed rows: causal, and only within a document. `document` [B, T] holds ids."""
    same = document.unsqueeze(-1) == document.unsqueeze(-2)
    allowed = same & torch.ones_like(same).tril()
    return torch.zeros(allowed.shape, device=document.device).masked_fill(~allowed, float("-inf")).unsqueeze(1)


def mtp_logits(model: Model, hidden: Tensor, tokens: Tensor, positions: Tensor, mask: Mask) -> Tensor:
    """Logits [B, T - 1, vocab] of token i + 2, from the states [B, T, D] of tokens [B, T]."""
    return model.lm_head(model.mtp_states(hidden, tokens, positions, mask)[:, :-1])
