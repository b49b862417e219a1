"""The architecture as other software reads it: a Hugging Face `config.json` of type deepseek_v3."""

from __future__ import annotations

import math
from typing import Any

from isthmus.recipe import ModelSection


def hf_config(architecture: ModelSection, *, dtype: str, eos_token_id: int, bos_token_id: int) -> dict[str, Any]:
    """The `config.json` that transformers, vLLM and SGLang read for this architecture."""
    fields = architecture.model_dump(mode="json", exclude={"preset", "from_", "rope_scaling"})
    rope = architecture.rope_scaling
    rope_parameters: dict[str, Any] = {"rope_theta": architecture.rope_theta, "rope_type": "default"}
    if rope is not None:
        rope_parameters = {
            **rope.model_dump(exclude={"type"}),
            "rope_theta": architecture.rope_theta,
            "rope_type": "yarn",
        }
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **fields,
        "rope_scaling": rope.model_dump() if rope else None,
        "rope_parameters": rope_parameters,
        "rope_interleave": True,
        "head_dim": architecture.qk_rope_head_dim,
        "num_key_value_heads": architecture.num_attention_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "ep_size": 1,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": dtype,
    }


def softmax_scale(architecture: ModelSection) -> float:
    """Scale of the attention scores: head_dim^-0.5, times mscale^2 under YaRN (DeepSeek-V3 `inference/model.py`)."""
    scale = (architecture.qk_nope_head_dim + architecture.qk_rope_head_dim) ** -0.5
    rope = architecture.rope_scaling
    if rope is None:
        return scale
    return scale * yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature, 0.1 m ln(s) + 1 (arXiv 2309.00071, with DeepSeek's factor m)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def rope_inverse_frequencies(architecture: ModelSection) -> list[float]:
    """Inverse frequencies of the qk_rope_head_dim / 2 rotated pairs, YaRN-blended where the recipe scales positions."""
    dim, theta = architecture.qk_rope_head_dim, architecture.rope_theta
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    rope = architecture.rope_scaling
    if rope is None:
        return plain

    def correction_dim(rotations: float) -> float:
        return dim * math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction_dim(rope.beta_fast)), 0)
    high = min(math.ceil(correction_dim(rope.beta_slow)), dim - 1)
    span = max(high - low, 0.001)
    blended = []
    for i, frequency in enumerate(plain):
        interpolate = min(max((i - low) / span, 0.0), 1.0)
        blended.append(frequency / rope.factor * interpolate + frequency * (1.0 - interpolate))
    return blended


def rope_amplitude(architecture: ModelSection) -> float:
    """Factor on cos and sin: 1 unless YaRN's mscale and mscale_all_dim differ."""
    rope = architecture.rope_scaling
    if rope is None:
        return 1.0
    return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
