"""Multi-token prediction, depth 1 (DeepSeek-V3, 2.2): from position i it predicts token i + 2.

The input is [norm(embedding of token i + 1), norm(hidden state i)], in this order: the order of the released weights,
which is the reverse of the paper's text. The hidden state is the last layer's, before the final norm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isthmus.model.attention import LayerCache, Mask, RMSNorm, Rotation
from isthmus.model.layer import DecoderLayer
from isthmus.model.moe import Trace
from isthmus.recipe.architecture import DeepseekSection


class SharedHead(nn.Module):
    """The norm in front of the output head that is shared with the model."""

    def __init__(self, architecture: DeepseekSection):
        super().__init__()
        self.norm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)


class MtpLayer(DecoderLayer):
    """The layer after the last one in a published checkpoint."""

    def __init__(self, architecture: DeepseekSection, index: int):
        super().__init__(architecture, index)
        a = architecture
        self.enorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.hnorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * a.hidden_size, a.hidden_size, bias=False)
        self.shared_head = SharedHead(a)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        next_embedding: Tensor,
        hidden: Tensor,
        rotation: Rotation,
        mask: Mask | None,
        trace: Trace | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """next_embedding and hidden [B, T, D]. Returns the normed states [B, T, D] for the shared output head."""
        joined = self.join(next_embedding, hidden)
        return self.shared_head.norm(super().forward(joined, rotation, mask, cache, trace))

    def join(self, next_embedding: Tensor, hidden: Tensor) -> Tensor:
        """What the layer starts from, [..., D] of two [..., D]."""
        return self.eh_proj(torch.cat((self.enorm(next_embedding), self.hnorm(hidden)), dim=-1))
