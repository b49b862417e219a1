"""Small architectures that have every part of the large one."""

from __future__ import annotations

import torch

from isthmus.model.attention import attend_entries
from isthmus.model.model import causal_mask
from isthmus.recipe.architecture import DeepseekSection

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 128,
    "rope_theta": 100.0,
    "initializer_range": 0.2,
}
TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "rope_theta": 100.0,
    "initializer_range": 0.2,
}


def architecture(**changes) -> DeepseekSection:
    """Three layers, eight experts in four groups."""
    return DeepseekSection(**{**SMALL, **changes})


def tiny_architecture(**changes) -> DeepseekSection:
    """Two layers, four experts."""
    return DeepseekSection(**{**TINY, **changes})


class GrowingCache:
    """The simplest cache: all entries so far, and a causal mask."""

    def __init__(self):
        self.entries = None

    def attend(self, query, entries, layout, scale):
        self.entries = entries if self.entries is None else torch.cat((self.entries, entries), dim=1)
        new, seen = entries.shape[1], self.entries.shape[1]
        mask = causal_mask(seen).to(entries.dtype)[0, :, seen - new :].transpose(0, 1)[None]
        return attend_entries(query, self.entries, mask, layout, scale)


VLLM_DEEPSEEK = DeepseekSection(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    initializer_range=0.1,
)
"""Experts and latent attention in sizes that vLLM's CPU kernels have: heads of 32, multiples of 32 elsewhere."""
