"""The same deepseek_v3 model in transformers, and its tensors under the published names."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from isthmus.model.config import hf_config
from isthmus.model.model import Model
from isthmus.recipe.architecture import DeepseekSection


def randomised(arch: DeepseekSection, seed: int, lowest_bias: float = 0.0) -> Model:
    """A model whose norms are not one and whose routing biases are uniform in [lowest_bias, lowest_bias + 1]."""
    model = Model(arch).initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
        for router in model.routers():
            bias = router.e_score_correction_bias
            bias.copy_(lowest_bias + torch.rand(bias.shape, generator=generator))
    return model


def in_transformers(model: Model) -> DeepseekV3ForCausalLM:
    """transformers' model with the weights of `model`. It has no multi-token prediction: that layer stays out."""
    arch = model.architecture
    config = DeepseekV3Config(**hf_config(arch, dtype="float32", bos_token_id=0, eos_token_id=1))
    config._attn_implementation = "eager"
    reference = DeepseekV3ForCausalLM(config).eval()
    ours = {key: value for key, value in model.state_dict().items() if not is_mtp(key, arch)}
    reference.load_state_dict(to_transformers_layout(ours, reference), strict=True)
    return reference


def is_mtp(name: str, arch: DeepseekSection) -> bool:
    """Whether a published name belongs to the layer of multi-token prediction."""
    return name.startswith(f"model.layers.{arch.num_hidden_layers}.")


def to_transformers_layout(state: dict[str, Tensor], reference: torch.nn.Module) -> dict[str, Tensor]:
    """transformers 5 stacks experts in memory; its checkpoints on disk keep the published names."""
    stacked = {key: value for key, value in state.items() if ".mlp.experts." not in key}
    for key in reference.state_dict():
        prefix, _, part = key.rpartition(".")
        if part in ("gate_up_proj", "down_proj") and prefix.endswith("experts"):
            count = sum(1 for name in state if name.startswith(f"{prefix}.") and name.endswith("down_proj.weight"))
            rows = [
                torch.cat((state[f"{prefix}.{i}.gate_proj.weight"], state[f"{prefix}.{i}.up_proj.weight"]))
                if part == "gate_up_proj"
                else state[f"{prefix}.{i}.down_proj.weight"]
                for i in range(count)
            ]
            stacked[key] = torch.stack(rows)
    return stacked


def to_published_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `to_transformers_layout`: a name for each expert's tensors."""
    published = {}
    for key, value in state.items():
        prefix, _, part = key.rpartition(".")
        if prefix.endswith("experts") and part == "gate_up_proj":
            for index, both in enumerate(value):
                gate, up = both.chunk(2)
                published |= {f"{prefix}.{index}.gate_proj.weight": gate, f"{prefix}.{index}.up_proj.weight": up}
        elif prefix.endswith("experts") and part == "down_proj":
            published |= {f"{prefix}.{index}.down_proj.weight": down for index, down in enumerate(value)}
        else:
            published[key] = value
    return published


def transformers_gradients(reference: DeepseekV3ForCausalLM) -> dict[str, Tensor]:
    """Gradients by published name; a tied head is listed once, as the embedding. Unused experts have zeros."""
    gradients = {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in reference.named_parameters()
    }
    return to_published_layout(gradients)


def published_gradients(model: Model) -> dict[str, Tensor]:
    """Gradients of our model by published name, made by the very hooks that name its weights."""
    holder = Model(model.architecture).to(next(model.parameters()).dtype)
    with torch.no_grad():
        for slot, weight in zip(holder.parameters(), model.parameters(), strict=True):
            slot.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    buffers = {name for name, _ in holder.named_buffers()}
    tied = {"lm_head.weight"} if model.architecture.tie_word_embeddings else set()
    return {name: value for name, value in holder.state_dict().items() if name not in buffers | tied}
