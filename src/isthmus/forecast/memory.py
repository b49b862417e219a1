"""Memory by exact counts: weights, gradients, optimiser and activations of training; weights and cache of serving."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.forecast.count import count_parameters, layer_parameters
from isthmus.recipe.architecture import DeepseekSection, GroupedSection, MixtureSection, ModelSection

_ACTIVATION = 2.0
"""Bytes of an activation that is kept: bf16."""


@dataclass(frozen=True)
class States:
    """Bytes a parameter of weights, gradients and optimiser, and which of them are split over the devices that hold
    copies of the same parameters."""

    weights: float
    gradients: float
    optimizer: float
    shared: tuple[str, ...]


OURS = States(weights=4.0, gradients=4.0, optimizer=8.0, shared=("weights", "gradients", "optimizer"))
"""FSDP2 with fp32 masters and two moments; everything is sharded, and layers are gathered in bf16 when they compute."""
DISTRIBUTED_OPTIMIZER = States(weights=2.0, gradients=4.0, optimizer=12.0, shared=("optimizer",))
"""Megatron's distributed optimiser: bf16 weights and fp32 gradients on each device, fp32 masters and moments split."""


@dataclass(frozen=True)
class Layout:
    """How a model is divided: `tensor`, `pipeline` and `expert` ways, over `count` devices."""

    count: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    replicate: int = 1

    @property
    def copies(self) -> int:
        """Devices that hold the same dense parameters, or would without sharding."""
        return max(1, self.count // (self.tensor * self.pipeline * self.replicate))


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a device, by part. `transient` is what exists for a moment: layers gathered to compute, and the fp32
    gradient of the widest dense MLP before it is added."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    transient: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.transient


def training_memory(
    architecture: ModelSection,
    layout: Layout,
    *,
    rows: float,
    row_length: int,
    checkpointing: bool = False,
    states: States = OURS,
) -> TrainingMemory:
    """Bytes of the fullest device, with `rows` rows of `row_length` tokens in a microbatch.

    Stage s of P pipeline stages keeps P - s microbatches (1F1B); embedding and head are on the first and the last.
    Attention keeps no scores, as FlashAttention does.
    """
    tokens = rows * row_length / layout.tensor
    stages = [
        _stage_memory(architecture, layout, stage, tokens, checkpointing, states) for stage in range(layout.pipeline)
    ]
    return max(stages, key=lambda stage: stage.total)


def _stage_memory(
    architecture: ModelSection, layout: Layout, stage: int, tokens: float, checkpointing: bool, states: States
) -> TrainingMemory:
    a, last = architecture, layout.pipeline - 1
    layers = _layers_of(a.num_hidden_layers, layout.pipeline, stage)
    alike = _alike_layers(a, layers)
    counts = [(layer_parameters(a, index), many) for index, many in alike]
    dense = sum(outside * many for (outside, _), many in counts) / layout.tensor
    experts = sum(routed * many for (_, routed), many in counts) / layout.expert
    ends = a.vocab_size * a.hidden_size / layout.tensor
    dense += ends * (stage == 0) + ends * (stage == last and not (a.tie_word_embeddings and last == 0))
    if stage == last and a.num_nextn_predict_layers:
        extra_outside, extra_routed = layer_parameters(a, a.num_hidden_layers)
        dense += (extra_outside + 2 * a.hidden_size**2) / layout.tensor
        experts += extra_routed / layout.expert
    copies, expert_copies = layout.copies, max(1, layout.copies * layout.tensor // layout.expert)

    def held(name: str, each: float) -> float:
        shared = name in states.shared
        return each * (dense / copies + experts / expert_copies if shared else dense + experts)

    inside = [(layer_activations(a, index), many) for index, many in alike]
    whole = max(each for each, _ in inside)
    kept = sum((_ACTIVATION * a.hidden_size if checkpointing else each) * many for each, many in inside)
    gathered = max(outside / layout.tensor + routed / layout.expert for (outside, routed), _ in counts)
    return TrainingMemory(
        weights=held("weights", states.weights),
        gradients=held("gradients", states.gradients),
        optimizer=held("optimizer", states.optimizer),
        activations=tokens * (kept * (layout.pipeline - stage) + checkpointing * whole),
        logits=tokens * a.vocab_size * (_ACTIVATION + 4.0) * (stage == last),
        transient=2.0 * 2.0 * gathered if "weights" in states.shared else 4.0 * _widest_mlp(a, layers) / layout.tensor,
    )


def _alike_layers(a: ModelSection, layers: range) -> list[tuple[int, int]]:
    """One layer of each kind, dense or sparse, and how many there are."""
    sparse = [index for index in layers if a.is_sparse(index)]
    dense = [index for index in layers if not a.is_sparse(index)]
    return [(kind[0], len(kind)) for kind in (dense, sparse) if kind]


def _layers_of(layers: int, stages: int, stage: int) -> range:
    return range(layers * stage // stages, layers * (stage + 1) // stages)


def _widest_mlp(a: ModelSection, layers: range) -> int:
    return max((3 * a.hidden_size * a.intermediate_size for index in layers if not a.is_sparse(index)), default=0)


def layer_activations(architecture: ModelSection, index: int) -> float:
    """Bytes that layer `index` keeps per token for its backward pass, in bf16, whole."""
    hidden = architecture.hidden_size
    if isinstance(architecture, GroupedSection):
        queries = architecture.num_attention_heads * architecture.head_size
        attention = 2 * queries + 2 * architecture.num_key_value_heads * architecture.head_size
    else:
        assert isinstance(architecture, DeepseekSection)
        attention = _latent_activations(architecture)
    residuals_and_norms = 4 * hidden
    return _ACTIVATION * (residuals_and_norms + attention + _mlp_activations(architecture, index))


def _latent_activations(a: DeepseekSection) -> int:
    heads, query = a.num_attention_heads, a.qk_nope_head_dim + a.qk_rope_head_dim
    latents = 2 * (a.q_lora_rank or 0) + 2 * a.kv_lora_rank + a.qk_rope_head_dim
    return latents + heads * (2 * query + a.v_head_dim) + heads * a.v_head_dim


def _mlp_activations(a: ModelSection, index: int) -> int:
    if not isinstance(a, MixtureSection) or not a.is_sparse(index):
        return 3 * a.intermediate_size
    expert = 2 * a.hidden_size + 3 * a.moe_intermediate_size
    shared = 3 * a.moe_intermediate_size * a.n_shared_experts
    return 2 * a.n_routed_experts + a.num_experts_per_tok * expert + shared


def serving_weights(architecture: ModelSection, bytes_each: float) -> float:
    """Bytes of the weights that generation reads, over all devices."""
    return bytes_each * count_parameters(architecture).main


def cache_bytes(architecture: ModelSection, tokens: float, bytes_each: float = 2.0) -> float:
    """Bytes of the cache of one sequence of `tokens` tokens; a sliding window keeps no more than itself."""
    seen = [
        min(tokens, window) if (window := _window(architecture, index)) is not None else tokens
        for index in range(architecture.num_hidden_layers)
    ]
    return bytes_each * architecture.cache_width * sum(seen)


def _window(architecture: ModelSection, index: int) -> int | None:
    return architecture.window_of(index) if isinstance(architecture, GroupedSection) else None
