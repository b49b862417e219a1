"""Exact counts of an architecture: parameters, and floating-point operations per token.

A multiplication and an addition count as two operations. Only matrix products are counted; norms, rotations and the
softmax are of a lower order.
"""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.recipe.architecture import DeepseekSection, GroupedSection, MixtureSection, ModelSection, Qwen3MoeSection


@dataclass(frozen=True)
class Parameters:
    """Parameters by part. `routed_used` are those of the routed experts that one token passes through."""

    embedding: int
    head: int
    attention: int
    dense_mlp: int
    router: int
    shared_experts: int
    routed_experts: int
    routed_used: int
    norms: int
    mtp: int
    biases: int = 0

    @property
    def total(self) -> int:
        """All of them, multi-token prediction included; the routing bias is not a parameter."""
        return self.main + self.mtp

    @property
    def main(self) -> int:
        """Without multi-token prediction: what generation uses, and what a model's size is named after."""
        return self._outside_experts + self.routed_experts

    @property
    def active(self) -> int:
        """What one token passes through, without multi-token prediction."""
        return self._outside_experts + self.routed_used

    @property
    def _outside_experts(self) -> int:
        return (
            self.embedding
            + self.head
            + self.attention
            + self.dense_mlp
            + self.router
            + self.shared_experts
            + self.norms
            + self.biases
        )


def count_parameters(architecture: ModelSection) -> Parameters:
    """The parameters of `isthmus.model.model.Model` for this architecture."""
    if isinstance(architecture, GroupedSection):
        return _grouped_parameters(architecture)
    a = _deepseek(architecture)
    layers, dense = a.num_hidden_layers, min(a.first_k_dense_replace, a.num_hidden_layers)
    sparse = layers - dense
    embedding = a.vocab_size * a.hidden_size
    return Parameters(
        embedding=embedding,
        head=0 if a.tie_word_embeddings else embedding,
        attention=layers * attention_matrices(a),
        dense_mlp=dense * _gated_mlp(a, a.intermediate_size),
        router=sparse * a.n_routed_experts * a.hidden_size,
        shared_experts=sparse * _gated_mlp(a, a.moe_intermediate_size * a.n_shared_experts),
        routed_experts=sparse * a.n_routed_experts * _gated_mlp(a, a.moe_intermediate_size),
        routed_used=sparse * a.num_experts_per_tok * _gated_mlp(a, a.moe_intermediate_size),
        norms=layers * _layer_norms(a) + a.hidden_size,
        mtp=a.num_nextn_predict_layers * _mtp_layer(a),
    )


def _grouped_parameters(a: GroupedSection) -> Parameters:
    embedding = a.vocab_size * a.hidden_size
    inputs, output = (a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_size, a.hidden_size
    sparse = len(a.sparse_layers)
    experts, used, width = (
        (a.num_experts, a.num_experts_per_tok, a.moe_intermediate_size) if isinstance(a, Qwen3MoeSection) else (0, 0, 0)
    )
    head_norms = 2 * a.num_hidden_layers * a.head_size * a.head_norms
    return Parameters(
        embedding=embedding,
        head=0 if a.tie_word_embeddings else embedding,
        attention=a.num_hidden_layers * attention_matrices(a),
        dense_mlp=(a.num_hidden_layers - sparse) * _gated_mlp(a, a.intermediate_size),
        router=sparse * experts * a.hidden_size,
        shared_experts=0,
        routed_experts=sparse * experts * _gated_mlp(a, width),
        routed_used=sparse * used * _gated_mlp(a, width),
        norms=(2 * a.num_hidden_layers + 1) * a.hidden_size + head_norms,
        mtp=0,
        biases=a.num_hidden_layers * (inputs * a.input_bias + output * a.output_bias),
    )


def attention_matrices(architecture: ModelSection) -> int:
    """Parameters of the matrices of one attention, without biases."""
    if isinstance(architecture, GroupedSection):
        heads = 2 * (architecture.num_attention_heads + architecture.num_key_value_heads)
        return heads * architecture.head_size * architecture.hidden_size
    a = _deepseek(architecture)
    heads, query = a.num_attention_heads, a.qk_nope_head_dim + a.qk_rope_head_dim
    if a.q_lora_rank is None:
        queries = a.hidden_size * heads * query
    else:
        queries = a.q_lora_rank * (a.hidden_size + heads * query)
    latents = a.hidden_size * (a.kv_lora_rank + a.qk_rope_head_dim)
    keys_and_values = a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim)
    return queries + latents + keys_and_values + heads * a.v_head_dim * a.hidden_size


def layer_parameters(architecture: ModelSection, index: int) -> tuple[int, int]:
    """Parameters of layer `index` outside its routed experts, and of those; the sums over the layers, with embedding,
    head and last norm, are those of `count_parameters` without multi-token prediction."""
    a = architecture
    if isinstance(a, GroupedSection):
        inputs = (a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_size
        biases = inputs * a.input_bias + a.hidden_size * a.output_bias
        norms = 2 * a.hidden_size + 2 * a.head_size * a.head_norms
        outside = attention_matrices(a) + biases + norms
    else:
        outside = attention_matrices(a) + _layer_norms(_deepseek(a))
    if not isinstance(a, MixtureSection) or not a.is_sparse(index):
        return outside + _gated_mlp(a, a.intermediate_size), 0
    shared = _gated_mlp(a, a.moe_intermediate_size * a.n_shared_experts)
    return outside + a.n_routed_experts * a.hidden_size + shared, a.n_routed_experts * _gated_mlp(
        a, a.moe_intermediate_size
    )


def attention_width(architecture: ModelSection) -> int:
    """Width over which one layer's attention multiplies per token that it sees: heads times query and value."""
    if isinstance(architecture, GroupedSection):
        return 2 * architecture.num_attention_heads * architecture.head_size
    a = _deepseek(architecture)
    return a.num_attention_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)


def forward_flops(architecture: ModelSection, context: float, *, mtp: bool = False) -> float:
    """Operations of a forward pass per token that attends to `context` tokens, itself included, or to its window.

    With `mtp` the layer of multi-token prediction, where there is one, and its pass through the head are included.
    """
    a = architecture
    count = count_parameters(a)
    matrices = count.active - count.embedding - count.norms - count.biases
    if a.tie_word_embeddings:
        matrices += count.embedding
    flops = 2.0 * matrices + sum(
        _scores_and_values(a, _seen(a, index, context)) for index in range(a.num_hidden_layers)
    )
    if isinstance(a, MixtureSection):
        flops += len(a.sparse_layers) * _combine(a)
    if isinstance(a, DeepseekSection) and mtp:
        flops += _mtp_flops(a, context)
    return flops


def training_flops(architecture: ModelSection, context: float) -> float:
    """Operations of a training step per token: a forward pass with multi-token prediction, and twice that backward."""
    return 3.0 * forward_flops(architecture, context, mtp=architecture.num_nextn_predict_layers > 0)


def _deepseek(architecture: ModelSection) -> DeepseekSection:
    assert isinstance(architecture, DeepseekSection), f"nothing counts a {type(architecture).__name__}"
    return architecture


def _gated_mlp(a: ModelSection, width: int) -> int:
    return 3 * a.hidden_size * width


def _layer_norms(a: DeepseekSection) -> int:
    return 2 * a.hidden_size + a.kv_lora_rank + (a.q_lora_rank or 0)


def _mtp_is_sparse(a: DeepseekSection) -> bool:
    return a.num_hidden_layers >= a.first_k_dense_replace


def _mtp_layer(a: DeepseekSection) -> int:
    """A decoder layer, the matrix that joins state and embedding, and the norms before and after it."""
    experts = a.n_routed_experts * (a.hidden_size + _gated_mlp(a, a.moe_intermediate_size))
    shared = _gated_mlp(a, a.moe_intermediate_size * a.n_shared_experts)
    mlp = experts + shared if _mtp_is_sparse(a) else _gated_mlp(a, a.intermediate_size)
    return attention_matrices(a) + mlp + 2 * a.hidden_size**2 + _layer_norms(a) + 3 * a.hidden_size


def _mtp_flops(a: DeepseekSection, context: float) -> float:
    used = a.n_routed_experts * a.hidden_size + a.num_experts_per_tok * _gated_mlp(a, a.moe_intermediate_size)
    shared = _gated_mlp(a, a.moe_intermediate_size * a.n_shared_experts)
    mlp = used + shared if _mtp_is_sparse(a) else _gated_mlp(a, a.intermediate_size)
    matrices = attention_matrices(a) + mlp + 2 * a.hidden_size**2 + a.vocab_size * a.hidden_size
    return 2.0 * matrices + _scores_and_values(a, context) + (_combine(a) if _mtp_is_sparse(a) else 0.0)


def _seen(a: ModelSection, index: int, context: float) -> float:
    """Tokens that a token attends to in layer `index`."""
    window = a.window_of(index) if isinstance(a, GroupedSection) else None
    return context if window is None else min(context, window)


def _scores_and_values(architecture: ModelSection, context: float) -> float:
    return 2.0 * context * attention_width(architecture)


def _combine(a: MixtureSection) -> float:
    """The weighted sum over a token's experts."""
    return 2.0 * a.num_experts_per_tok * a.hidden_size
