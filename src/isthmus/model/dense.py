"""Qwen2 and Llama 3, the dense architectures of the R1-Distill models: grouped-query attention and a gated MLP.

Shapes: B batch, T new tokens, S cached tokens, H query heads, K key/value heads, G = H / K, d head size, D hidden.
The cache holds 2 K d numbers per token and layer: the rotated keys of all heads, then their values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isthmus.model.attention import EntryLayout, LayerCache, Mask, Rotation, attend
from isthmus.model.layer import ResidualLayer
from isthmus.model.moe import GatedMlp
from isthmus.recipe.architecture import DenseSection


def rotate_halves(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (i, i + d / 2) of the last dimension of x [B, T, heads, d], the layout of Hugging Face weights."""
    cos, sin = rotation.cos.unsqueeze(2), rotation.sin.unsqueeze(2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class GroupedQueryAttention(nn.Module):
    """G query heads share a key/value head (arXiv 2305.13245). The parameters have their published names.

    query [B, T, H, d], key and value [B, S, K, d] give the context [B, T, H, d].
    """

    def __init__(self, architecture: DenseSection):
        super().__init__()
        a = architecture
        self.num_heads, self.num_kv_heads, self.head_size = a.num_attention_heads, a.num_key_value_heads, a.head_size
        self.scale = self.head_size**-0.5
        keys = self.num_kv_heads * self.head_size
        self.layout = EntryLayout(self.num_kv_heads, 2 * keys, self.head_size, keys, self.head_size)
        self.q_proj = nn.Linear(a.hidden_size, self.num_heads * self.head_size, bias=a.input_bias)
        self.k_proj = nn.Linear(a.hidden_size, self.num_kv_heads * self.head_size, bias=a.input_bias)
        self.v_proj = nn.Linear(a.hidden_size, self.num_kv_heads * self.head_size, bias=a.input_bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_size, a.hidden_size, bias=a.output_bias)

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask | None, cache: LayerCache | None = None) -> Tensor:
        """x [B, T, D]; mask additive, to [B, H, T, T], or documents; a cache takes its place. Returns [B, T, D]."""
        query, key, value = (self._heads(part) for part in self.project(x))
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
        key, value = (part.repeat_interleave(groups, dim=2) for part in (key, value))
        return attend(query, key, value, mask, self.scale)


class DenseLayer(ResidualLayer):
    """A layer of a dense model."""

    def __init__(self, architecture: DenseSection):
        a = architecture
        super().__init__(a, GroupedQueryAttention(a), GatedMlp(a.hidden_size, a.intermediate_size))
