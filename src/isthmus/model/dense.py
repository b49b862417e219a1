"""Qwen2 and Llama 3, the dense architectures of the R1-Distill models: grouped-query attention and a gated MLP.

Shapes: B batch, T new tokens, S cached tokens, H query heads, K key/value heads, G = H / K, d head size, D hidden.
The cache holds 2 K d numbers per token and layer: the rotated keys of all heads, then their values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.model.attention import LayerCache, Mask, Rotation, attend
from isthmus.model.layer import ResidualLayer
from isthmus.model.moe import GatedMlp
from isthmus.recipe import DenseSection


def rotate_halves(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (i, i + d / 2) of the last dimension of x [B, T, heads, d], the layout of Hugging Face weights."""
    cos, sin = rotation.cos.unsqueeze(2), rotation.sin.unsqueeze(2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class GroupedQueryAttention(nn.Module):
    """G query heads share a key/value head (arXiv 2305.13245). The parameters have their published names.

    query [B, T, H, d], key and value [B, S, K, d] give the context [B, T, H, d]; a cache has a form of its own.
    """

    def __init__(self, architecture: DenseSection):
        super().__init__()
        a = architecture
        self.num_heads, self.num_kv_heads, self.head_size = a.num_attention_heads, a.num_key_value_heads, a.head_size
        self.scale = self.head_size**-0.5
        self.q_proj = nn.Linear(a.hidden_size, self.num_heads * self.head_size, bias=a.input_bias)
        self.k_proj = nn.Linear(a.hidden_size, self.num_kv_heads * self.head_size, bias=a.input_bias)
        self.v_proj = nn.Linear(a.hidden_size, self.num_kv_heads * self.head_size, bias=a.input_bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_size, a.hidden_size, bias=a.output_bias)

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, cache: LayerCache | None = None) -> Tensor:
        """x [B, T, D]; mask additive, to [B, H, T, S] (S = T without a cache), or documents. Returns [B, T, D]."""
        query = rotate_halves(self._heads(self.q_proj(x)), rotation)
        key, value = rotate_halves(self._heads(self.k_proj(x)), rotation), self._heads(self.v_proj(x))
        if cache is None:
            context = self._whole(query, key, value, mask)
        else:
            assert isinstance(mask, Tensor), "a cache is not packed with documents"
            entries = cache.append(torch.cat((key, value), dim=2).flatten(2))
            key, value = self._heads(entries).chunk(2, dim=2)
            context = self._grouped(query, key, value, mask)
        return self.o_proj(context.flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size))

    def _whole(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        """Whole rows of tokens: every query head gets its copy of the keys and values, as fused kernels want them."""
        groups = self.num_heads // self.num_kv_heads
        key, value = (part.repeat_interleave(groups, dim=2) for part in (key, value))
        return attend(query, key, value, mask, self.scale)

    def _grouped(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """A few tokens against a cache, mask [B, 1, T, S]: products of views, one for each group, nothing is copied."""
        groups = zip(query.chunk(self.num_kv_heads, dim=2), key.unbind(2), value.unbind(2), strict=True)
        return torch.cat([self._group(*group, mask) for group in groups], dim=2)

    def _group(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """query [B, T, G, d] on the key/value head that it shares, key and value [B, S, d]: [B, T, G, d]."""
        batch, new, heads, _ = query.shape
        scores = torch.bmm(query.flatten(1, 2), key.transpose(1, 2)).view(batch, new, heads, -1)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = F.softmax(torch.add(mask.transpose(1, 2), scores, alpha=self.scale).to(wide), dim=-1).to(scores.dtype)
        return torch.bmm(weights.flatten(1, 2), value).view_as(query)


class DenseLayer(ResidualLayer):
    """A layer of a dense model."""

    def __init__(self, architecture: DenseSection):
        a = architecture
        super().__init__(a, GroupedQueryAttention(a), GatedMlp(a.hidden_size, a.intermediate_size))
