"""Architectures that hypothesis draws: every part of each kind, in all combinations."""

from __future__ import annotations

from hypothesis import strategies as st

from isthmus.recipe.architecture import DeepseekSection, GroupedSection, YarnScaling
from tests.support.small import architecture
from tests.support.small_dense import (
    DYNAMIC_ROPE,
    LINEAR_ROPE,
    LLAMA3_ROPE,
    dense_architecture,
    qwen3_moe_architecture,
)


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
def rope_scalings(draw: st.DrawFn) -> dict[str, object] | None:
    """Every kind that grouped-query attention has, with the keys that published files give and those that they may."""
    yarn: dict[str, object] = {"type": "yarn", "factor": draw(st.sampled_from([2.0, 4.0, 40.0]))}
    yarn["original_max_position_embeddings"] = draw(st.sampled_from([16, 32, 512]))
    yarn |= draw(
        st.sampled_from(
            [
                {},
                {"beta_fast": 16.0, "beta_slow": 2.0},
                {"attention_factor": 1.3},
                {"mscale": 0.7, "mscale_all_dim": 1.2},
                {"mscale": 0.7},
                {"truncate": False},
            ]
        )
    )
    return draw(st.sampled_from([None, LLAMA3_ROPE, LINEAR_ROPE, DYNAMIC_ROPE, yarn, yarn]))


@st.composite
def dense_architectures(draw: st.DrawFn, model_type: str) -> GroupedSection:
    """Head counts, head sizes, tying, biases, windows, experts and rope scaling of every kind, in all combinations."""
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    head_dim = draw(st.sampled_from([None, 4, 6, 16]))
    heads, layers = kv_heads * group, draw(st.integers(1, 3))
    changes: dict[str, object] = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "hidden_size": heads * draw(st.sampled_from([4, 6, 8])),
        "intermediate_size": draw(st.integers(5, 60)),
        "num_hidden_layers": layers,
        "tie_word_embeddings": draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0, 1e6])),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "rope_scaling": draw(rope_scalings()),
    }
    if model_type in ("llama", "qwen3", "qwen3_moe"):
        changes["attention_bias"] = draw(st.sampled_from([None, False, True]))
    if model_type != "llama":
        changes["sliding_window"] = draw(st.sampled_from([None, 1, 3, 8, 64]))
    if model_type in ("qwen2", "qwen3") and changes["sliding_window"]:
        types = [draw(st.sampled_from(["full_attention", "sliding_attention"])) for _ in range(layers - 1)]
        changes["layer_types"] = draw(st.sampled_from([None, [*types, "sliding_attention"]]))
    if model_type != "qwen3_moe":
        return dense_architecture(model_type, **changes)
    experts = draw(st.integers(1, 6))
    changes |= {
        "moe_intermediate_size": draw(st.integers(3, 20)),
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "norm_topk_prob": draw(st.booleans()),
        "decoder_sparse_step": draw(st.sampled_from([1, 1, layers])),
        "mlp_only_layers": draw(st.sampled_from([[], [0]])) if layers > 1 else [],
    }
    return qwen3_moe_architecture(**changes)
