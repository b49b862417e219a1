"""Small dense architectures, and the same ones in transformers."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from isthmus.model.config import hf_config
from isthmus.model.model import Model
from isthmus.recipe.architecture import DenseSection

LLAMA3_ROPE = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
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


def dense_architecture(model_type: str = "qwen2", **changes) -> DenseSection:
    """Two layers, four query heads on two key/value heads."""
    return DenseSection(model_type=model_type, **{**SMALL, **changes})


def randomised(architecture: DenseSection, seed: int) -> Model:
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
    assert isinstance(architecture, DenseSection)
    fields = hf_config(architecture, dtype="float32", eos_token_id=1, bos_token_id=0)
    kind = Qwen2Config if architecture.model_type == "qwen2" else LlamaConfig
    config = kind(**{key: value for key, value in fields.items() if key not in ("model_type", "rope_scaling")})
    other = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    other.load_state_dict(model.state_dict(), strict=True)
    return other.eval()
