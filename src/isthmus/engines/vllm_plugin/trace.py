"""Which element of a checkpoint's tensor went where, watched while an engine's own loaders copy.

Loaders fuse, cut and pad in many ways, and each ends in copies from a view of the checkpoint's tensor to a view of a
parameter. What does not go through such a copy is not known, and said to be so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .checksums import Piece, Place, piece_of

_COPIES = (torch.ops.aten.copy_.default,)
_CLONES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)


@dataclass(frozen=True)
class Copied:
    """Elements at `source` of the checkpoint's tensor `name`, in order at `target` of the parameter `parameter`.

    `name` is None if what was copied is no part of a tensor of the checkpoint.
    """

    name: str | None
    source: Place
    parameter: str
    target: Place


class Tracing(TorchDispatchMode):
    """`copies` into `parameters`, where they can be told from `sources`, contiguous tensors by name."""

    def __init__(self, sources: Mapping[str, Tensor], parameters: Mapping[str, Tensor]):
        super().__init__()
        self.copies: list[Copied] = []
        self._sources = {_storage(tensor): (name, tensor) for name, tensor in sources.items() if tensor.numel()}
        self._targets = {_storage(tensor): name for name, tensor in parameters.items() if tensor.numel()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _COPIES:
            self._note(args[0], args[1])
        elif func in _CLONES:
            self._follow(args[0], result)
        return result

    def _note(self, target: Tensor, source: Tensor) -> None:
        parameter = self._targets.get(_storage(target)) if target.numel() else None
        if parameter is None:
            return
        known = self._sources.get(_storage(source))
        taken, given = _once(source.expand(target.shape), target)
        self.copies.append(Copied(known and known[0], Place.of(taken), parameter, Place.of(given)))

    def _follow(self, source: Tensor, result: Tensor) -> None:
        """A whole copy on another device, or in another type, stands for its source. It is kept, and with it its
        address."""
        known = self._sources.get(_storage(source)) if source.numel() else None
        whole = known is not None and source.numel() == known[1].numel() and source.is_contiguous()
        if known is not None and whole and result.is_contiguous():
            self._sources[_storage(result)] = (known[0], result)


class Ledger:
    """What of a checkpoint lies in which parameter. Later copies to the same place count instead of earlier ones."""

    def __init__(self, copies: Iterable[Copied]):
        self.copies = list({(one.parameter, one.target): one for one in copies}.values())

    @property
    def names(self) -> set[str]:
        """The tensors of the checkpoint of which anything was copied."""
        return {one.name for one in self.copies if one.name is not None}

    @property
    def parameters(self) -> set[str]:
        """The parameters into which anything was copied."""
        return {one.parameter for one in self.copies}

    def part(self, parameter: str) -> Ledger:
        """What lies in one parameter."""
        return Ledger(one for one in self.copies if one.parameter == parameter)

    def of_module(self, module: str) -> set[str]:
        """The tensors of the checkpoint in the parameters of a module."""
        return Ledger(one for one in self.copies if one.parameter.rpartition(".")[0] == module).names

    def fits(self, tensor: Tensor) -> bool:
        """Whether all places lie in the storage of a tensor."""
        last = max((one.target.last for one in self.copies), default=-1)
        return last < tensor.untyped_storage().nbytes() // max(tensor.element_size(), 1)

    def pieces(self, parameters: Mapping[str, Tensor]) -> dict[str, list[Piece]]:
        """Of each tensor of the checkpoint what lies in these parameters."""
        found: dict[str, list[Piece]] = {}
        for one in self.copies:
            if one.name is not None and one.parameter in parameters:
                values = _at(parameters[one.parameter], one.target)
                found.setdefault(one.name, []).append(piece_of(values, one.source))
        return found


def expected_pieces(pieces: list[Piece], tensor: Tensor) -> list[Piece]:
    """The same pieces of the checkpoint's own tensor, cast as the engine did."""
    flat = tensor.contiguous().reshape(-1)
    return [piece_of(one.place.of_flat(flat).to(getattr(torch, one.dtype)), one.place) for one in pieces]


def _at(parameter: Tensor, place: Place) -> Tensor:
    return torch.as_strided(parameter.detach(), place.size, place.stride, place.offset)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _once(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Without dimensions of one element, and of those that repeat the source only the first."""
    for axis in reversed(range(target.dim())):
        if target.size(axis) == 1 or source.stride(axis) == 0:
            source, target = source.select(axis, 0), target.select(axis, 0)
    return source, target
