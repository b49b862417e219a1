"""Small architectures with grouped-query attention, one per family and kind, and the same ones in transformers."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from isthmus.model.config import hf_config
from isthmus.model.model import Model
from isthmus.recipe.architecture import DenseSection, GroupedSection, Qwen3MoeSection
from tests.support.against_transformers import to_transformers_layout

LLAMA3_ROPE = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"type": "linear", "factor": 3.0}
DYNAMIC_ROPE = {"type": "dynamic", "factor": 2.0}
YARN_ROPE = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SMALL = {
    "vocab_size": 89,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 500.0,
    "initializer_range": 0.2,
}


EXPERTS = {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 2}


def dense_architecture(model_type: str = "qwen2", **changes) -> DenseSection:
    """Two layers, four query heads on two key/value heads."""
    return DenseSection(model_type=model_type, **{**SMALL, **changes})


def qwen3_moe_architecture(**changes) -> Qwen3MoeSection:
    """The same with six experts, of which a token goes to two."""
    return Qwen3MoeSection(model_type="qwen3_moe", **{**SMALL, **EXPERTS, **changes})


FAMILIES: dict[str, GroupedSection] = {
    "qwen3": dense_architecture("qwen3", head_dim=12),
    "mistral": dense_architecture("mistral", sliding_window=5),
    "qwen2 with windows": dense_architecture(
        "qwen2", sliding_window=7, layer_types=["full_attention", "sliding_attention"], rope_scaling=YARN_ROPE
    ),
    "qwen3_moe": qwen3_moe_architecture(head_dim=12, norm_topk_prob=True),
    "qwen3_moe with a dense layer": qwen3_moe_architecture(mlp_only_layers=[0], sliding_window=6),
}
"""What is tested wherever qwen2 and llama are, which have neither windows nor norms on heads nor experts."""


def randomised(architecture: GroupedSection, seed: int) -> Model:
    """A model in which no bias is zero and no norm is one."""
    model = Model(architecture).initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def theirs(model: Model) -> PreTrainedModel:
    """transformers' model with the same configuration and the same weights, in fp32, loaded strictly."""
    architecture = model.architecture
    assert isinstance(architecture, GroupedSection)
    fields = hf_config(architecture, dtype="float32", eos_token_id=1, bos_token_id=0)
    given = {key: value for key, value in fields.items() if key not in ("model_type", "rope_scaling")}
    config = AutoConfig.for_model(architecture.model_type, **given)
    # The other implementations of experts want sizes of multiples of 16 bytes.
    other = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    other.load_state_dict(to_transformers_layout(model.state_dict(), other), strict=True)
    return other.eval()
