"""The weights that a target holds once it has loaded them, bit by bit against those of the emulator.

A loader that swaps two experts, keeps a stale matrix or flips one bit gives outputs that rounding can hide. Where the
target is a model in this process, whatever its device, its tensors can be read back, and nothing hides.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isthmus.formats.parts.assemble import EMBEDDING, HEAD
from isthmus.formats.parts.pieces import LentExperts, Pieces, pieces_of
from isthmus.model.layer import ResidualLayer
from isthmus.model.model import Model
from isthmus.records import Check

NAME = "weights as loaded"
LAYERS = "model.layers."
PARAMETER, BUFFER, ADDED = range(3)
AFTER_THE_LAYERS = 2**31


class Loaded:
    """Compares the tensors of a target with those of the emulator, a layer at a time, while both are at hand.

    A target in a narrower float type must hold the emulator's values rounded to it. What is compared stays small: one
    tensor at a time is brought to the CPU, and of a large embedding and output head some rows.
    """

    def __init__(self, emulator: Model, target: Model):
        self.emulator, self.target = emulator, target
        self._compared = 0
        self._problems: list[tuple[int, int, str, str]] = []

    def look(self, layer: str | None, expert: int | None) -> None:
        """Compare a layer, one expert of it that is in memory alone, or, for None, what lies outside the layers."""
        if expert is not None:
            path = f"{layer}.mlp.experts"
            both = (_expert(model.get_submodule(path), expert) for model in (self.emulator, self.target))
            self._compare(*(_tensors(one, f"{path}.{expert}.") for one in both))
        elif layer is not None:
            self._compare(*(_tensors(_part(model, layer), f"{layer}.") for model in (self.emulator, self.target)))
        else:
            self._compare(*(_outside(model) for model in (self.emulator, self.target)))
            if (pieces := pieces_of(self.emulator)) is not None:
                for name in (EMBEDDING, HEAD):
                    self._compare_rows(name, pieces)

    def checks(self) -> list[Check]:
        """One failing check per module whose tensors differ, in the order of the model, or one that passes."""
        failed: dict[str, Check] = {}
        for _, _, path, problem in sorted(self._problems, key=lambda one: one[:2]):
            module, operator = _split(self.emulator, path)
            if module not in failed:
                failed[module] = Check(
                    layer="modules",
                    name=NAME,
                    outcome="fail",
                    detail=f"{path} {problem}",
                    module=module,
                    operator=operator,
                )
        if failed:
            return list(failed.values())
        detail = f"all {self._compared} tensors of the target are the emulator's"
        return [Check(layer="modules", name=NAME, outcome="pass", detail=detail)]

    def _compare(self, expected: dict[str, tuple[int, Tensor]], found: dict[str, tuple[int, Tensor]]) -> None:
        self._compared += len(expected)
        for path in [*expected, *(path for path in found if path not in expected)]:
            kind, wanted = expected.get(path, (ADDED, None))
            _, given = found.get(path, (ADDED, None))
            if (problem := _difference(wanted, given)) is not None:
                self._problems.append((kind, _place(path), path, problem))

    def _compare_rows(self, name: str, pieces: Pieces) -> None:
        self._compared += 1
        for rows in pieces.head_blocks():
            wanted, given = (_rows(model, name, rows) for model in (self.emulator, self.target))
            if (problem := _difference(wanted, given)) is not None:
                where = "" if len(rows) == self.emulator.architecture.vocab_size else f", of rows from {rows.start} on"
                self._problems.append((PARAMETER, _place(name), name, f"{problem}{where}"))
                return


def _tensors(module: nn.Module | None, prefix: str) -> dict[str, tuple[int, Tensor]]:
    if module is None:
        return {}
    parameters = {f"{prefix}{name}": (PARAMETER, one) for name, one in module.named_parameters()}
    return parameters | {f"{prefix}{name}": (BUFFER, one) for name, one in module.named_buffers()}


def _outside(model: Model) -> dict[str, tuple[int, Tensor]]:
    """What lies outside the layers; without embedding and head, which are compared row by row."""
    found = {name: one for name, one in _tensors(model, "").items() if not name.startswith(LAYERS)}
    return {name: one for name, one in found.items() if name not in (EMBEDDING, HEAD)}


def _part(model: Model, path: str) -> nn.Module | None:
    return _module(model, path.split("."))


def _expert(experts: nn.Module, index: int) -> nn.Module | None:
    return experts.expert(index) if isinstance(experts, LentExperts) else None


def _rows(model: Model, name: str, rows: range) -> Tensor | None:
    if (pieces := pieces_of(model)) is not None:
        wanted = torch.arange(rows.start, rows.stop)
        return (pieces.head_rows(rows) if name == HEAD else pieces.embedding_rows(wanted)).weight
    module = _part(model, name.rpartition(".")[0])
    weight = getattr(module, "weight", None)
    return weight[rows.start : rows.stop] if isinstance(weight, Tensor) else None


def _place(path: str) -> int:
    """Where a tensor stands in the order of the model."""
    if path.startswith(LAYERS):
        return int(path.split(".")[2])
    return -1 if path == EMBEDDING else AFTER_THE_LAYERS


def _difference(expected: Tensor | None, found: Tensor | None) -> str | None:
    if expected is None or found is None:
        return "is in the target alone" if expected is None else "is missing in the target"
    if expected.shape != found.shape:
        return f"has the shape {list(found.shape)} and should have {list(expected.shape)}"
    here = found.detach().to("cpu")
    wanted = expected.detach().to(here.dtype)
    if torch.equal(here, wanted):
        return None
    differs = here != wanted
    first = torch.nonzero(differs)[0].tolist()
    return f"differs in {int(differs.sum())} of {differs.numel()} values, first at {first}"


def _split(model: Model, path: str) -> tuple[str, str | None]:
    """Attention, MLP or norm of a layer, or a part outside the layers; and the path of the tensor in it."""
    parts = path.split(".")
    for size in range(1, len(parts)):
        if isinstance(_module(model, parts[:size]), ResidualLayer):
            inside = parts[size + 1 :]
            return ".".join(parts[: size + 1]), ".".join(inside[:-1]) or None
    return ".".join(parts[:-1]), None


def _module(model: Model, parts: list[str]) -> nn.Module | None:
    found: nn.Module | None = model
    for part in parts:
        found = getattr(found, part, None)
        if not isinstance(found, nn.Module):
            return None
    return found
