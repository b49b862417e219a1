"""Calibrations made by hand: the inputs that each linear module of a float model sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.formats.parts.quantised import build_with
from isthmus.formats.parts.ranges import Calibration
from isthmus.recipe.architecture import ModelSection
from tests.support.plain import mtp_logits


class Watched(nn.Module):
    """A linear layer that notes what comes in."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.low = torch.full((weight.shape[1],), float("inf"))
        self.high = -self.low

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if len(rows):
            self.low, self.high = self.low.minimum(rows.amin(0)), self.high.maximum(rows.amax(0))
        return F.linear(x, self.weight, self.bias)


def calibrate(state: dict[str, Tensor], architecture: ModelSection, tokens: Tensor) -> Calibration:
    """What `tokens` [B, T] show of the inputs of every linear module but the head, multi-token prediction included."""
    watched: dict[str, Watched] = {}

    def make(path: str, inputs: int, bias: bool) -> nn.Module | None:
        if path != "lm_head":
            watched[path] = Watched(state[f"{path}.weight"], state.get(f"{path}.bias"))
        return watched.get(path)

    model = build_with(architecture, state, make)
    with torch.no_grad():
        hidden = model.hidden(tokens)
        if model.mtp_layer is not None:
            positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
            mask = torch.full((tokens.shape[1],) * 2, float("-inf")).triu(1)[None, None]
            mtp_logits(model, hidden, tokens, positions, mask)
    low, high = ({path: getattr(one, side) for path, one in watched.items()} for side in ("low", "high"))
    return Calibration(low, high, tokens=tokens.numel())
