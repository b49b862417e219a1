"""One training step: losses with denominators of the whole batch, accumulated over microbatches and ranks.

Also the log-probabilities that reinforcement training needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from isthmus.model.documents import Documents
from isthmus.model.model import Model
from isthmus.model.moe import Router, Trace, sequence_balance_sums
from isthmus.recipe.architecture import MixtureSection
from isthmus.recipe.steps import TextSection
from isthmus.trainer.batch import Batch
from isthmus.trainer.mesh import Ranks, alone
from isthmus.trainer.optimizer import Optimizer
from isthmus.trainer.parallel import reduce_gradients

LOGITS_AT_ONCE = 1 << 25
"""Logits that are held at once for a loss: 128 MiB in fp32. Beyond it they are computed again in the backward pass."""


@dataclass
class StepLosses:
    """Means over the whole batch, of all ranks. `loads` holds one [E] tensor of token counts per MoE layer.

    `balance_loss` is the mean over layers; what is differentiated is their sum, as in DeepSeek's and Megatron's code.
    """

    loss: float
    mtp_loss: float
    balance_loss: float
    loads: list[Tensor]
    tokens: int

    def on_host(self) -> StepLosses:
        """The same, with the loads on the CPU: one transfer for all layers."""
        return replace(self, loads=list(torch.stack(self.loads).cpu())) if self.loads else self


def train_step(
    model: Model,
    optimizer: Optimizer,
    batch: Batch,
    section: TextSection,
    step: int,
    ranks: Ranks | None = None,
    rows_at_once: int | None = None,
) -> tuple[StepLosses, float]:
    """One step, router biases included: (losses, norm of the gradient before clipping).

    `batch` holds this rank's rows, on the CPU; `rows_at_once` of them make a microbatch.
    """
    losses = accumulate_gradients(model, optimizer, batch, section, ranks, rows_at_once)
    gradient_norm = optimizer.step(step)
    update_router_bias(model.routers(), losses.loads, section.bias_update_speed)
    return losses, gradient_norm


def accumulate_gradients(
    model: Model,
    optimizer: Optimizer,
    batch: Batch,
    section: TextSection,
    ranks: Ranks | None = None,
    rows_at_once: int | None = None,
) -> StepLosses:
    """The losses of a step, with their gradients in the parameters and none from before."""
    ranks = ranks or alone(next(model.parameters()).device)
    optimizer.zero_grad()
    counts = ranks.total(batch.counts().to(ranks.device)).clamp(min=1)
    parts = list(_microbatches(batch, rows_at_once, ranks))
    sums = torch.zeros(0)
    for index, part in enumerate(parts):
        reduce_gradients(model, now=index == len(parts) - 1)
        spans = Documents.of(part.document, model.architecture.num_attention_heads).to(ranks.device)
        documents = max(1, part.num_documents)
        total, found = model.compute(microbatch_losses, part.to(ranks.device), spans, documents, counts, section)
        total.backward()
        sums = found if index == 0 else sums + found
    return _step_losses(model, ranks.total(sums), counts)


def _microbatches(batch: Batch, rows_at_once: int | None, ranks: Ranks) -> Iterator[Batch]:
    """The rows in parts of one size, as many on each rank; rows without a document fill up."""
    parts = row_parts(len(batch.tokens), rows_at_once, ranks)
    filled = batch.with_rows(parts[-1].stop)
    for part in parts:
        yield filled.select(part)


def row_parts(rows: int, rows_at_once: int | None, ranks: Ranks) -> list[range]:
    """Ranges of one size that cover this rank's rows, or more than it has: as many as the rank with the most needs."""
    most = torch.tensor([rows], device=ranks.device)
    if ranks.world > 1:
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    size = min(rows_at_once or int(most), int(most))
    return [range(start, start + size) for start in range(0, int(most), size)]


def microbatch_losses(
    model: Model, batch: Batch, spans: Documents, documents: int, counts: Tensor, section: TextSection
) -> tuple[Tensor, Tensor]:
    """(what is differentiated, sums of its parts and the load of each expert) of one microbatch.

    `counts` are those of Batch.counts, summed over all microbatches and ranks.
    """
    targets, mtp_targets, all_documents, _ = counts.unbind()
    size = model.architecture.vocab_size
    trace = Trace()
    hidden = model.hidden(batch.tokens, batch.positions, spans, trace=trace)
    sequences = [batch.sequence.flatten()] * len(trace.routings)
    chosen = batch.target_mask[:, 1:]
    loss = _summed_cross_entropy(model.logits, size, hidden[:, :-1][chosen], batch.tokens[:, 1:][chosen])
    total = loss / targets
    mtp_loss = balance = loss.new_zeros(())
    if model.mtp_layer is not None and section.mtp_weight > 0:
        states = model.mtp_states(hidden, batch.tokens, batch.positions, spans, trace)
        sequences += [batch.mtp_sequence.flatten()] * (len(trace.routings) - len(sequences))
        chosen = batch.mtp_mask
        mtp_loss = _summed_cross_entropy(model.lm_head, size, states[:, :-2][chosen], batch.tokens[:, 2:][chosen])
        total = total + section.mtp_weight * mtp_loss / mtp_targets
    if section.balance_alpha > 0 and trace.routings:
        parts = [sequence_balance_sums(r, s, documents) for r, s in zip(trace.routings, sequences, strict=True)]
        balance = torch.stack(parts).mean()
        total = total + section.balance_alpha * len(parts) * balance / all_documents
    loads = [routing.load(s >= 0) for routing, s in zip(trace.routings, sequences, strict=True)]
    return total, torch.cat([torch.stack((loss, mtp_loss, balance)).detach(), *loads])


def _summed_cross_entropy(head: Callable[[Tensor], Tensor], vocabulary: int, states: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of states [N, D] of the cross entropy, in fp32 at least, with `targets` [N]."""

    def one(part: Tensor, wanted: Tensor) -> Tensor:
        logits = head(part)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted, reduction="sum")

    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    if len(states) <= rows:
        return one(states, targets)
    pairs = zip(states.split(rows), targets.split(rows), strict=True)
    return torch.stack([checkpoint(one, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]).sum()


def _step_losses(model: Model, sums: Tensor, counts: Tensor) -> StepLosses:
    a = model.architecture
    loads = (
        sums[3:].view(len(sums[3:]) // a.n_routed_experts, a.n_routed_experts) if isinstance(a, MixtureSection) else ()
    )
    loss, mtp_loss, balance = (sums[:3] / counts[:3]).tolist()
    return StepLosses(loss, mtp_loss, balance, list(loads), int(counts[3]))


@torch.no_grad()
def update_router_bias(routers: list[Router], loads: list[Tensor], speed: float) -> None:
    """Auxiliary-loss-free balancing (arXiv 2408.15664): b += speed * sign(mean load - load), once per step.

    The last router has no load where multi-token prediction is not trained. Qwen3's routers have no bias, and stay.
    """
    for router, load in zip(routers, loads, strict=False):
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.add_(torch.sign(load.mean() - load), alpha=speed)


def target_logprobs(
    model: Model, batch: Batch, temperature: float, routes: Tensor | None = None, left_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(log-probability, entropy) of each target, both [number of targets], row by row in the order of `target_mask`.

    They are of the distribution softmax(logits / temperature), the one that was sampled. `routes` [B, T, layers, K] are
    experts that another pass has chosen, which take the place of the routers' own where they are not -1. `left_out`
    [number of targets, V] is true for tokens that a target was not drawn among: the others are normalised alone.
    Prompts that documents share are computed once.
    """
    heads, device = model.architecture.num_attention_heads, batch.document.device
    spans = Documents.of(batch.document.cpu(), heads, batch.positions.cpu()).to(device)
    trace = None if routes is None else Trace(routes)
    hidden = model.hidden(batch.tokens, batch.positions, spans, trace=trace)
    chosen = batch.target_mask[:, 1:]
    states = hidden.flatten(0, 1)[batch.before[:, 1:][chosen]] if batch.shares_prompts else hidden[:, :-1][chosen]
    logits = model.logits(states) / temperature
    if left_out is not None:
        logits = logits.masked_fill(left_out, float("-inf"))
    log_probabilities = F.log_softmax(logits, dim=-1)
    taken = log_probabilities.gather(-1, batch.tokens[:, 1:][chosen].unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        finite = log_probabilities if left_out is None else log_probabilities.masked_fill(left_out, 0.0)
        entropy = -(log_probabilities.exp() * finite).sum(-1)
    return taken, entropy
