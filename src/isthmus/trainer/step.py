"""The losses of one step, for supervised training, and the log-probabilities that reinforcement training needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.model.model import Model, document_mask
from isthmus.model.moe import Router, Routing, sequence_balance_loss
from isthmus.recipe import SftSection
from isthmus.trainer.batch import Batch
from isthmus.trainer.optimizer import Optimizer


@dataclass
class StepLosses:
    """`total` is what is differentiated. `loads` holds one [E] tensor of token counts per MoE layer."""

    total: Tensor
    loss: float
    mtp_loss: float
    balance_loss: float
    loads: list[Tensor]


def sft_losses(model: Model, batch: Batch, *, mtp_weight: float, balance_alpha: float) -> StepLosses:
    """Cross entropy on the targets, plus mtp_weight times that of multi-token prediction, plus the balance loss."""
    mask = document_mask(batch.document)
    trace: list[Routing] = []
    hidden = model.hidden(batch.tokens, batch.positions, mask, trace=trace)
    chosen = batch.target_mask[:, 1:]
    loss = F.cross_entropy(model.logits(hidden[:, :-1][chosen]), batch.tokens[:, 1:][chosen])
    total = loss
    mtp_loss = hidden.new_zeros(())
    if model.mtp_layer is not None and mtp_weight > 0:
        mtp_loss = _mtp_loss(model, hidden, batch, mask, trace)
        total = total + mtp_weight * mtp_loss
    balance = hidden.new_zeros(())
    if balance_alpha > 0 and trace:
        balance = torch.stack([_balance(routing, batch) for routing in trace]).mean()
        total = total + balance_alpha * balance
    return StepLosses(total, loss.item(), mtp_loss.item(), balance.item(), [routing.load() for routing in trace])


def sft_backward(model: Model, optimizer: Optimizer, batch: Batch, section: SftSection) -> StepLosses:
    """The losses of one batch, with their gradients in the parameters and none from before."""
    optimizer.zero_grad()
    losses = sft_losses(model, batch, mtp_weight=section.mtp_weight, balance_alpha=section.balance_alpha)
    losses.total.backward()
    return losses


def sft_step(
    model: Model, optimizer: Optimizer, batch: Batch, section: SftSection, step: int
) -> tuple[StepLosses, float]:
    """One step of supervised fine-tuning, router biases included: (losses, norm of the gradient before clipping)."""
    losses = sft_backward(model, optimizer, batch, section)
    gradient_norm = optimizer.step(step)
    update_router_bias(model.routers(), losses.loads, section.bias_update_speed)
    return losses, gradient_norm


def _mtp_loss(model: Model, hidden: Tensor, batch: Batch, mask: Tensor, trace: list[Routing]) -> Tensor:
    logits = model.mtp_logits(hidden, batch.tokens, batch.positions, mask, trace)
    same_document = (batch.document[:, 2:] == batch.document[:, :-2]) & batch.target_mask[:, 2:]
    return F.cross_entropy(logits[:, :-1][same_document], batch.tokens[:, 2:][same_document])


def _balance(routing: Routing, batch: Batch) -> Tensor:
    rows, length = batch.tokens.shape[0], routing.scores.shape[0] // batch.tokens.shape[0]
    sequence = torch.arange(rows, device=routing.scores.device).repeat_interleave(length)
    return sequence_balance_loss(routing, sequence, rows)


@torch.no_grad()
def update_router_bias(routers: list[Router], loads: list[Tensor], speed: float) -> None:
    """Auxiliary-loss-free balancing (arXiv 2408.15664): b += speed * sign(mean load - load), once per step."""
    for router, load in zip(routers, loads, strict=True):
        router.e_score_correction_bias.add_(torch.sign(load.mean() - load), alpha=speed)


def target_logprobs(model: Model, batch: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probability, entropy) of each target, both [number of targets], row by row in the order of `target_mask`.

    They are of the distribution softmax(logits / temperature), the one that was sampled.
    """
    hidden = model.hidden(batch.tokens, batch.positions, document_mask(batch.document))
    chosen = batch.target_mask[:, 1:]
    log_probabilities = F.log_softmax(model.logits(hidden[:, :-1][chosen]) / temperature, dim=-1)
    taken = log_probabilities.gather(-1, batch.tokens[:, 1:][chosen].unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return taken, entropy
