"""What one rank holds of a model: whole parameters, or its shards of them, under names that do not depend on the rank.

A stack of routed experts is held by whole experts, so each of them has a name and a shape of its own wherever it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from isthmus.formats.files.published import Checkpoint, StoredTensors
from isthmus.formats.parts.assemble import EMBEDDING, HEAD
from isthmus.model.model import Model
from isthmus.model.moe import Experts, published


@dataclass(frozen=True)
class Part:
    """A parameter as this rank holds it. `experts` is the module of a stack of experts."""

    name: str
    parameter: nn.Parameter
    experts: Experts | None

    @property
    def local(self) -> Tensor:
        """This rank's shard, or the whole parameter; shares its storage."""
        tensor = self.parameter.detach()
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    @property
    def gradient(self) -> Tensor | None:
        gradient = self.parameter.grad
        return gradient.to_local() if isinstance(gradient, DTensor) else gradient

    @property
    def rows(self) -> tuple[int, int]:
        """(first row, number of rows) of the shard."""
        total = self.parameter.shape[0]
        if not isinstance(self.parameter, DTensor):
            return 0, total
        dimension = _sharded_dimension(self.parameter)
        size = math.ceil(total / self.parameter.device_mesh.size(dimension))
        first = min(size * self.parameter.device_mesh.get_local_rank(dimension), total)
        return first, min(size, total - first)

    def whole(self, local: Tensor) -> Tensor:
        """The tensor of which every rank holds a shard like this parameter's. All ranks must call it."""
        wrapped = self._wrapped(local)
        return wrapped.full_tensor() if isinstance(wrapped, DTensor) else wrapped

    def own(self, whole: Tensor) -> Tensor:
        """This rank's rows of a whole tensor."""
        return whole.narrow(0, *self.rows)

    def stored(self, local: Tensor) -> dict[str, Tensor]:
        """`local`, shaped as this rank's shard, under the published names; one entry per expert of a stack."""
        if self.experts is None:
            return {self.name: self._wrapped(local)}
        prefix, _, parameter = self.name.rpartition(".")
        named = published(parameter, local, self.experts.first + self.rows[0])
        return {f"{prefix}.{name}": tensor for name, tensor in named.items()}

    def _wrapped(self, local: Tensor) -> Tensor:
        parameter = self.parameter
        if not isinstance(parameter, DTensor):
            return local
        return DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def parts_of(model: nn.Module) -> list[Part]:
    """Every parameter once, in the order of the model."""
    stacks = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    return [Part(name, parameter, stacks.get(name.rpartition(".")[0])) for name, parameter in model.named_parameters()]


def model_state(model: Model) -> dict[str, Tensor]:
    """The tensors of a model that may be sharded, under the published names; they share its storage."""
    state: dict[str, Tensor] = {}
    for part in parts_of(model):
        state.update(part.stored(part.local))
    stored = _stored_buffers(model)
    state.update({name: buffer for name, buffer in model.named_buffers() if name in stored})
    if model.architecture.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    return state


@torch.no_grad()
def initialise(model: Model, seed: int) -> None:
    """Fill what this rank holds of a model with its initial values."""
    receive = Receiver(model)
    for name, value in model.initial_values(seed, receive.wants):
        receive(name, value)
    for router in model.routers():
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.zero_()


def load_published(model: Model, folder: Path) -> list[str]:
    """Fill `model`, or what this rank holds of it, from a checkpoint in Hugging Face layout, tensor by tensor.

    Returns in words what the folder holds beyond the model, such as an MTP layer that the recipe does without: the
    caller tells the user. Raises IsthmusError naming missing, extra, mis-shaped or quantised tensors, and DamagedFile
    naming a file that is missing or not whole, or a tensor with a number that is not finite; the model is untouched
    then.
    """
    with StoredTensors(folder) as stored:
        checkpoint = Checkpoint(stored, model.architecture)
        receive = Receiver(model)
        checkpoint.check_values(receive.wants)
        for name, tensor in checkpoint.tensors(receive.wants):
            receive(name, tensor)
        return checkpoint.left_out


class Receiver:
    """Copies whole tensors, by their published names, to what this rank holds of them."""

    def __init__(self, model: Model):
        stored = _stored_buffers(model)
        self._parts = {part.name: part for part in parts_of(model) if part.experts is None}
        self._views = {name: buffer for name, buffer in model.named_buffers() if name in stored}
        for part in parts_of(model):
            if part.experts is not None:
                self._views.update(part.stored(part.local))

    def wants(self, name: str) -> bool:
        """Whether this rank holds any of the tensor."""
        return name in self._parts or name in self._views

    @torch.no_grad()
    def __call__(self, name: str, tensor: Tensor) -> None:
        if name in self._views:
            self._views[name].copy_(tensor)
        elif name in self._parts:
            self._parts[name].local.copy_(self._parts[name].own(tensor))


def _stored_buffers(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }


def _sharded_dimension(parameter: DTensor) -> int:
    """The dimension of the mesh over which rows are sharded."""
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, f"sharded along {placement.dim}"
            return dimension
        assert isinstance(placement, Replicate), placement
    raise AssertionError("not sharded")
