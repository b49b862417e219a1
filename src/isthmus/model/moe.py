"""Fine-grained mixture of experts with a shared expert and bias-balanced sigmoid routing (DeepSeek-V3, 2.1.2).

Shapes: T tokens, D hidden, E experts, K experts per token, M expert width, P places per expert in a padded batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.recipe import ModelSection


class GatedMlp(nn.Module):
    """SwiGLU with the published parameter names."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass
class Routing:
    """What a router decided: `experts` [T, K], `weights` [T, K], and the sigmoid `scores` [T, E] before the bias."""

    experts: Tensor
    weights: Tensor
    scores: Tensor

    def load(self) -> Tensor:
        """Tokens sent to each expert, [E]."""
        flat = self.experts.reshape(-1)
        return torch.zeros(self.scores.shape[-1], device=flat.device).index_add_(
            0, flat, torch.ones_like(flat, dtype=torch.float32)
        )


class Router(nn.Module):
    """Chooses experts by score + bias, weights them by the score alone. Groups that lose are masked to -inf."""

    e_score_correction_bias: Tensor

    def __init__(self, architecture: ModelSection):
        super().__init__()
        a = architecture
        self.weight = nn.Parameter(torch.empty(a.n_routed_experts, a.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(a.n_routed_experts, dtype=torch.float32))
        self.top_k, self.n_group, self.topk_group = a.num_experts_per_tok, a.n_group, a.topk_group
        self.normalise, self.scaling = a.norm_topk_prob, a.routed_scaling_factor

    def forward(self, x: Tensor) -> Routing:
        """x [T, D]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = F.linear(x.to(wide), self.weight.to(wide)).sigmoid()
        experts = self._choose(scores.detach() + self.e_score_correction_bias)
        weights = scores.gather(-1, experts)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, weights * self.scaling, scores)

    def _choose(self, biased: Tensor) -> Tensor:
        if self.topk_group < self.n_group:
            grouped = biased.unflatten(-1, (self.n_group, -1))
            group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            kept = group_score.topk(self.topk_group, dim=-1).indices
            closed = torch.ones_like(group_score, dtype=torch.bool).scatter(-1, kept, False)
            biased = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
        return biased.topk(self.top_k, dim=-1).indices


class Experts(nn.Module):
    """All routed experts of a layer, stacked so that one batched GEMM serves them all.

    The state dict has the published name and shape of each expert: `0.gate_proj.weight`, `0.up_proj.weight`, ...
    """

    def __init__(self, architecture: ModelSection):
        super().__init__()
        experts, hidden, width = (
            architecture.n_routed_experts,
            architecture.hidden_size,
            architecture.moe_intermediate_size,
        )
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.register_state_dict_post_hook(_publish_experts)
        self.register_load_state_dict_pre_hook(_stack_experts)

    def forward(self, x: Tensor) -> Tensor:
        """x [E, P, D], the tokens of each expert in its row. Returns [E, P, D]."""
        gate, up = torch.bmm(x, self.gate_up.transpose(1, 2)).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, self.down.transpose(1, 2))


def _publish_experts(module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    gate_up, down = state.pop(f"{prefix}gate_up"), state.pop(f"{prefix}down")
    width = down.shape[-1]
    for index in range(down.shape[0]):
        state[f"{prefix}{index}.gate_proj.weight"] = gate_up[index, :width]
        state[f"{prefix}{index}.up_proj.weight"] = gate_up[index, width:]
        state[f"{prefix}{index}.down_proj.weight"] = down[index]


def _stack_experts(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    assert isinstance(module, Experts)
    names = [
        [f"{prefix}{i}.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
        for i in range(len(module.down))
    ]
    if not all(name in state for triple in names for name in triple):
        return
    triples = [[state.pop(name) for name in triple] for triple in names]
    state[f"{prefix}gate_up"] = torch.stack([torch.cat((gate, up)) for gate, up, _ in triples])
    state[f"{prefix}down"] = torch.stack([down for _, _, down in triples])


@dataclass
class Dispatch:
    """Where each (token, choice) sits in the padded [E * P] batch: `place` [T, K]."""

    place: Tensor
    places_per_expert: int

    @classmethod
    def by_expert(cls, experts: Tensor, num_experts: int) -> Dispatch:
        """Sort the choices [T, K] by expert; each expert gets as many places as the busiest one needs."""
        flat = experts.reshape(-1)
        order = flat.argsort(stable=True)
        sorted_experts = flat[order]
        counts = torch.zeros(num_experts, dtype=torch.long, device=flat.device).index_add_(
            0, flat, torch.ones_like(flat)
        )
        rank = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[sorted_experts]
        width = int(counts.max())
        place = torch.empty_like(flat)
        place[order] = sorted_experts * width + rank
        return cls(place.view_as(experts), width)

    def scatter(self, x: Tensor, num_experts: int) -> Tensor:
        """x [T, D] to the padded batch [E, P, D]; unused places are zero."""
        repeated = x.repeat_interleave(self.place.shape[1], dim=0)
        padded = x.new_zeros(num_experts * self.places_per_expert, x.shape[-1])
        return padded.index_copy(0, self.place.reshape(-1), repeated).view(num_experts, self.places_per_expert, -1)

    def gather(self, y: Tensor, weights: Tensor) -> Tensor:
        """The padded batch y [E, P, D] back to tokens, summed over choices with `weights` [T, K]: [T, D]."""
        chosen = y.flatten(0, 1).index_select(0, self.place.reshape(-1)).view(*self.place.shape, -1)
        return torch.bmm(weights.to(y.dtype).unsqueeze(1), chosen).squeeze(1)


class MixtureOfExperts(nn.Module):
    """Routed experts plus the shared expert."""

    def __init__(self, architecture: ModelSection):
        super().__init__()
        a = architecture
        self.gate = Router(a)
        self.experts = Experts(a)
        self.shared_experts = GatedMlp(a.hidden_size, a.moe_intermediate_size * a.n_shared_experts)
        self.num_experts = a.n_routed_experts

    def forward(self, x: Tensor, trace: list[Routing] | None = None) -> Tensor:
        """x [B, T, D] or [T, D]. Appends the routing to `trace` if one is given."""
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.gate(tokens)
        if trace is not None:
            trace.append(routing)
        dispatch = Dispatch.by_expert(routing.experts, self.num_experts)
        routed = dispatch.gather(self.experts(dispatch.scatter(tokens, self.num_experts)), routing.weights)
        return (routed + self.shared_experts(tokens)).view_as(x)


def sequence_balance_loss(routing: Routing, sequence: Tensor, num_sequences: int) -> Tensor:
    """DeepSeek-V3's complementary balance loss (eq. 17-20) without its factor alpha, averaged over sequences.

    `sequence` [T] gives the sequence of each token. The counts use the top K of the scores without the bias.
    """
    top_k, num_experts = routing.experts.shape[1], routing.scores.shape[1]
    unbiased = routing.scores.detach().topk(top_k, dim=-1).indices
    chosen = torch.zeros_like(routing.scores).scatter(-1, unbiased, 1.0)
    share = routing.scores / routing.scores.sum(-1, keepdim=True)
    shape = (num_sequences, num_experts)
    length = (
        share.new_zeros(num_sequences).index_add(0, sequence, torch.ones_like(share[:, 0])).clamp(min=1).unsqueeze(1)
    )
    frequency = share.new_zeros(shape).index_add(0, sequence, chosen) * (num_experts / top_k) / length
    probability = share.new_zeros(shape).index_add(0, sequence, share) / length
    return (frequency * probability).sum(-1).mean()
