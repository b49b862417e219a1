"""Architectures that hypothesis draws: every part of each kind, in all combinations."""

from __future__ import annotations

from hypothesis import strategies as st

from isthmus.recipe.architecture import DeepseekSection, DenseSection, YarnScaling
from tests.support.small import architecture
from tests.support.small_dense import LLAMA3_ROPE, dense_architecture


@st.composite
def yarn_scalings(draw: st.DrawFn, all_dim: st.SearchStrategy[float] | None = None) -> YarnScaling:
    tenths = st.integers(4, 15).map(lambda n: n / 10)
    return YarnScaling(
        factor=draw(st.integers(11, 80)) / 10,
        original_max_position_embeddings=draw(st.sampled_from([32, 128, 512])),
        beta_fast=draw(st.sampled_from([8.0, 16.0, 32.0])),
        beta_slow=draw(st.sampled_from([1.0, 2.0])),
        mscale=draw(tenths),
        mscale_all_dim=draw(tenths if all_dim is None else all_dim),
    )


@st.composite
def architectures(draw: st.DrawFn, **fixed: object) -> DeepseekSection:
    n_group, size = draw(st.sampled_from([4, 2, 1])), draw(st.integers(2, 4))
    topk_group = draw(st.integers(1, n_group))
    layers = draw(st.integers(2, 3))
    nope, value, q_rank, kv_rank = draw(st.permutations([6, 8, 10, 14]))
    drawn = {
        "vocab_size": 61,
        "hidden_size": draw(st.sampled_from([16, 24, 32])),
        "intermediate_size": draw(st.sampled_from([20, 36])),
        "moe_intermediate_size": draw(st.sampled_from([8, 12])),
        "num_hidden_layers": layers,
        "num_attention_heads": draw(st.integers(1, 4)),
        "q_lora_rank": draw(st.sampled_from([None, q_rank])),
        "kv_lora_rank": kv_rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": draw(st.sampled_from([2, 4, 12])),
        "v_head_dim": value,
        "n_routed_experts": n_group * size,
        "n_shared_experts": draw(st.integers(1, 2)),
        "num_experts_per_tok": draw(st.integers(1, min(6, topk_group * size))),
        "n_group": n_group,
        "topk_group": topk_group,
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "first_k_dense_replace": draw(st.integers(0, 2)),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0])),
        "rope_scaling": draw(st.none() | yarn_scalings()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    return architecture(**{**drawn, **fixed})


@st.composite
def dense_architectures(draw: st.DrawFn, model_type: str) -> DenseSection:
    """Head counts, head sizes, tying, biases and rope scaling of every kind, in all combinations."""
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([None, 4, 6, 16]))
    heads = kv_heads * group
    changes: dict[str, object] = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "hidden_size": heads * draw(st.sampled_from([2, 4, 8])),
        "intermediate_size": draw(st.integers(5, 60)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0, 1e6])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "rope_scaling": draw(st.sampled_from([None, LLAMA3_ROPE])),
    }
    if model_type == "llama":
        changes["attention_bias"] = draw(st.sampled_from([None, False, True]))
    return dense_architecture(model_type, **changes)
