"""The architecture as other software reads it, a Hugging Face `config.json`, and what follows from its numbers."""

from __future__ import annotations

import math
from typing import Any

from isthmus.recipe.architecture import DeepseekSection, DenseSection, Llama3Scaling, ModelSection

_CLASSES = {"deepseek_v3": "DeepseekV3ForCausalLM", "qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


def hf_config(
    architecture: ModelSection, *, dtype: str, eos_token_id: int | list[int], bos_token_id: int | None
) -> dict[str, Any]:
    """The `config.json` that transformers, vLLM and SGLang read for this architecture."""
    assert isinstance(architecture, DeepseekSection | DenseSection)
    left_out = {"preset", "from_", "rope_scaling"}
    left_out |= {"num_nextn_predict_layers"} if isinstance(architecture, DenseSection) else set()
    left_out |= {"swiglu_limit"} if getattr(architecture, "swiglu_limit", None) is None else set()
    fields = architecture.model_dump(mode="json", exclude=left_out)
    rope = architecture.rope_scaling
    rope_parameters: dict[str, Any] = {"rope_theta": architecture.rope_theta, "rope_type": "default"}
    if rope is not None:
        rope_parameters |= {**rope.model_dump(exclude={"type"}), "rope_type": rope.type}
    own = _deepseek_fields(architecture) if isinstance(architecture, DeepseekSection) else _dense_fields(architecture)
    return {
        "architectures": [_CLASSES[architecture.model_type]],
        **fields,
        "rope_scaling": {**rope.model_dump(), "rope_type": rope.type} if rope else None,
        "rope_parameters": rope_parameters,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **own,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": dtype,
    }


def _deepseek_fields(architecture: DeepseekSection) -> dict[str, Any]:
    return {
        "rope_interleave": True,
        "head_dim": architecture.qk_rope_head_dim,
        "num_key_value_heads": architecture.num_attention_heads,
        "attention_bias": False,
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "ep_size": 1,
    }


def _dense_fields(architecture: DenseSection) -> dict[str, Any]:
    """Only llama has a choice of biases, and only qwen2 one of attention windows."""
    fields: dict[str, Any] = {"head_dim": architecture.head_size}
    if architecture.model_type == "llama":
        return {**fields, "attention_bias": architecture.output_bias, "mlp_bias": False}
    return {**fields, "attention_bias": True, "use_sliding_window": False}


def softmax_scale(architecture: DeepseekSection) -> float:
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
    """Inverse frequencies of the rotated pairs of a head, scaled as the recipe says."""
    if isinstance(architecture, DenseSection):
        plain = _plain_frequencies(architecture.head_size, architecture.rope_theta)
        rope = architecture.rope_scaling
        return plain if rope is None else [_llama3_frequency(frequency, rope) for frequency in plain]
    assert isinstance(architecture, DeepseekSection)
    return _yarn_frequencies(architecture)


def rope_amplitude(architecture: ModelSection) -> float:
    """Factor on cos and sin: 1 unless YaRN's mscale and mscale_all_dim differ."""
    if not isinstance(architecture, DeepseekSection) or architecture.rope_scaling is None:
        return 1.0
    rope = architecture.rope_scaling
    return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)


def _plain_frequencies(dim: int, theta: float) -> list[float]:
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def _yarn_frequencies(architecture: DeepseekSection) -> list[float]:
    """Inverse frequencies of the qk_rope_head_dim / 2 pairs, YaRN-blended where the recipe scales positions."""
    dim, theta = architecture.qk_rope_head_dim, architecture.rope_theta
    plain = _plain_frequencies(dim, theta)
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


def _llama3_frequency(frequency: float, rope: Llama3Scaling) -> float:
    """Llama 3.1's rule (meta-llama/llama-models `model.py`, apply_scaling): slow waves are stretched by `factor`, fast
    ones are kept, and those between the two are blended by how often they turn in the original context."""
    turns = rope.original_max_position_embeddings * frequency / (2 * math.pi)
    if turns < rope.low_freq_factor:
        return frequency / rope.factor
    if turns > rope.high_freq_factor:
        return frequency
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1.0 - kept) * frequency / rope.factor + kept * frequency
