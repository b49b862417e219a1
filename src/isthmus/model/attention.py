"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), in its naive and its absorbed form.

Shapes: B batch, T new tokens, S cached tokens, H heads, N nope dim, R rope dim, V value dim, C latent rank, D hidden.
The cache holds C + R numbers per token and layer: the normalised latent and the rotated shared key.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.model.config import rope_amplitude, rope_inverse_frequencies, softmax_scale
from isthmus.model.documents import Documents, attention
from isthmus.recipe import DeepseekSection, ModelSection

Mask = Tensor | Documents
"""What a token may attend to: an additive mask, or the documents of packed rows, in which attention is causal."""


class Rotation(NamedTuple):
    """cos and sin of the positions in use, each [B, T, R / 2]."""

    cos: Tensor
    sin: Tensor


class LayerCache(Protocol):
    """Latents of one layer. `append` stores [B, T, C + R] and returns all [B, S, C + R] that the mask refers to."""

    def append(self, latents: Tensor) -> Tensor: ...


class RotaryTable(nn.Module):
    """cos and sin by position, computed once in float64."""

    cos: Tensor
    sin: Tensor

    def __init__(self, architecture: ModelSection):
        super().__init__()
        positions = torch.arange(architecture.max_position_embeddings, dtype=torch.float64)
        angles = positions[:, None] * torch.tensor(rope_inverse_frequencies(architecture), dtype=torch.float64)
        amplitude = rope_amplitude(architecture)
        self.register_buffer("cos", (angles.cos() * amplitude).to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", (angles.sin() * amplitude).to(torch.get_default_dtype()), persistent=False)

    def forward(self, positions: Tensor) -> Rotation:
        return Rotation(self.cos[positions], self.sin[positions])


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn interleaved pairs of the last dimension of x [B, T, ..., R], the layout of DeepSeek's published weights."""
    shape = (*rotation.cos.shape[:2], *(1,) * (x.dim() - 3), rotation.cos.shape[-1])
    cos, sin = rotation.cos.view(shape), rotation.sin.view(shape)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in fp32 at least."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


class LatentAttention(nn.Module):
    """MLA with the published parameter names. Without a cache it runs the naive form, with one the absorbed form."""

    def __init__(self, architecture: DeepseekSection):
        super().__init__()
        a = architecture
        self.num_heads, self.nope, self.rope = a.num_attention_heads, a.qk_nope_head_dim, a.qk_rope_head_dim
        self.v_dim, self.rank = a.v_head_dim, a.kv_lora_rank
        self.scale = softmax_scale(a)
        q_size = self.num_heads * (self.nope + self.rope)
        if a.q_lora_rank is None:
            self.q_proj = nn.Linear(a.hidden_size, q_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(a.hidden_size, a.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(a.q_lora_rank, a.rms_norm_eps)
            self.q_b_proj = nn.Linear(a.q_lora_rank, q_size, bias=False)
        self.compressed_q = a.q_lora_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(a.hidden_size, self.rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.rank, a.rms_norm_eps)
        self.kv_b_proj = nn.Linear(self.rank, self.num_heads * (self.nope + self.v_dim), bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.v_dim, a.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, cache: LayerCache | None = None) -> Tensor:
        """x [B, T, D]; mask additive, broadcastable to [B, H, T, S] (S = T without a cache), or documents.

        Returns [B, T, D].
        """
        q_nope, q_rope = self.queries(x, rotation)
        latents = self.latents(x, rotation)
        if cache is None:
            context = self._naive(q_nope, q_rope, latents, mask)
        else:
            assert isinstance(mask, Tensor), "with a cache the mask is a tensor"
            context = self._absorbed(q_nope, q_rope, cache.append(latents), mask)
        return self.o_proj(context.flatten(-2))

    def latents(self, x: Tensor, rotation: Rotation) -> Tensor:
        """What the cache stores for x [B, T, D]: [B, T, C + R]."""
        latent, key = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], dim=-1)
        return torch.cat((self.kv_a_layernorm(latent), rotate(key, rotation)), dim=-1)

    def queries(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Without and with rotation, [B, T, H, N] and [B, T, H, R], of x [B, T, D]."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compressed_q else self.q_proj(x)
        q_nope, q_rope = q.unflatten(-1, (self.num_heads, -1)).split([self.nope, self.rope], dim=-1)
        return q_nope, rotate(q_rope, rotation)

    def _naive(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, mask: Mask) -> Tensor:
        latent, key_rope = latents.split([self.rank, self.rope], dim=-1)
        k_nope, value = (
            self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1)).split([self.nope, self.v_dim], dim=-1)
        )
        query = torch.cat((q_nope, q_rope), dim=-1)
        key = torch.cat((k_nope, key_rope.unsqueeze(2).expand(-1, -1, self.num_heads, -1)), dim=-1)
        return attend(query, key, value, mask, self.scale)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, mask: Tensor) -> Tensor:
        up_key, up_value = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1)).split(
            [self.nope, self.v_dim], dim=1
        )
        in_latent_space = torch.einsum("bthn,hnc->bthc", q_nope, up_key)
        query = torch.cat((in_latent_space, q_rope), dim=-1)
        batch, new = query.shape[:2]
        scores = query.reshape(batch, new * self.num_heads, -1) @ latents.transpose(1, 2)
        scores = scores.view(batch, new, self.num_heads, -1).transpose(1, 2)
        weights = _attention_weights(scores, self.scale, mask).transpose(1, 2)
        context = weights.reshape(batch, new * self.num_heads, -1) @ latents[..., : self.rank]
        return torch.einsum("bthc,hvc->bthv", context.view(batch, new, self.num_heads, -1), up_value)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Tensor:
    """Attention of whole rows: query and key [B, T, H, Q], value [B, T, H, V] give [B, T, H, V]."""
    if isinstance(mask, Documents):
        return mask.attend(query, key, value, scale)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return attention(query, key, value, mask, scale).transpose(1, 2)


def _attention_weights(scores: Tensor, scale: float, mask: Tensor) -> Tensor:
    wide = torch.promote_types(scores.dtype, torch.float32)
    return F.softmax(torch.add(mask, scores, alpha=scale).to(wide), dim=-1).to(scores.dtype)
