"""Fine-grained mixture of experts: DeepSeek-V3's with a shared expert and bias-balanced routing (2.1.2), and Qwen3's.

Shapes: T tokens, D hidden, E experts, K experts per token, M expert width, N = T * K rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from isthmus.model.documents import Rows
from isthmus.recipe.architecture import MixtureSection


def swiglu(gate: Tensor, up: Tensor, limit: float | None = None) -> Tensor:
    """silu(gate) * up. With a limit the gate is clamped from above and `up` on both sides, as vLLM does."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


class GatedMlp(nn.Module):
    """SwiGLU with the published parameter names."""

    def __init__(self, hidden_size: int, width: int, limit: float | None = None):
        super().__init__()
        self.limit = limit
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


@dataclass
class Routing:
    """What a router decided: `experts` [T, K], `weights` [T, K], and the `scores` [T, E] before the bias."""

    experts: Tensor
    weights: Tensor
    scores: Tensor

    def load(self, real: Tensor | None = None) -> Tensor:
        """Tokens sent to each expert, [E]; of those that `real` [T] marks, if it is given."""
        ones = torch.ones_like(self.experts, dtype=torch.float32) if real is None else real.float().unsqueeze(1)
        load = torch.zeros(self.scores.shape[-1], device=self.experts.device)
        return load.index_add_(0, self.experts.reshape(-1), ones.expand(self.experts.shape).reshape(-1))


class Trace:
    """Decisions of the routers of one forward pass, layer by layer. Opaque to whatever copies lists of tensors.

    `replayed` [B, T, layers, K] has decisions of another pass that this one takes over, -1 where it decides by itself.
    """

    def __init__(self, replayed: Tensor | None = None) -> None:
        self.routings: list[Routing] = []
        self._replayed = replayed

    def chosen(self) -> Tensor | None:
        """[B, T, K] that the router which comes next takes over."""
        return None if self._replayed is None else self._replayed[:, :, len(self.routings)]


def evenly(total: int, parts: int) -> list[int]:
    """`total` in `parts` whole numbers that differ by one at most: what stands for counts on the meta device, which
    has no values."""
    return [total // parts + (index < total % parts) for index in range(parts)]


class Router(nn.Module):
    """Chooses experts by score + bias, weights them by the score alone. Groups that lose are masked to -inf.

    The bias, which balances the load, is None in a family that has none.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, architecture: MixtureSection):
        super().__init__()
        a = architecture
        self.weight = nn.Parameter(torch.empty(a.n_routed_experts, a.hidden_size))
        bias = torch.zeros(a.n_routed_experts, dtype=torch.float32) if a.routing_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.top_k, self.n_group, self.topk_group = a.num_experts_per_tok, a.n_group, a.topk_group
        self.normalise, self.scaling = a.norm_topk_prob, a.routed_scaling_factor
        self.softmax = a.scoring_func == "softmax"

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> Routing:
        """x [T, D]. Experts [T, K] that another pass has chosen take the place of its own, where they are not -1; their
        weights are made of the scores that these inputs give them."""
        logits = self.logits(x)
        scores = logits.softmax(-1) if self.softmax else logits.sigmoid()
        experts = self.choose(self.biased(scores.detach()))
        if chosen is not None:
            experts = torch.where(chosen >= 0, chosen, experts)
        weights = scores.gather(-1, experts)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, weights * self.scaling, scores)

    def biased(self, scores: Tensor) -> Tensor:
        """Scores [T, E] with the bias, if there is one: what experts are chosen by."""
        return scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias

    def logits(self, x: Tensor) -> Tensor:
        """[T, E] of x [T, D], in fp32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide))

    def choose(self, biased: Tensor) -> Tensor:
        """Experts [T, top_k] of biased scores [T, E], from the groups with the best scores."""
        if self.topk_group < self.n_group:
            grouped = biased.unflatten(-1, (self.n_group, -1))
            group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            kept = group_score.topk(self.topk_group, dim=-1).indices
            closed = torch.ones_like(group_score, dtype=torch.bool).scatter(-1, kept, False)
            biased = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
        return biased.topk(self.top_k, dim=-1).indices


class Experts(nn.Module):
    """Routed experts of a layer, stacked: all `total` of them, or some from number `first` on.

    The state dict has the published name and shape of each expert: `0.gate_proj.weight`, `0.up_proj.weight`, ...
    With `grouped` the products of all experts are one grouped kernel, for chips that have it. It wants bf16, and sizes
    that are multiples of 8.
    """

    def __init__(self, architecture: MixtureSection):
        super().__init__()
        hidden, width = architecture.hidden_size, architecture.moe_intermediate_size
        self.total, self.first, self.grouped = architecture.n_routed_experts, 0, False
        self.limit = architecture.swiglu_limit
        self.gate_up = nn.Parameter(torch.empty(architecture.n_routed_experts, 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(architecture.n_routed_experts, hidden, width))
        self.register_state_dict_post_hook(_publish_experts)
        self.register_load_state_dict_pre_hook(_stack_experts)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [N, D], sorted by expert; `counts` [E] of its rows belong to each. Returns [N, D]."""
        if self.grouped and len(x):
            return self._grouped(x, counts)
        rows = evenly(len(x), len(counts)) if counts.is_meta else counts.tolist()
        parts = zip(x.split(rows), self.gate_up.unbind(), self.down.unbind(), strict=True)
        return torch.cat([self._expert(rows, gate_up, down) for rows, gate_up, down in parts])

    @property
    def aligned(self) -> bool:
        """Whether the sizes are those that a grouped product wants."""
        return all(size % 8 == 0 for size in self.down.shape[1:])

    def parts(self, index: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """The two products of one expert, by name: of rows [N, D] or [N, M]."""
        return {
            "gate_up_proj": lambda x: F.linear(x, self.gate_up[index]),
            "down_proj": lambda x: F.linear(x, self.down[index]),
        }

    def published_shapes(self, parameter: str) -> dict[str, torch.Size]:
        """Published names and shapes of what the stack `parameter` holds of all experts, here or elsewhere."""
        shape = getattr(self, parameter).shape[1:]
        stack = torch.empty(1, device="meta").expand(self.total, *shape)
        return {name: tensor.shape for name, tensor in published(parameter, stack, 0).items()}

    def _grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(x, self.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(swiglu(gate, up, self.limit), self.down.transpose(1, 2), offs=ends)

    def _expert(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return F.linear(swiglu(gate, up, self.limit), down)


def _publish_experts(module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
    gate_up, down = state.pop(f"{prefix}gate_up"), state.pop(f"{prefix}down")
    assert isinstance(module, Experts)
    for name, tensor in {
        **published("gate_up", gate_up, module.first),
        **published("down", down, module.first),
    }.items():
        state[f"{prefix}{name}"] = tensor


def published(parameter: str, stacked: Tensor, first: int) -> dict[str, Tensor]:
    """Views of a stack, `gate_up` [E, 2M, D] or `down` [E, D, M], under the published names of experts `first`, ..."""
    if parameter == "down":
        return {f"{first + i}.down_proj.weight": one for i, one in enumerate(stacked)}
    halves = [(i, *one.chunk(2)) for i, one in enumerate(stacked)]
    gates = {f"{first + i}.gate_proj.weight": gate for i, gate, _ in halves}
    return gates | {f"{first + i}.up_proj.weight": up for i, _, up in halves}


def _stack_experts(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    assert isinstance(module, Experts)
    names = [
        [f"{prefix}{i}.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
        for i in range(len(module.down))
    ]
    if not all(name in state for triple in names for name in triple):
        return
    triples = [[state.pop(name) for name in triple] for triple in names]
    state[f"{prefix}gate_up"] = _stacked([torch.cat((gate, up)) for gate, up, _ in triples])
    state[f"{prefix}down"] = _stacked([down for _, _, down in triples])


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Without a copy of a single one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


class Repeat(torch.autograd.Function):
    """Row t of x [T, D] for each of its K choices, in the order of `order` [T * K]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.choices = len(order) // len(x)
        return x.index_select(0, order.div(ctx.choices, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse).unflatten(0, (-1, ctx.choices)).sum(1), None, None


@dataclass
class Dispatch:
    """The choices [T, K] sorted by expert: `order` [T * K] and its inverse, and the rows per expert, `counts` [E]."""

    order: Tensor
    inverse: Tensor
    counts: Tensor

    @classmethod
    def by_expert(cls, experts: Tensor, num_experts: int) -> Dispatch:
        """Sort stably: the rows of an expert stay in the order of the tokens."""
        flat = experts.reshape(-1)
        order = flat.argsort(stable=True)
        places = torch.arange(len(flat), device=flat.device)
        inverse = torch.empty_like(order).scatter_(0, order, places)
        counts = torch.zeros(num_experts, dtype=torch.long, device=flat.device)
        return cls(order, inverse, counts.index_add_(0, flat, torch.ones_like(flat)))

    def scatter(self, x: Tensor) -> Tensor:
        """x [T, D] to the rows of the experts [T * K, D]."""
        return Repeat.apply(x, self.order, self.inverse)  # pyright: ignore[reportReturnType]

    def gather(self, y: Tensor, weights: Tensor) -> Tensor:
        """The experts' rows y [T * K, D] back to tokens, summed over choices with `weights` [T, K]: [T, D]."""
        chosen = Rows.apply(y, self.inverse, self.order, None).unflatten(0, weights.shape)  # pyright: ignore
        return torch.bmm(weights.to(y.dtype).unsqueeze(1), chosen).squeeze(1)


@dataclass
class Sent:
    """Tokens on their way to the experts: `rows` [N, D] sorted by expert."""

    routing: Routing
    dispatch: Dispatch
    rows: Tensor


class MixtureOfExperts(nn.Module):
    """Routed experts, plus the shared expert where there is one.

    With an `exchange` the experts are spread over ranks: it takes sorted rows and counts of all experts to where the
    experts are, applies them, and brings the rows back.
    """

    def __init__(self, architecture: MixtureSection):
        super().__init__()
        a = architecture
        self.gate = Router(a)
        self.experts = Experts(a)
        self.shared_experts = (
            GatedMlp(a.hidden_size, a.moe_intermediate_size * a.n_shared_experts, a.swiglu_limit)
            if a.n_shared_experts
            else None
        )
        self.num_experts = a.n_routed_experts
        self.exchange: Exchange | None = None

    def forward(self, x: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x [B, T, D] or [T, D]. Returns the same shape, and what the router decided; `chosen` [..., K] as there."""
        sent = self.send(x, chosen)
        rows, counts = sent.rows, sent.dispatch.counts
        outputs = self.exchange(self.experts, rows, counts) if self.exchange else self.experts(rows, counts)
        return self.combine(x, sent, outputs)

    def send(self, x: Tensor, chosen: Tensor | None = None) -> Sent:
        """What `forward` does before the experts, with the same arguments."""
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.gate(tokens) if chosen is None else self.gate(tokens, chosen.reshape(-1, chosen.shape[-1]))
        dispatch = Dispatch.by_expert(routing.experts, self.num_experts)
        return Sent(routing, dispatch, dispatch.scatter(tokens))

    def combine(self, x: Tensor, sent: Sent, outputs: Tensor) -> tuple[Tensor, Routing]:
        """What `forward` does after the experts, whose outputs are [N, D]."""
        routed = sent.dispatch.gather(outputs, sent.routing.weights)
        if self.shared_experts is not None:
            routed = routed + self.shared_experts(x.reshape(-1, x.shape[-1]))
        return routed.view_as(x), sent.routing


class Exchange(Protocol):
    """Applies experts that are spread over ranks: rows [N, D] sorted by expert, `counts` [E] of all experts."""

    def __call__(self, experts: nn.Module, rows: Tensor, counts: Tensor) -> Tensor: ...


def sequence_balance_sums(routing: Routing, sequence: Tensor, num_sequences: int) -> Tensor:
    """DeepSeek-V3's complementary balance loss (eq. 17-20) without its factor alpha, summed over sequences.

    `sequence` [T] gives the sequence of each token, -1 for padding, which does not count. The counts use the top K of
    the scores without the bias.
    """
    top_k, num_experts = routing.experts.shape[1], routing.scores.shape[1]
    real = (sequence >= 0).to(routing.scores.dtype).unsqueeze(1)
    place = sequence.clamp(min=0)
    unbiased = routing.scores.detach().topk(top_k, dim=-1).indices
    chosen = torch.zeros_like(routing.scores).scatter(-1, unbiased, 1.0) * real
    share = routing.scores / routing.scores.sum(-1, keepdim=True) * real
    length = share.new_zeros(num_sequences).index_add(0, place, real.squeeze(1)).clamp(min=1).unsqueeze(1)
    shape = (num_sequences, num_experts)
    frequency = share.new_zeros(shape).index_add(0, place, chosen) * (num_experts / top_k) / length
    probability = share.new_zeros(shape).index_add(0, place, share) / length
    return (frequency * probability).sum()
