"""What models with quantised layers share: modules that keep their numbers, and their places among the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from isthmus.formats.parts.assemble import fill, unfilled
from isthmus.model.model import Model
from isthmus.model.moe import Experts, GatedMlp
from isthmus.recipe.architecture import ModelSection

MakeLinear = Callable[[str, int, bool], "nn.Module | None"]
"""Path of a linear module, its inputs and whether it has a bias, to the quantised one; None if it stays in float."""


class QuantisedModule(nn.Module):
    """A module whose quantised values and scales keep their dtype when the model around it is converted to another.

    A model that computes in bf16 still has scales in fp32. What follows the model are the bias, which is no part of the
    quantisation, and the buffers that `FOLLOWING` names.
    """

    FOLLOWING: frozenset[str] = frozenset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: self._buffers[name] for name in self._non_persistent_buffers_set - self.FOLLOWING}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class ExpertList(nn.Module):
    """The routed experts of a layer one by one, each a gated MLP. The state has the published names."""

    def __init__(self, experts: list[GatedMlp]):
        super().__init__()
        self.total, self.limit = len(experts), experts[0].limit
        for index, expert in enumerate(experts):
            self.add_module(str(index), expert)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [N, D], sorted by expert; `counts` [E] of its rows belong to each. Returns [N, D]."""
        parts = zip(self.children(), x.split(counts.tolist()), strict=True)
        return torch.cat([expert(rows) for expert, rows in parts])

    def parts(self, index: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """The products of one expert, by name: of rows [N, D] or [N, M]."""
        expert = self.get_submodule(str(index))
        assert isinstance(expert, GatedMlp)
        return {
            "gate_up_proj": lambda x: torch.cat((expert.gate_proj(x), expert.up_proj(x)), dim=-1),
            "down_proj": expert.down_proj,
        }


def replace_linears(module: nn.Module, make: MakeLinear, prefix: str = "") -> None:
    """Put what `make` returns in the place of each linear layer below `module`, and of the stacked experts' layers."""
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}"
        if isinstance(child, nn.Linear):
            if (made := make(path, child.in_features, child.bias is not None)) is not None:
                setattr(module, name, made)
        elif isinstance(child, Experts):
            setattr(module, name, expert_list(child, make, path))
        else:
            replace_linears(child, make, f"{path}.")


def expert_list(experts: Experts, make: MakeLinear, path: str) -> ExpertList:
    """Experts one by one, without values where `make` leaves a linear layer in float."""
    count, hidden, width = experts.down.shape
    with torch.device("meta"):
        listed = ExpertList([GatedMlp(hidden, width, experts.limit) for _ in range(count)])
    replace_linears(listed, make, f"{path}.")
    return listed


def build_with(architecture: ModelSection, tensors: dict[str, Tensor], make: MakeLinear) -> Model:
    """A model with the quantised modules of `make`, and what it holds beside them from `tensors` in fp32."""
    model = unfilled(architecture)
    replace_linears(model, make)
    return fill(model, {name: tensors[name].float() for name in model.state_dict() if name in tensors})
