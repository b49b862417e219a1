"""Exact counts: of random architectures against the model, of DeepSeek-V3 against what was published."""

from __future__ import annotations

import json
import resource
import time
import tomllib
from importlib import resources
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.forecast.count import count_parameters
from isthmus.model.model import Model
from isthmus.recipe.architecture import DeepseekSection, architecture_from_config
from tests.support.small import architecture

# DeepSeek-V3's dimensions (its config.json), written out here so that no code of ours is asked.
LAYERS, DENSE, HIDDEN, VOCABULARY = 61, 3, 7168, 129_280
HEADS, NOPE, ROPE, VALUE, Q_RANK, KV_RANK = 128, 128, 64, 128, 1536, 512
ATTENTION = (
    HIDDEN * Q_RANK
    + Q_RANK * HEADS * (NOPE + ROPE)
    + HIDDEN * (KV_RANK + ROPE)
    + KV_RANK * HEADS * (NOPE + VALUE)
    + HEADS * VALUE * HIDDEN
)
EXPERT, DENSE_MLP, ROUTER = 3 * HIDDEN * 2048, 3 * HIDDEN * 18_432, 256 * HIDDEN
NORMS = 2 * HIDDEN + Q_RANK + KV_RANK
OUTSIDE_ROUTED = LAYERS * (ATTENTION + NORMS) + DENSE * DENSE_MLP + (LAYERS - DENSE) * (ROUTER + EXPERT) + HIDDEN
MAIN = 2 * VOCABULARY * HIDDEN + OUTSIDE_ROUTED + (LAYERS - DENSE) * 256 * EXPERT
ACTIVE = 2 * VOCABULARY * HIDDEN + OUTSIDE_ROUTED + (LAYERS - DENSE) * 8 * EXPERT
MTP = ATTENTION + NORMS + ROUTER + 257 * EXPERT + 2 * HIDDEN * HIDDEN + 3 * HIDDEN

# The safetensors metadata of deepseek-ai/DeepSeek-V3 (and of DeepSeek-R1) on the Hugging Face hub.
PUBLISHED_BF16, PUBLISHED_FP8, PUBLISHED_FP32 = 3_918_786_560, 680_571_043_840, 41_555_600

PUBLISHED_CONFIG = """
{"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 0,
 "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
 "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
 "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
 "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8,
 "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
 "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3",
 "quant_method": "fp8", "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32,
 "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
 "type": "yarn"}, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
 "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
 "transformers_version": "4.46.3", "use_cache": true, "v_head_dim": 128, "vocab_size": 129280}
"""  # deepseek-ai/DeepSeek-V3, config.json without auto_map


def preset(name: str) -> DeepseekSection:
    text = (resources.files("isthmus.presets") / f"{name}.toml").read_text(encoding="utf-8")
    return DeepseekSection(**tomllib.loads(text))


def on_meta(arch: DeepseekSection) -> Model:
    with torch.device("meta"):
        return Model(arch)


@pytest.fixture(scope="module")
def deepseek_v3() -> Model:
    return on_meta(preset("deepseek-v3"))


def test_deepseek_v3_counts_are_those_of_its_dimensions():
    count = count_parameters(preset("deepseek-v3"))
    assert (count.main, count.active, count.mtp) == (MAIN, ACTIVE, MTP)
    assert (MAIN, ACTIVE, MTP) == (671_026_404_352, 37_552_282_624, 11_610_067_968)
    assert round(MAIN / 1e9) == 671 and round((ACTIVE - VOCABULARY * HIDDEN) / 1e9, 1) == 36.6  # README_WEIGHTS.md


def test_the_preset_is_the_published_config_with_the_range_of_the_report():
    published = architecture_from_config(json.loads(PUBLISHED_CONFIG))
    assert preset("deepseek-v3") == DeepseekSection(**{**published, "initializer_range": 0.006})


def test_deepseek_v3_builds_without_memory_in_seconds():
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    model = on_meta(preset("deepseek-v3"))
    assert time.perf_counter() - start < 20
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 512, "MiB of memory"
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert sum(weight.numel() for weight in model.parameters()) == MAIN + MTP


def test_deepseek_v3_has_every_tensor_of_the_published_checkpoint(deepseek_v3: Model):
    """The published files hold matrices in fp8 with a scale per 128x128 block, and embedding and head twice."""
    bf16 = fp8 = fp32 = 0
    for name, tensor in deepseek_v3.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            fp32 += tensor.numel()
        elif tensor.dim() == 1 or name.endswith(("gate.weight", "eh_proj.weight")):
            bf16 += tensor.numel()
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            bf16 += 2 * tensor.numel()
        else:
            fp8 += tensor.numel()
            fp32 += ceil(tensor.shape[0] / 128) * ceil(tensor.shape[1] / 128)
    assert (bf16, fp8, fp32) == (PUBLISHED_BF16, PUBLISHED_FP8, PUBLISHED_FP32)
    assert bf16 + fp8 == MAIN + MTP + 2 * VOCABULARY * HIDDEN


@pytest.mark.parametrize(
    ("name", "total", "active"), [("r-100m", 95_762_240, 26_962_944), ("r-1b", 1_059_288_064, 219_241_984)]
)
def test_presets_have_the_size_they_are_named_after(name: str, total: int, active: int):
    arch = preset(name)
    count = count_parameters(arch)
    assert (count.total, count.active) == (total, active)
    assert sum(weight.numel() for weight in on_meta(arch).parameters()) == total


@st.composite
def architectures(draw: st.DrawFn) -> DeepseekSection:
    n_group, size, layers = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    topk_group = draw(st.integers(1, n_group))
    return architecture(
        vocab_size=draw(st.integers(1, 50)),
        hidden_size=draw(st.integers(1, 20)),
        intermediate_size=draw(st.integers(1, 20)),
        moe_intermediate_size=draw(st.integers(1, 20)),
        num_hidden_layers=layers,
        num_attention_heads=draw(st.integers(1, 5)),
        q_lora_rank=draw(st.none() | st.integers(1, 9)),
        kv_lora_rank=draw(st.integers(1, 9)),
        qk_nope_head_dim=draw(st.integers(1, 9)),
        qk_rope_head_dim=2 * draw(st.integers(1, 4)),
        v_head_dim=draw(st.integers(1, 9)),
        n_routed_experts=n_group * size,
        n_shared_experts=draw(st.integers(1, 3)),
        num_experts_per_tok=draw(st.integers(1, topk_group * size)),
        n_group=n_group,
        topk_group=topk_group,
        first_k_dense_replace=draw(st.integers(0, layers)),
        num_nextn_predict_layers=draw(st.integers(0, 1)),
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=40, derandomize=True, deadline=None)
@given(architectures())
def test_counts_are_those_of_the_model(arch: DeepseekSection):
    model, count = on_meta(arch), count_parameters(arch)
    mtp_prefix = f"model.layers.{arch.num_hidden_layers}."
    sizes = {name: weight.numel() for name, weight in model.named_parameters()}
    of_mtp = sum(size for name, size in sizes.items() if name.startswith(mtp_prefix))
    assert (count.mtp, count.main) == (of_mtp, sum(sizes.values()) - of_mtp)
    routed = {name: size for name, size in sizes.items() if ".experts." in name and not name.startswith(mtp_prefix)}
    assert count.routed_experts == sum(routed.values())
    unused = arch.n_routed_experts - arch.num_experts_per_tok
    assert count.main - count.active == sum(routed.values()) // arch.n_routed_experts * unused
