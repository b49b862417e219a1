"""One decoder layer: latent attention, then a dense MLP or a mixture of experts, each behind a norm."""

from __future__ import annotations

from torch import Tensor, nn

from isthmus.model.attention import LatentAttention, LayerCache, RMSNorm, Rotation
from isthmus.model.moe import GatedMlp, MixtureOfExperts, Routing
from isthmus.recipe import ModelSection


class DecoderLayer(nn.Module):
    """Layer `index` of the model; the first `first_k_dense_replace` layers are dense."""

    def __init__(self, architecture: ModelSection, index: int):
        super().__init__()
        a = architecture
        self.input_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.self_attn = LatentAttention(a)
        self.post_attention_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        dense = index < a.first_k_dense_replace
        self.mlp = GatedMlp(a.hidden_size, a.intermediate_size) if dense else MixtureOfExperts(a)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        mask: Tensor,
        cache: LayerCache | None = None,
        trace: list[Routing] | None = None,
    ) -> Tensor:
        """x [B, T, D]; mask as in LatentAttention. Returns [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        normed = self.post_attention_layernorm(x)
        return x + (self.mlp(normed, trace) if isinstance(self.mlp, MixtureOfExperts) else self.mlp(normed))
