"""A deepseek_v3 bundle in fp32 as a GGUF file for llama.cpp (architecture `deepseek2`).

    python benchmarks/rivals/gguf_export.py BUNDLE MODEL.gguf

It needs gguf, safetensors and numpy alone, so it runs beside llama-cpp-python. Keys, tensor names and the split of
kv_b_proj are those of llama.cpp's own `conversion/deepseek.py` (the copy inside llama-cpp-python 0.3.36), which also
wants a pre-tokenizer it knows; here the vocabulary is left out, and prompts are token ids. A model without the low-rank
query writes `q_lora_rank = 0`, for which llama.cpp takes the single matrix. The MTP layer is left out, as there.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, ExpertGatingFuncType, GGUFWriter, TensorNameMap, get_tensor_name_map
from safetensors.numpy import load_file

ARCHITECTURE = "deepseek2"
Tensors = dict[str, np.ndarray]


def export_gguf(bundle: Path, target: Path) -> None:
    """Write `target`. Raises SystemExit for what llama.cpp's deepseek2 has no place for."""
    config = json.loads((bundle / "config.json").read_text())
    if config["model_type"] != "deepseek_v3" or config["torch_dtype"] != "float32" or config["rope_scaling"]:
        raise SystemExit(f"{bundle}: only deepseek_v3 in fp32 without scaled positions is converted")
    tensors: Tensors = {}
    for file in sorted(bundle.glob("*.safetensors")):
        tensors |= load_file(file)
    layers = config["num_hidden_layers"]
    writer = GGUFWriter(target, ARCHITECTURE)
    _write_keys(writer, config)
    names = get_tensor_name_map(MODEL_ARCH.DEEPSEEK2, layers)
    for name, tensor in _for_llama(tensors, config).items():
        if _layer(name) < layers:
            writer.add_tensor(_gguf_name(names, name), np.ascontiguousarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_keys(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    # The absorbed form of latent attention has one head of keys for all heads of queries.
    writer.add_head_count_kv(1)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_q_lora_rank(config["q_lora_rank"] or 0)
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
    writer.add_value_length(config["kv_lora_rank"])
    writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    gating = {"sigmoid": ExpertGatingFuncType.SIGMOID, "softmax": ExpertGatingFuncType.SOFTMAX}
    writer.add_expert_gating_func(gating[config["scoring_func"]])
    writer.add_tokenizer_model("none")


def _for_llama(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Experts stacked to [experts, out, in]; kv_b_proj split into k_b [heads, latent, nope], v_b [heads, v, latent]."""
    found: Tensors = {}
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        expert = re.fullmatch(r"(.*\.mlp\.experts)\.(\d+)\.(.*)", name)
        if expert:
            experts.setdefault(f"{expert[1]}.{expert[3]}", {})[int(expert[2])] = tensor
        elif name.endswith("kv_b_proj.weight"):
            heads = tensor.reshape(config["num_attention_heads"], -1, config["kv_lora_rank"])
            nope, value = np.split(heads, [config["qk_nope_head_dim"]], axis=1)
            found[name.replace("kv_b_proj", "k_b_proj")] = nope.transpose(0, 2, 1)
            found[name.replace("kv_b_proj", "v_b_proj")] = value
        else:
            found[name.replace("e_score_correction_bias", "e_score_correction.bias")] = tensor
    for name, parts in experts.items():
        found[name] = np.stack([parts[index] for index in range(config["n_routed_experts"])])
    return found


def _layer(name: str) -> int:
    """The layer of a tensor, -1 for those outside of the layers."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _gguf_name(names: TensorNameMap, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise SystemExit(f"llama.cpp's {ARCHITECTURE} has no tensor for {name}")
    return found


if __name__ == "__main__":
    export_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
