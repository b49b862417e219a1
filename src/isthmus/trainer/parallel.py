"""Sharding of a model over ranks: FSDP2 for all parameters, and routed experts spread over ranks that exchange tokens.

Gradients are summed over ranks, not averaged: each rank's loss is already divided by the counts of the whole batch.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from isthmus.model.documents import Rows
from isthmus.model.model import Model
from isthmus.model.moe import MixtureOfExperts, evenly
from isthmus.recipe.schema import TrainSection
from isthmus.trainer.mesh import Meshes, Ranks, make_meshes


def distribute(model: Model, ranks: Ranks, section: TrainSection, compute: torch.dtype) -> None:
    """Shard a whole model, in place. Forward and backward run in `compute`; what each rank holds stays in fp32.

    A model on the meta device is sharded too: then `materialise` it.
    """
    meshes = make_meshes(ranks, section)
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        if isinstance(layer.mlp, MixtureOfExperts):
            _spread_experts(layer.mlp, meshes)
            fully_shard(layer.mlp.experts, mesh=meshes.sparse, mp_policy=policy)
        fully_shard(layer, mesh=meshes.dense, mp_policy=policy)
    fully_shard(model, mesh=meshes.dense, mp_policy=policy)
    register_fsdp_forward_method(model, "compute")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def materialise(model: Model, device: torch.device) -> None:
    """Give a model that was sharded without memory for its parameters that memory, on this rank, unfilled."""
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    if model.architecture.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight


def reduce_gradients(model: nn.Module, *, now: bool) -> None:
    """Whether the next backward pass sums its gradients over replicas; each one sums them over shards.

    So no rank holds whole gradients between microbatches, and replicas exchange theirs once.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(now)


def _spread_experts(moe: MixtureOfExperts, meshes: Meshes) -> None:
    size, place = meshes.expert.size(), meshes.expert.get_local_rank()
    if size == 1:
        return
    experts, count = moe.experts, moe.num_experts // size
    experts.first = place * count
    for name in ("gate_up", "down"):
        whole = getattr(experts, name).detach()
        setattr(experts, name, nn.Parameter(whole.narrow(0, experts.first, count).clone()))
    moe.exchange = TokenExchange(size, swap_within(meshes.expert.get_group()))


class Swap(Protocol):
    """An all-to-all: fills `arrived` with what other ranks have for this one of their `rows`.

    `receive` and `send` give the rows per rank; without them all ranks get the same share.
    """

    def __call__(
        self, arrived: Tensor, rows: Tensor, receive: list[int] | None = None, send: list[int] | None = None
    ) -> None: ...


def swap_within(group: dist.ProcessGroup) -> Swap:
    """The all-to-all of a process group."""

    def swap(arrived: Tensor, rows: Tensor, receive: list[int] | None = None, send: list[int] | None = None) -> None:
        dist.all_to_all_single(arrived, rows, receive, send, group=group)

    return swap


class TokenExchange:
    """Sends each row to the rank that holds its expert, and brings the results back (all-to-all both ways).

    `size` ranks take part. On the meta device, which has no counts, every rank gets the same share.
    """

    def __init__(self, size: int, swap: Swap):
        self.size, self.swap = size, swap

    def __call__(self, experts: nn.Module, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [N, D] sorted by expert, counts [E] of all experts. Returns the results [N, D] in the same order."""
        received = torch.empty_like(counts)
        self.swap(received, counts)
        by_sender = received.view(self.size, -1)
        both = torch.stack((counts.view(self.size, -1).sum(1), by_sender.sum(1)))
        send, receive = [evenly(len(rows), self.size)] * 2 if both.is_meta else both.tolist()
        arrived = AllToAll.apply(rows, send, receive, self.swap)
        order, inverse = _sender_to_expert(by_sender, len(arrived))
        results = experts(Rows.apply(arrived, order, inverse, None), by_sender.sum(0))
        return AllToAll.apply(Rows.apply(results, inverse, order, None), receive, send, self.swap)  # pyright: ignore


class AllToAll(torch.autograd.Function):
    """Rows [N, D], `send[r]` of them to rank r; returns `receive[r]` rows of each rank. The gradient goes back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], swap: Swap) -> Tensor:
        ctx.send, ctx.receive, ctx.swap = send, receive, swap
        return _exchange(rows, send, receive, swap)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        return _exchange(gradients[0], ctx.receive, ctx.send, ctx.swap), None, None, None


def _exchange(rows: Tensor, send: list[int], receive: list[int], swap: Swap) -> Tensor:
    arrived = rows.new_empty(sum(receive), rows.shape[1])
    swap(arrived, rows.contiguous(), receive, send)
    return arrived


def _sender_to_expert(by_sender: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The order that turns `rows` rows sorted by (sender, expert) into (expert, sender), and its inverse.

    by_sender [R, E] counts the rows of each.
    """
    senders, experts = by_sender.shape
    number = torch.arange(experts, device=by_sender.device).repeat(senders)
    expert_of_row = number.repeat_interleave(by_sender.flatten(), output_size=rows)
    order = expert_of_row.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order, inverse
