"""One decoder layer: attention, then a dense MLP or a mixture of experts, each behind a norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from isthmus.model.attention import LatentAttention, LayerCache, Mask, RMSNorm, Rotation
from isthmus.model.moe import GatedMlp, MixtureOfExperts, Routing, Trace
from isthmus.recipe.architecture import DeepseekSection, ModelSection


class ResidualLayer(nn.Module):
    """Attention, then `mlp`, each behind a norm and added to what came in.

    With `recompute` the backward pass computes the layer again instead of keeping its intermediate results.
    """

    def __init__(self, architecture: ModelSection, attention: nn.Module, mlp: GatedMlp | MixtureOfExperts):
        super().__init__()
        a = architecture
        self.recompute = False
        self.input_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(a.hidden_size, a.rms_norm_eps)
        self.mlp = mlp

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        mask: Mask | None,
        cache: LayerCache | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """x [B, T, D]; mask as in the attention. Returns [B, T, D]. The routing, if any, is appended to `trace`, which
        may have one to take over."""
        chosen = trace.chosen() if trace is not None and isinstance(self.mlp, MixtureOfExperts) else None
        if self.recompute and torch.is_grad_enabled():
            x, routing = checkpoint(
                self._block, x, rotation, mask, cache, chosen, use_reentrant=False, preserve_rng_state=False
            )
        else:
            x, routing = self._block(x, rotation, mask, cache, chosen)
        if trace is not None and routing is not None:
            trace.routings.append(routing)
        return x

    def _block(
        self, x: Tensor, rotation: Rotation, mask: Mask | None, cache: LayerCache | None, chosen: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.self_attn(self.input_layernorm(x), rotation, mask, cache)
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MixtureOfExperts):
            y, routing = self.mlp(normed) if chosen is None else self.mlp(normed, chosen)
            return x + y, routing
        return x + self.mlp(normed), None


class DecoderLayer(ResidualLayer):
    """Layer `index` of a DeepSeek-V3 model; the first `first_k_dense_replace` layers are dense."""

    def __init__(self, architecture: DeepseekSection, index: int):
        a = architecture
        dense = not a.is_sparse(index)
        mlp = GatedMlp(a.hidden_size, a.intermediate_size, a.swiglu_limit) if dense else MixtureOfExperts(a)
        super().__init__(a, LatentAttention(a), mlp)
