"""Muon on the hidden matrices, AdamW on everything else, behind one clipped and scheduled step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from isthmus.errors import Diverged
from isthmus.recipe.steps import OptimizerSection
from isthmus.trainer.mesh import Ranks
from isthmus.trainer.parts import Part, parts_of

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_AT_ONCE = 1 << 26
"""Numbers of the matrices that are orthogonalised at once; the iteration holds several times as many."""
_NOT_HIDDEN = ("embed_tokens", "lm_head", "mlp.gate.")


class Optimizer:
    """Updates a model's parameters, or this rank's shards of them. Its state is made of tensors that stay the same.

    `shared_by` is the number of ranks that hold the same shard; the norm of the gradient is that of the whole model.
    `parts` stand for the model's own where it is only described.
    """

    def __init__(
        self,
        model: nn.Module,
        section: OptimizerSection,
        total_steps: int,
        ranks: Ranks | None = None,
        shared_by: int = 1,
        parts: list[Part] | None = None,
    ):
        self.section, self.total_steps = section, total_steps
        self._ranks, self._shared_by = ranks, shared_by
        self._parts = parts_of(model) if parts is None else parts
        self._locals = [part.local for part in self._parts]
        pairs = list(zip(self._parts, self._locals, strict=True))
        muon = [(part, local) for part, local in pairs if section.name == "muon" and is_hidden_matrix(part)]
        names = {part.name for part, _ in muon}
        self.muon = Muon(muon) if muon else None
        self._adam_parts = [(part, local) for part, local in pairs if part.name not in names]
        self._adam = torch.optim.AdamW(
            [local for _, local in self._adam_parts],
            lr=section.learning_rate,
            betas=section.betas,
            weight_decay=section.weight_decay,
            fused=True,
        )
        for _, local in self._adam_parts:
            self._adam.state[local] = _adam_state(local)

    def zero_grad(self) -> None:
        for part in self._parts:
            part.parameter.grad = None

    def step(self, step: float) -> float:
        """Clip, update, and return the norm of the gradient before clipping.

        `step` counts from 0; a fraction is an update within a step. Raises Diverged if the norm is not finite,
        and leaves the parameters as they were.
        """
        norm = self.measure()
        self.apply(step, norm)
        return norm

    def measure(self) -> float:
        """The norm of the whole model's gradient. All ranks must call it."""
        for part, local in zip(self._parts, self._locals, strict=True):
            local.grad = part.gradient
        return self._gradient_norm()

    def apply(self, step: float, norm: float) -> None:
        """Update by the gradient that was measured. Raises Diverged as `step` does."""
        if not math.isfinite(norm):
            raise Diverged(
                f"the norm of the gradient is {norm} at step {step:g}: training has diverged, or a chip computes "
                "wrongly. Lower the learning rate, or qualify the pool again; the checkpoints before it are whole."
            )
        nn.utils.clip_grads_with_norm_(self._locals, self.section.gradient_clip, torch.tensor(norm))
        factor = self.schedule(step)
        for group in self._adam.param_groups:
            group["lr"] = self.section.learning_rate * factor
        self._adam.step()
        if self.muon is not None:
            assert self.section.matrix_learning_rate is not None
            self.muon.step(self.section.matrix_learning_rate * factor, self.section.weight_decay)
        self.forget()

    def forget(self) -> None:
        """Let go of the gradient that was measured."""
        for local in self._locals:
            local.grad = None

    def module_norms(self, count: int) -> dict[str, float]:
        """Norms of the measured gradient of `count` parameters, spread over the model. All ranks must call it."""
        spread = sorted({round(index * (len(self._parts) - 1) / max(1, count - 1)) for index in range(count)})
        grads = [self._locals[index].grad for index in spread]
        squares = torch.stack(
            [self._locals[0].new_zeros(()) if grad is None else grad.float().square().sum() for grad in grads]
        )
        if self._ranks is not None and self._ranks.world > 1:
            squares = self._ranks.total(squares)
        norms = squares.div(self._shared_by).sqrt().tolist()
        return {self._parts[index].name: norm for index, norm in zip(spread, norms, strict=True)}

    def groups(self) -> dict[str, str]:
        """What the update is made with, beside its tensors: the options of its groups, learning rates left out."""
        (group,) = self._adam.param_groups
        options = {name: str(group[name]) for name in ("betas", "eps", "weight_decay", "amsgrad", "maximize")}
        return options | {
            "parameters": str(len(group["params"])),
            "muon": str(len(self.muon.momenta) if self.muon else 0),
        }

    def schedule(self, step: float) -> float:
        """Factor on the learning rates: linear warm-up, constant, then the decay to the final rate."""
        section = self.section
        warmup = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
        decay_steps = section.decay_share * self.total_steps
        left = min(1.0, (self.total_steps - step) / decay_steps) if decay_steps else 1.0
        if section.decay == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * left)
        return min(warmup, section.final_rate + (1.0 - section.final_rate) * left)

    def state(self) -> dict[str, Tensor]:
        """Everything the next step needs, by names that do not depend on the rank. To resume, fill these tensors."""
        tensors: dict[str, Tensor] = {}
        for part, local in self._adam_parts:
            state = self._adam.state[local]
            tensors[f"adam.step.{part.name}"] = state["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                tensors.update({f"adam.{key}.{name}": value for name, value in part.stored(state[key]).items()})
        for part, momentum in self.muon.momenta if self.muon else ():
            tensors.update({f"muon.momentum.{name}": value for name, value in part.stored(momentum).items()})
        return tensors

    def _gradient_norm(self) -> float:
        gradients = [local.grad for local in self._locals if local.grad is not None and local.numel()]
        norm = nn.utils.get_total_norm(gradients).to(self._locals[0].device)
        if self._ranks is None or self._ranks.world == 1:
            return norm.item()
        return math.sqrt(self._ranks.total(norm.square()).item() / self._shared_by)


def _adam_state(local: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), device=local.device),
        "exp_avg": torch.zeros_like(local),
        "exp_avg_sq": torch.zeros_like(local),
    }


def is_hidden_matrix(part: Part) -> bool:
    """Whether Muon is meant for it: a matrix, or a stack of them, that is neither embedding, head nor router."""
    return part.parameter.dim() >= 2 and not any(name in part.name for name in _NOT_HIDDEN)


class Muon:
    """Momentum, orthogonalised by Newton-Schulz (Keller Jordan, kellerjordan.github.io/posts/muon, 2024).

    Differs from torch.optim.Muon in what this model needs: stacks of matrices, shards, and fp32 where bf16 is slow.
    Matrices of one shape are orthogonalised together. A matrix of which ranks hold rows is gathered for it; stacks of
    experts are held by whole experts.
    """

    def __init__(self, parts: list[tuple[Part, Tensor]], beta: float = 0.95):
        self.beta = beta
        self.orthogonalise: Callable[[Tensor], Tensor] = orthogonalise
        self.momenta = [(part, torch.zeros_like(local)) for part, local in parts]
        self.locals = [local for _, local in parts]
        self._by_shape: dict[tuple[int, int], list[int]] = {}
        for index, (part, _) in enumerate(parts):
            self._by_shape.setdefault((part.parameter.shape[-2], part.parameter.shape[-1]), []).append(index)

    @torch.no_grad()
    def step(self, learning_rate: float, weight_decay: float) -> None:
        for shape, indices in self._by_shape.items():
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            updates = [self._update(index).reshape(-1, *shape) for index in indices]
            sizes = [len(update) for update in updates]
            for index, update in zip(indices, self._in_parts(torch.cat(updates)).split(sizes), strict=True):
                part, local = self.momenta[index][0], self.locals[index]
                local.mul_(1.0 - learning_rate * weight_decay)
                local.add_(self._own(part, update).view_as(local), alpha=-learning_rate * scale)

    def _update(self, index: int) -> Tensor:
        """The direction before it is orthogonalised: whole matrices."""
        part, momentum = self.momenta[index]
        gradient = self.locals[index].grad
        if gradient is None:
            gradient = torch.zeros_like(momentum)
        momentum.lerp_(gradient, 1.0 - self.beta)
        direction = gradient.lerp(momentum, self.beta)
        return direction if part.experts is not None else part.whole(direction)

    def _own(self, part: Part, update: Tensor) -> Tensor:
        return update if part.experts is not None else part.own(update[0])

    def _in_parts(self, matrices: Tensor) -> Tensor:
        """Orthogonalise a stack [n, M, N], a part of it at a time; in bf16 where that is fast."""
        compute = matrices.dtype if matrices.device.type == "cpu" else torch.bfloat16
        count = max(1, _AT_ONCE // matrices[0].numel())
        return torch.cat([self.orthogonalise(part.to(compute)).to(matrices.dtype) for part in matrices.split(count)])


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of each matrix [..., M, N] towards 1 with a quintic Newton-Schulz iteration."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
