"""Qwen2, Qwen3, Llama and Mistral: grouped-query attention, and a gated MLP or, in Qwen3's mixture, experts.

Shapes: B batch, T new tokens, S cached tokens, H query heads, K key/value heads, G = H / K, d head size, D hidden.
The cache holds 2 K d numbers per token and layer: the rotated keys of all heads, then their values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isthmus.model.attention import EntryLayout, LayerCache, Mask, RMSNorm, Rotation, attend
from isthmus.model.layer import ResidualLayer
from isthmus.model.moe import GatedMlp, MixtureOfExperts
from isthmus.recipe.architecture import GroupedSection, Qwen3MoeSection


def rotate_halves(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (i, i + d / 2) of the last dimension of x [B, T, heads, d], the layout of Hugging Face weights."""
    cos, sin = rotation.cos.unsqueeze(2), rotation.sin.unsqueeze(2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class GroupedQueryAttention(nn.Module):
    """G query heads share a key/value head (arXiv 2305.13245). The parameters have their published names.

    query [B, T, H, d], key and value [B, S, K, d] give the context [B, T, H, d]. In Qwen3 each head of queries and keys
    passes a norm of its size d before it is rotated.
    """

    def __init__(self, architecture: GroupedSection, index: int):
        super().__init__()
        a = architecture
        self.num_heads, self.num_kv_heads, self.head_size = a.num_attention_heads, a.num_key_value_heads, a.head_size
        self.scale = self.head_size**-0.5
        keys = self.num_kv_heads * self.head_size
        self.layout = EntryLayout(self.num_kv_heads, 2 * keys, self.head_size, keys, self.head_size, a.window_of(index))
        self.q_proj = nn.Linear(a.hidden_size, self.num_heads * self.head_size, bias=a.input_bias)
        self.k_proj = nn.Linear(a.hidden_size, self.num_kv_heads * self.head_size, bias=a.input_bias)
        self.v_proj = nn.Linear(a.hidden_size, self.num_kv_heads * self.head_size, bias=a.input_bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_size, a.hidden_size, bias=a.output_bias)
        self.q_norm = RMSNorm(self.head_size, a.rms_norm_eps) if a.head_norms else None
        self.k_norm = RMSNorm(self.head_size, a.rms_norm_eps) if a.head_norms else None

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask | None, cache: LayerCache | None = None) -> Tensor:
        """x [B, T, D]; mask additive, to [B, H, T, T], or documents; a cache takes its place. Returns [B, T, D]."""
        query, key, value = (self._heads(part) for part in self.project(x))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate_halves(query, rotation), rotate_halves(key, rotation)
        if cache is None:
            assert mask is not None
            context = self.whole(query, key, value, mask)
        else:
            context = cache.attend(query, torch.cat((key, value), dim=2).flatten(2), self.layout, self.scale)
        return self.o_proj(context.flatten(-2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H d], keys and values [B, T, K d] of x [B, T, D]."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size))

    def whole(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        """Whole rows of tokens: every query head gets its copy of the keys and values, as fused kernels want them."""
        groups = self.num_heads // self.num_kv_heads
        if groups > 1:
            key, value = (part.repeat_interleave(groups, dim=2) for part in (key, value))
        return attend(query, key, value, mask, self.scale, self.layout.window)


class GroupedQueryLayer(ResidualLayer):
    """Layer `index` of a model with grouped-query attention."""

    def __init__(self, architecture: GroupedSection, index: int):
        a = architecture
        if isinstance(a, Qwen3MoeSection) and a.is_sparse(index):
            mlp = MixtureOfExperts(a)
        else:
            mlp = GatedMlp(a.hidden_size, a.intermediate_size)
        super().__init__(a, GroupedQueryAttention(a, index), mlp)
