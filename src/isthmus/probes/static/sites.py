"""Where a fused operator may stand: the operations of a traced model, each with the sizes of its own tensors.

A documented rule on shapes is about one kind of operation. It is held against the sites of that kind that a trace met,
and against nothing else: a model without latent attention breaks no rule of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from isthmus.model.attention import EntryLayout, LatentAttention, RMSNorm
from isthmus.model.layer import ResidualLayer
from isthmus.model.moe import Experts, GatedMlp, MixtureOfExperts, Routing

ATTENTION, LATENT_ATTENTION, LATENT_PROJECTIONS = "attention", "latent attention", "latent projections"
HALVES, PAIRS = "rotation of halves", "rotation of pairs"
NORM, MLP, LINEAR = "rms norm", "gated mlp", "linear"
ROUTER, EXPERTS, SHARED_EXPERTS, EXCHANGE = "router", "experts", "shared experts", "exchange of tokens"
LOSS, OPTIMISER = "loss", "optimiser"
KINDS: dict[str, tuple[str, ...]] = {
    ATTENTION: ("query_heads", "key_heads", "query_groups", "head_dim", "value_dim", "tokens"),
    LATENT_ATTENTION: ("query_heads", "latent_dim", "rope_dim"),
    LATENT_PROJECTIONS: ("hidden_size", "q_lora_rank", "kv_lora_rank", "query_heads", "nope_dim", "rope_dim"),
    HALVES: ("rope_dim", "heads", "rows", "heads_times_rows"),
    PAIRS: ("rope_dim", "heads", "rows", "heads_times_rows"),
    NORM: ("width",),
    MLP: ("hidden_size", "width"),
    LINEAR: ("inputs", "outputs"),
    ROUTER: (
        *("experts", "experts_per_token", "groups", "groups_per_token", "experts_per_group"),
        *("experts_aligned_to_32", "reachable_experts"),
    ),
    EXPERTS: ("experts", "hidden_size", "width", "routed_rows"),
    SHARED_EXPERTS: ("hidden_size", "width"),
    EXCHANGE: ("ranks", "experts", "local_experts", "experts_per_token", "hidden_size", "tokens"),
    LOSS: ("rows", "vocabulary"),
    OPTIMISER: (),
}
"""Every kind of site, and the sizes that each of its sites has."""


class Site(NamedTuple):
    """One operation: its kind, and its sizes by name, in the order of `KINDS`."""

    kind: str
    sizes: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, kind: str, **sizes: float) -> Site:
        assert set(sizes) == set(KINDS[kind]), f"a site of {kind} has {', '.join(KINDS[kind])}"
        return cls(kind, tuple((name, sizes[name]) for name in KINDS[kind]))

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size:g}" for name, size in self.sizes)
        return f"{self.kind} with {sizes}" if sizes else self.kind


def whole_attention(query: Tensor, key: Tensor, value: Tensor) -> Site:
    """Attention of query [B, H, T, Q] over key [B, K, S, Q] and value [B, K, S, V]."""
    return _attention(query.shape[1], key.shape[1], query.shape[-1], value.shape[-1], query.shape[2])


def cached_attention(query: Tensor, layout: EntryLayout) -> Site:
    """Attention of query [B, T, H, key_size] over a cache. Values that are a part of the keys are latents."""
    heads = query.shape[2]
    if layout.value_start < layout.heads * layout.key_size:
        rope = layout.key_size - layout.value_size
        return Site.of(LATENT_ATTENTION, query_heads=heads, latent_dim=layout.value_size, rope_dim=rope)
    return _attention(heads, layout.heads, layout.key_size, layout.value_size, query.shape[1])


def _attention(heads: int, key_heads: int, head_dim: int, value_dim: int, tokens: int) -> Site:
    return Site.of(
        ATTENTION,
        query_heads=heads,
        key_heads=key_heads,
        query_groups=heads / key_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        tokens=tokens,
    )


def loss(logits: Tensor) -> Site:
    """The loss of logits [N, V]."""
    return Site.of(LOSS, rows=logits.shape[0], vocabulary=logits.shape[1])


def watch_sites(model: nn.Module, add: Callable[[Site], None], ranks: int = 1) -> None:
    """Tell `add` of the sites that `model` passes from now on. `ranks`: among how many the experts are divided."""

    def tell(sites_of: Callable[..., Iterable[Site]]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            for site in sites_of(module, inputs, output):
                add(site)

        return hook

    for module in model.modules():
        if isinstance(module, ResidualLayer):
            module.self_attn.register_forward_hook(tell(_rotation))
        if isinstance(module, LatentAttention):
            module.register_forward_hook(tell(_latent_projections))
        elif isinstance(module, RMSNorm):
            module.register_forward_hook(tell(lambda _, inputs, __: [Site.of(NORM, width=inputs[0].shape[-1])]))
        elif isinstance(module, GatedMlp):
            module.register_forward_hook(tell(_gated_mlp))
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(tell(_linear))
        elif isinstance(module, Experts):
            module.register_forward_hook(tell(_experts))
        elif isinstance(module, MixtureOfExperts):
            module.register_forward_hook(
                tell(lambda module, inputs, output: _mixture(module, inputs[0], output[1], ranks))
            )


def _rotation(attention: Any, inputs: tuple[Any, ...], _: Tensor) -> list[Site]:
    x, rotation = inputs[0], inputs[1]
    heads, rows = int(attention.num_heads), x.shape[0]
    kind = PAIRS if isinstance(attention, LatentAttention) else HALVES
    dim = 2 * rotation.cos.shape[-1]
    return [Site.of(kind, rope_dim=dim, heads=heads, rows=rows, heads_times_rows=heads * rows)]


def _latent_projections(attention: LatentAttention, inputs: tuple[Any, ...], _: Tensor) -> list[Site]:
    return [
        Site.of(
            LATENT_PROJECTIONS,
            hidden_size=inputs[0].shape[-1],
            q_lora_rank=attention.q_a_proj.out_features if attention.compressed_q else 0,
            kv_lora_rank=attention.rank,
            query_heads=attention.num_heads,
            nope_dim=attention.nope,
            rope_dim=attention.rope,
        )
    ]


def _gated_mlp(mlp: GatedMlp, inputs: tuple[Any, ...], _: Tensor) -> list[Site]:
    return [Site.of(MLP, hidden_size=inputs[0].shape[-1], width=mlp.gate_proj.out_features)]


def _linear(linear: nn.Linear, _: tuple[Any, ...], __: Tensor) -> list[Site]:
    return [Site.of(LINEAR, inputs=linear.in_features, outputs=linear.out_features)]


def _experts(experts: Experts, inputs: tuple[Any, ...], _: Tensor) -> list[Site]:
    stacked, rows = experts.down, inputs[0]
    held, hidden, width = stacked.shape
    return [Site.of(EXPERTS, experts=held, hidden_size=hidden, width=width, routed_rows=len(rows))]


def _mixture(mixture: MixtureOfExperts, x: Tensor, routing: Routing, ranks: int) -> list[Site]:
    (tokens, experts), chosen = routing.scores.shape, routing.experts.shape[-1]
    groups, kept = mixture.gate.n_group, mixture.gate.topk_group
    each = experts // groups
    sites = [
        Site.of(
            ROUTER,
            experts=experts,
            experts_per_token=chosen,
            groups=groups,
            groups_per_token=kept,
            experts_per_group=each,
            experts_aligned_to_32=-(-each // 32) * 32 * groups,
            reachable_experts=kept * each,
        )
    ]
    if isinstance(mixture.shared_experts, GatedMlp):
        width = mixture.shared_experts.gate_proj.out_features
        sites.append(Site.of(SHARED_EXPERTS, hidden_size=x.shape[-1], width=width))
    if ranks > 1:
        sites.append(
            Site.of(
                EXCHANGE,
                ranks=ranks,
                experts=experts,
                local_experts=experts // ranks,
                experts_per_token=chosen,
                hidden_size=x.shape[-1],
                tokens=tokens,
            )
        )
    return sites
