"""DeepSeek-V3 written a second time, from its formulas: float64, one head and one token at a time, published names.

It shares no code with the product and is slow on purpose. Autograd goes through it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isthmus.recipe.architecture import DeepseekSection, YarnScaling

Weights = dict[str, Tensor]


def yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def inverse_frequencies(arch: DeepseekSection) -> list[float]:
    """YaRN by the description in its paper (arXiv 2309.00071, 3.2): each pair of dimensions by its wavelength.

    A pair that turns more than beta_fast times within the original length keeps its frequency, one that turns less
    than beta_slow times has it divided by the factor, and between the pairs where that happens, rounded outwards, the
    share changes linearly.
    """
    dim, scaling = arch.qk_rope_head_dim, arch.rope_scaling
    frequencies = [1.0 / arch.rope_theta ** (2 * pair / dim) for pair in range(dim // 2)]
    if scaling is None:
        return frequencies
    first, last = (_pair_that_turns(arch, scaling, turns) for turns in (scaling.beta_fast, scaling.beta_slow))
    first, last = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
    result = []
    for pair, frequency in enumerate(frequencies):
        share = (pair - first) / (last - first) if last > first else float(pair > first)
        share = min(1.0, max(0.0, share))
        result.append((1 - share) * frequency + share * frequency / scaling.factor)
    return result


def _pair_that_turns(arch: DeepseekSection, scaling: YarnScaling, turns: float) -> float:
    """The (fractional) pair whose angle grows by `turns` full turns over the original length."""
    frequency = turns * 2 * math.pi / scaling.original_max_position_embeddings
    return -math.log(frequency) / math.log(arch.rope_theta) * arch.qk_rope_head_dim / 2


def hidden(weights: Weights, arch: DeepseekSection, tokens: Tensor) -> Tensor:
    """States [T, D] of one row of tokens [T] after the last layer, before the final norm."""
    x = weights["model.embed_tokens.weight"][tokens]
    for index in range(arch.num_hidden_layers):
        x = decoder_layer(weights, arch, index, x)
    return x


def logits(weights: Weights, arch: DeepseekSection, tokens: Tensor) -> Tensor:
    states = rms_norm(hidden(weights, arch, tokens), weights["model.norm.weight"], arch)
    return states @ weights["lm_head.weight"].T


def mtp_logits(weights: Weights, arch: DeepseekSection, tokens: Tensor) -> Tensor:
    """Position i holds the prediction of token i + 2 [T - 1, vocab]: from the state of token i and token i + 1."""
    index = arch.num_hidden_layers
    layer = f"model.layers.{index}."
    states = rms_norm(hidden(weights, arch, tokens)[:-1], weights[f"{layer}hnorm.weight"], arch)
    following = rms_norm(weights["model.embed_tokens.weight"][tokens[1:]], weights[f"{layer}enorm.weight"], arch)
    both = weights[f"{layer}eh_proj.weight"]
    x = following @ both[:, : arch.hidden_size].T + states @ both[:, arch.hidden_size :].T
    x = decoder_layer(weights, arch, index, x)
    return rms_norm(x, weights[f"{layer}shared_head.norm.weight"], arch) @ weights["lm_head.weight"].T


def decoder_layer(weights: Weights, arch: DeepseekSection, index: int, x: Tensor) -> Tensor:
    layer = f"model.layers.{index}."
    x = x + attention(weights, arch, f"{layer}self_attn.", rms_norm(x, weights[f"{layer}input_layernorm.weight"], arch))
    normed = rms_norm(x, weights[f"{layer}post_attention_layernorm.weight"], arch)
    if index < arch.first_k_dense_replace:
        return x + gated_mlp(weights, f"{layer}mlp.", normed, arch.swiglu_limit)
    return x + torch.stack([mixture(weights, arch, f"{layer}mlp.", token) for token in normed])


def rms_norm(x: Tensor, weight: Tensor, arch: DeepseekSection) -> Tensor:
    return weight * x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + arch.rms_norm_eps).sqrt()


def gated_mlp(weights: Weights, prefix: str, x: Tensor, limit: float | None) -> Tensor:
    gate, up = x @ weights[f"{prefix}gate_proj.weight"].T, x @ weights[f"{prefix}up_proj.weight"].T
    if limit is not None:
        gate = torch.where(gate > limit, limit, gate)
        up = torch.where(up.abs() > limit, limit * up.sign(), up)
    return (gate / (1 + (-gate).exp()) * up) @ weights[f"{prefix}down_proj.weight"].T


def attention(weights: Weights, arch: DeepseekSection, prefix: str, x: Tensor) -> Tensor:
    nope, rope, value = arch.qk_nope_head_dim, arch.qk_rope_head_dim, arch.v_head_dim
    if arch.q_lora_rank is None:
        queries = x @ weights[f"{prefix}q_proj.weight"].T
    else:
        compressed = x @ weights[f"{prefix}q_a_proj.weight"].T
        queries = (
            rms_norm(compressed, weights[f"{prefix}q_a_layernorm.weight"], arch) @ weights[f"{prefix}q_b_proj.weight"].T
        )
    down = x @ weights[f"{prefix}kv_a_proj_with_mqa.weight"].T
    latent = rms_norm(down[:, : arch.kv_lora_rank], weights[f"{prefix}kv_a_layernorm.weight"], arch)
    shared_key = rotate(arch, down[:, arch.kv_lora_rank :])
    up = latent @ weights[f"{prefix}kv_b_proj.weight"].T
    heads = []
    for head in range(arch.num_attention_heads):
        query = queries[:, head * (nope + rope) : (head + 1) * (nope + rope)]
        key_value = up[:, head * (nope + value) : (head + 1) * (nope + value)]
        query = torch.cat((query[:, :nope], rotate(arch, query[:, nope:])), dim=1)
        key = torch.cat((key_value[:, :nope], shared_key), dim=1)
        heads.append(one_head(arch, query, key, key_value[:, nope:]))
    return torch.cat(heads, dim=1) @ weights[f"{prefix}o_proj.weight"].T


def one_head(arch: DeepseekSection, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each token attends to itself and to the tokens before it."""
    scale = 1 / math.sqrt(arch.qk_nope_head_dim + arch.qk_rope_head_dim)
    if arch.rope_scaling is not None:
        scale *= yarn_mscale(arch.rope_scaling.factor, arch.rope_scaling.mscale_all_dim) ** 2
    rows = []
    for t in range(len(query)):
        exponent = scale * (key[: t + 1] @ query[t])
        share = (exponent - exponent.max()).exp()
        rows.append((share / share.sum()) @ value[: t + 1])
    return torch.stack(rows)


def rotate(arch: DeepseekSection, x: Tensor) -> Tensor:
    """Neighbouring numbers of x [T, rope] are a complex number, turned by position times frequency."""
    amplitude, scaling = 1.0, arch.rope_scaling
    if scaling is not None:
        amplitude = yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(scaling.factor, scaling.mscale_all_dim)
    frequencies = torch.tensor(inverse_frequencies(arch), dtype=torch.float64)
    angles = torch.arange(len(x), dtype=torch.float64)[:, None] * frequencies
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
        torch.full_like(angles, amplitude), angles
    )
    return torch.view_as_real(turned).flatten(-2)


def mixture(weights: Weights, arch: DeepseekSection, prefix: str, token: Tensor) -> Tensor:
    """The shared experts and the chosen experts of one token [D]."""
    affinities = scores(arch, weights[f"{prefix}gate.weight"] @ token)
    bias = weights[f"{prefix}gate.e_score_correction_bias"].tolist()
    chosen = choose(arch, affinities.tolist(), bias)
    total = sum(affinities[e] for e in chosen) if arch.norm_topk_prob else 1.0
    y = gated_mlp(weights, f"{prefix}shared_experts.", token, arch.swiglu_limit)
    for e in chosen:
        share = arch.routed_scaling_factor * affinities[e] / total
        y = y + share * gated_mlp(weights, f"{prefix}experts.{e}.", token, arch.swiglu_limit)
    return y


def scores(arch: DeepseekSection, router_logits: Tensor) -> Tensor:
    if arch.scoring_func == "softmax":
        return router_logits.exp() / router_logits.exp().sum(-1, keepdim=True)
    return 1 / (1 + (-router_logits).exp())


def choose(arch: DeepseekSection, affinities: list[float], bias: list[float]) -> list[int]:
    """The experts of one token by the words of the paper (2.1.2), with no tensor operation."""
    size = arch.n_routed_experts // arch.n_group
    biased = [s + b for s, b in zip(affinities, bias, strict=True)]
    of_group = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(arch.n_group)]
    open_groups = sorted(range(arch.n_group), key=lambda g: -of_group[g])[: arch.topk_group]
    allowed = [e for e in range(arch.n_routed_experts) if e // size in open_groups]
    return sorted(allowed, key=lambda e: -biased[e])[: arch.num_experts_per_tok]
