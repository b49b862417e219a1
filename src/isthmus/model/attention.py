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
from isthmus.model.documents import Documents, attention, beyond
from isthmus.recipe.architecture import DeepseekSection, ModelSection

Mask = Tensor | Documents
"""What a token may attend to: an additive mask, or the documents of packed rows, in which attention is causal."""


class Rotation(NamedTuple):
    """cos and sin of the positions in use, each [B, T, R / 2]."""

    cos: Tensor
    sin: Tensor


class EntryLayout(NamedTuple):
    """What a cache keeps per token: K key/value heads share an entry of `width` numbers.

    Head k has its key at `k * key_size` and its value at `value_start + k * value_size`. With a `window` a token looks
    at so many entries, its own included; without one at all before it.
    """

    heads: int
    width: int
    key_size: int
    value_start: int
    value_size: int
    window: int | None = None


class LayerCache(Protocol):
    """The entries of one layer: it knows which tokens are new, and what each may look at."""

    def attend(self, query: Tensor, entries: Tensor, layout: EntryLayout, scale: float) -> Tensor:
        """Store entries [B, T, W] of new tokens; query [B, T, H, key_size] looks at its own and at earlier ones.

        Returns [B, T, H, value_size].
        """
        ...


def attend_entries(query: Tensor, entries: Tensor, mask: Tensor, layout: EntryLayout, scale: float) -> Tensor:
    """Attention of query [B, T, H, key_size] over entries [B, S, W]; additive causal mask [B or 1, T, 1, S].

    The last entry that the mask shows a token is its own, from which a window counts. H / K query heads in a row share
    a key/value head. Products of views: no head is copied. Returns [B, T, H, value_size].
    """
    if layout.window is not None:
        own = torch.isfinite(mask).sum(-1, keepdim=True) - 1
        mask = mask.masked_fill(torch.arange(mask.shape[-1], device=mask.device) <= own - layout.window, float("-inf"))
    groups = query.chunk(layout.heads, dim=2)
    contexts = []
    for head, group in enumerate(groups):
        first, value_first = head * layout.key_size, layout.value_start + head * layout.value_size
        key = entries[..., first : first + layout.key_size]
        value = entries[..., value_first : value_first + layout.value_size]
        batch, new, heads, _ = group.shape
        scores = torch.bmm(group.flatten(1, 2), key.transpose(1, 2)).view(batch, new, heads, -1)
        wide = torch.promote_types(scores.dtype, torch.float32)
        weights = F.softmax(torch.add(mask, scores, alpha=scale).to(wide), dim=-1).to(scores.dtype)
        contexts.append(torch.bmm(weights.flatten(1, 2), value).view(batch, new, heads, -1))
    return contexts[0] if len(contexts) == 1 else torch.cat(contexts, dim=2)


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
        self.layout = EntryLayout(1, self.rank + self.rope, self.rank + self.rope, 0, self.rank)
        self.kv_a_proj_with_mqa = nn.Linear(a.hidden_size, self.rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.rank, a.rms_norm_eps)
        self.kv_b_proj = nn.Linear(self.rank, self.num_heads * (self.nope + self.v_dim), bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.v_dim, a.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, mask: Mask | None, cache: LayerCache | None = None) -> Tensor:
        """x [B, T, D]; mask additive, broadcastable to [B, H, T, T], or documents; a cache takes its place.

        Returns [B, T, D].
        """
        q_nope, q_rope, latents = self.project(x, rotation)
        if cache is None:
            assert mask is not None
            context = self.naive(q_nope, q_rope, latents, mask)
        else:
            context = self.absorbed(q_nope, q_rope, latents, cache)
        return self.o_proj(context.flatten(-2))

    def project(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries without and with rotation, [B, T, H, N] and [B, T, H, R], and latents [B, T, C + R]."""
        return *self.queries(x, rotation), self.latents(x, rotation)

    def latents(self, x: Tensor, rotation: Rotation) -> Tensor:
        """What the cache stores for x [B, T, D]: [B, T, C + R]."""
        latent, key = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], dim=-1)
        return torch.cat((self.kv_a_layernorm(latent), rotate(key, rotation)), dim=-1)

    def queries(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Without and with rotation, [B, T, H, N] and [B, T, H, R], of x [B, T, D]."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.compressed_q else self.q_proj(x)
        q_nope, q_rope = q.unflatten(-1, (self.num_heads, -1)).split([self.nope, self.rope], dim=-1)
        return q_nope, rotate(q_rope, rotation)

    def naive(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, mask: Mask) -> Tensor:
        """Whole rows, with the keys and values of each head: [B, T, H, V]."""
        latent, key_rope = latents.split([self.rank, self.rope], dim=-1)
        k_nope, value = (
            self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1)).split([self.nope, self.v_dim], dim=-1)
        )
        query = torch.cat((q_nope, q_rope), dim=-1)
        key = torch.cat((k_nope, key_rope.unsqueeze(2).expand(-1, -1, self.num_heads, -1)), dim=-1)
        return attend(query, key, value, mask, self.scale)

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, cache: LayerCache) -> Tensor:
        """In latent space, over what the cache holds: [B, T, H, V]."""
        up_key, up_value = (part.to(q_nope.dtype) for part in self.up_projections())
        in_latent_space = by_head(q_nope, up_key)
        context = cache.attend(torch.cat((in_latent_space, q_rope), dim=-1), latents, self.layout, self.scale)
        return by_head(context, up_value)

    def up_projections(self) -> tuple[Tensor, Tensor]:
        """Matrices of the absorbed form, by head: queries into latent space [H, N, C], contexts out of it [H, C, V]."""
        up = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        up_key, up_value = up.split([self.nope, self.v_dim], dim=1)
        return up_key, up_value.transpose(1, 2)


def by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T, H, K] times weight [H, K, L], head by head: [B, T, H, L]."""
    batch = x.shape[:2]
    return torch.bmm(x.flatten(0, 1).transpose(0, 1), weight).transpose(0, 1).unflatten(0, batch)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, window: int | None = None) -> Tensor:
    """Attention of whole rows: query and key [B, T, H, Q], value [B, T, H, V] give [B, T, H, V].

    With a `window` a token looks at so many tokens, itself included, of those that the mask shows.
    """
    if isinstance(mask, Documents):
        return mask.attend(query, key, value, scale, window)
    if window is not None and window < query.shape[1]:
        mask = mask.masked_fill(beyond(window, query.shape[1], mask.device), float("-inf"))
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return attention(query, key, value, mask, scale).transpose(1, 2)
