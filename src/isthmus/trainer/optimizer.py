"""Muon on the hidden matrices, AdamW on everything else, behind one clipped and scheduled step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isthmus.errors import DamagedFile
from isthmus.recipe import OptimizerSection

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NOT_HIDDEN = ("embed_tokens", "lm_head", "mlp.gate.")


class Optimizer:
    """Updates a model's parameters. Its state is a flat dictionary of tensors, for checkpoints."""

    def __init__(self, model: nn.Module, section: OptimizerSection, total_steps: int):
        self.section, self.total_steps = section, total_steps
        named = dict(model.named_parameters())
        matrices = {name: p for name, p in named.items() if section.name == "muon" and is_hidden_matrix(name, p)}
        self._named = named
        self._muon = Muon(matrices) if matrices else None
        rest = {name: p for name, p in named.items() if name not in matrices}
        self._adam_names = list(rest)
        self._adam = torch.optim.AdamW(
            list(rest.values()),
            lr=section.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=section.weight_decay,
            fused=True,
        )

    def zero_grad(self) -> None:
        for parameter in self._named.values():
            parameter.grad = None

    def step(self, step: float) -> float:
        """Clip, update, and return the norm of the gradient before clipping.

        `step` counts from 0; a fraction is an update within a step.
        """
        norm = nn.utils.clip_grad_norm_(self._named.values(), self.section.gradient_clip, error_if_nonfinite=True)
        factor = self.schedule(step)
        for group in self._adam.param_groups:
            group["lr"] = self.section.learning_rate * factor
        self._adam.step()
        if self._muon is not None:
            assert self.section.matrix_learning_rate is not None
            self._muon.step(self.section.matrix_learning_rate * factor, self.section.weight_decay)
        return norm.item()

    def schedule(self, step: float) -> float:
        """Factor on the learning rates: linear warm-up, constant, linear decay to 0 over the last decay_share."""
        warmup = min(1.0, (step + 1) / self.section.warmup_steps) if self.section.warmup_steps else 1.0
        decay_steps = self.section.decay_share * self.total_steps
        decay = min(1.0, (self.total_steps - step) / decay_steps) if decay_steps else 1.0
        return min(warmup, decay)

    def state(self) -> dict[str, Tensor]:
        """Everything the next step needs, by name."""
        tensors: dict[str, Tensor] = {}
        for index, entry in self._adam.state_dict()["state"].items():
            for key, value in entry.items():
                tensors[f"adam.{key}.{self._adam_names[index]}"] = value
        if self._muon is not None:
            tensors.update({f"muon.momentum.{name}": value for name, value in self._muon.momentum.items()})
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take up a state that `state` gave for the same model and recipe."""
        adam: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, key, parameter = name.split(".", 2)
            if parameter not in self._named:
                raise DamagedFile(
                    f"the optimiser state names the parameter {parameter!r}, which this model does not have"
                )
            if kind == "adam":
                adam.setdefault(self._adam_names.index(parameter), {})[key] = value
            elif self._muon is not None:
                self._muon.momentum[parameter].copy_(value)
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": adam, "param_groups": groups})


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon is meant for it: a matrix, or a stack of them, that is neither embedding, head nor router."""
    return parameter.dim() >= 2 and not any(part in name for part in _NOT_HIDDEN)


class Muon:
    """Momentum, orthogonalised by Newton-Schulz (Keller Jordan, kellerjordan.github.io/posts/muon, 2024).

    Differs from torch.optim.Muon in what this model needs: stacks of matrices, and fp32 where bf16 is slow. Matrices of
    one shape are orthogonalised together.
    """

    def __init__(self, matrices: dict[str, nn.Parameter], momentum: float = 0.95):
        self.beta = momentum
        self.momentum = {name: torch.zeros_like(parameter) for name, parameter in matrices.items()}
        self._parameters = matrices
        self._by_shape: dict[tuple[int, int], list[str]] = {}
        for name, parameter in matrices.items():
            self._by_shape.setdefault((parameter.shape[-2], parameter.shape[-1]), []).append(name)

    @torch.no_grad()
    def step(self, learning_rate: float, weight_decay: float) -> None:
        for shape, names in self._by_shape.items():
            updates = [self._nesterov(name).reshape(-1, *shape) for name in names]
            sizes = [len(update) for update in updates]
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for name, update in zip(names, orthogonalise(torch.cat(updates)).split(sizes), strict=True):
                parameter = self._parameters[name]
                parameter.mul_(1.0 - learning_rate * weight_decay)
                parameter.add_(update.view_as(parameter), alpha=-learning_rate * scale)

    def _nesterov(self, name: str) -> Tensor:
        gradient, momentum = self._parameters[name].grad, self.momentum[name]
        if gradient is None:
            gradient = torch.zeros_like(momentum)
        momentum.lerp_(gradient, 1.0 - self.beta)
        return gradient.lerp(momentum, self.beta)


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
