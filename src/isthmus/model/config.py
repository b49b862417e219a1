"""The architecture as other software reads it, a Hugging Face `config.json`, and what follows from its numbers."""

from __future__ import annotations

import math
from typing import Any

from isthmus.recipe.architecture import (
    BIASED_BY_KEY,
    DeepseekSection,
    GroupedSection,
    LinearScaling,
    Llama3Scaling,
    ModelSection,
    PlainYarnScaling,
    YarnScaling,
)

_CLASSES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}


def hf_config(
    architecture: ModelSection, *, dtype: str, eos_token_id: int | list[int], bos_token_id: int | None
) -> dict[str, Any]:
    """The `config.json` that transformers, vLLM and SGLang read for this architecture."""
    assert isinstance(architecture, DeepseekSection | GroupedSection)
    left_out = {"preset", "from_", "rope_scaling"}
    if isinstance(architecture, GroupedSection):
        left_out |= {"num_nextn_predict_layers", "attention_bias", "sliding_window", "layer_types"}
    left_out |= {"swiglu_limit"} if getattr(architecture, "swiglu_limit", None) is None else set()
    fields = architecture.model_dump(mode="json", exclude=left_out)
    rope = architecture.rope_scaling
    rope_parameters: dict[str, Any] = {"rope_theta": architecture.rope_theta, "rope_type": "default"}
    scaling = {} if rope is None else rope.model_dump(exclude_none=True)
    if rope is not None:
        rope_parameters |= {key: value for key, value in scaling.items() if key != "type"} | {"rope_type": rope.type}
    own = _deepseek_fields(architecture) if isinstance(architecture, DeepseekSection) else _grouped_fields(architecture)
    return {
        "architectures": [_CLASSES[architecture.model_type]],
        **fields,
        "rope_scaling": {**scaling, "rope_type": rope.type} if rope else None,
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


def _grouped_fields(architecture: GroupedSection) -> dict[str, Any]:
    """Biases and windows, of which each family has its own keys."""
    a = architecture
    fields: dict[str, Any] = {"head_dim": a.head_size}
    if a.model_type == "qwen2" or a.model_type in BIASED_BY_KEY:
        fields["attention_bias"] = a.input_bias
    if a.model_type == "llama":
        return {**fields, "mlp_bias": False}
    if a.model_type == "mistral":
        return {**fields, "sliding_window": a.sliding_window}
    windowed = [a.window_of(index) is not None for index in range(a.num_hidden_layers)]
    fields["use_sliding_window"] = any(windowed)
    if not any(windowed):
        return fields
    fields |= {"sliding_window": a.sliding_window}
    if a.model_type == "qwen3_moe":
        return fields
    types = ["sliding_attention" if window else "full_attention" for window in windowed]
    return {**fields, "layer_types": types, "max_window_layers": windowed.index(True)}


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
    """Inverse frequencies of the rotated pairs of a head, scaled as the recipe says.

    Dynamic scaling leaves them as they are up to max_position_embeddings, the longest sequence here.
    """
    assert isinstance(architecture, DeepseekSection | GroupedSection)
    dim, theta, rope = architecture.rotary_size, architecture.rope_theta, architecture.rope_scaling
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    if isinstance(rope, YarnScaling | PlainYarnScaling):
        return _yarn_frequencies(plain, dim, theta, rope)
    if isinstance(rope, Llama3Scaling):
        return [_llama3_frequency(frequency, rope) for frequency in plain]
    return [frequency / rope.factor for frequency in plain] if isinstance(rope, LinearScaling) else plain


def rope_amplitude(architecture: ModelSection) -> float:
    """Factor on cos and sin: 1 but under YaRN.

    There DeepSeek has the growth of mscale over that of mscale_all_dim, which is 1 if they are equal. The other
    families have `attention_factor`, or that ratio if both keys stand, or the growth of the factor alone.
    """
    rope = getattr(architecture, "rope_scaling", None)
    if isinstance(rope, PlainYarnScaling):
        if rope.attention_factor is not None:
            return rope.attention_factor
        if not rope.mscale or not rope.mscale_all_dim:
            return yarn_mscale(rope.factor, 1.0)
    elif not isinstance(rope, YarnScaling):
        return 1.0
    assert rope.mscale is not None and rope.mscale_all_dim is not None
    return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)


def _yarn_frequencies(plain: list[float], dim: int, theta: float, rope: YarnScaling | PlainYarnScaling) -> list[float]:
    """Frequencies that turn often in the original context stay, slow ones are divided by the factor, others blended."""

    def correction_dim(rotations: float) -> float:
        return dim * math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = correction_dim(rope.beta_fast), correction_dim(rope.beta_slow)
    if isinstance(rope, YarnScaling) or rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
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
