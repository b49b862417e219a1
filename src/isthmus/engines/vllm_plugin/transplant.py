"""Exchanging what two models of the same make hold: the one that serves, and one that was loaded beside it.

An engine's layers do not only hold parameters. What they computed of them when they were loaded (packed weights, kernel
objects, products for attention) hangs on the layers and on plain objects below them. All that a fresh model has of its
weights is exchanged, by reference or, where nothing else of a layer changed, by content. To exchange once more takes it
back. The serving model keeps its modules, and so its caches and whoever knows them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_DEEPEST = 3
_TORCH_OWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"}
_CACHES = {"kv_cache"}
"""Attributes that belong to the serving model alone."""


class Misfit(Exception):
    """The two models are not of the same make, or cannot be exchanged while the engine runs."""


@dataclass(frozen=True)
class Slot:
    """One place where a model keeps something: `holder[key]`, below the module `module`. `path` names it in a model."""

    path: str
    module: str
    holder: dict[str, Any] = field(compare=False, repr=False)
    key: str = ""

    @property
    def value(self) -> Any:
        return self.holder.get(self.key)


def slots(model: nn.Module) -> dict[str, Slot]:
    """Every place of a model by its path: parameters, buffers, and attributes of modules and of objects below them."""
    found: dict[str, Slot] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        for slot in _of_module(name, module, seen):
            found[slot.path] = slot
    return found


def _of_module(name: str, module: nn.Module, seen: set[int]) -> Iterator[Slot]:
    for holder in (module._parameters, module._buffers):
        for key in list(holder):
            yield Slot(f"{name}.{key}".lstrip("."), name, holder, key)
    yield from _below(name, name, vars(module), seen, 0)


def _below(path: str, module: str, holder: dict[str, Any], seen: set[int], depth: int) -> Iterator[Slot]:
    for key in list(holder):
        if depth == 0 and (key in _TORCH_OWN or key.endswith("_hooks") or key.startswith("_hook")):
            continue
        if key in _CACHES:
            continue
        value = holder[key]
        yield Slot(f"{path}.{key}".lstrip("."), module, holder, key)
        if depth < _DEEPEST and _is_plain(value) and id(value) not in seen:
            seen.add(id(value))
            yield from _below(f"{path}.{key}", module, vars(value), seen, depth + 1)


def _is_plain(value: Any) -> bool:
    """An object with attributes of its own, which is no module, tensor, class, function or configuration."""
    kind = type(value)
    if isinstance(value, nn.Module | Tensor | type | torch.dtype | torch.device) or callable(
        getattr(value, "__wrapped__", None)
    ):
        return False
    return (
        isinstance(getattr(value, "__dict__", None), dict)
        and "config" not in kind.__module__
        and not _is_function(value)
    )


def _is_function(value: Any) -> bool:
    return type(value).__name__ in ("function", "method", "builtin_function_or_method", "partial", "module")


@dataclass(frozen=True)
class Pair:
    """A place in the serving model and the same one in the fresh one. `by_content`: only the elements change sides."""

    live: Slot
    fresh: Slot
    by_content: bool


class Transplant:
    """Made of a fresh model while it is loaded: `begin` before, `end` after. `graphs` says that addresses of the
    serving model are known to recorded graphs, so that nothing of it may be exchanged by reference."""

    def __init__(self, live: nn.Module, fresh: nn.Module, *, graphs: bool):
        self.live, self.fresh, self.graphs = live, fresh, graphs
        self.pairs: list[Pair] = []
        self._held: list[Slot] = []
        self._before: dict[str, Any] = {}
        self._storages: set[int] = set()

    def begin(self) -> None:
        """The fresh model was built, and nothing is loaded yet."""
        self._before = {path: slot.value for path, slot in slots(self.fresh).items()}
        self._storages = _storages_of(self.fresh)

    def end(self) -> None:
        """It is loaded. Raises Misfit if the serving model has other places."""
        fresh, live = slots(self.fresh), slots(self.live)
        self._storages |= _storages_of(self.fresh)
        wanted = [slot for path, slot in fresh.items() if self._is_of_weights(path, slot)]
        if missing := sorted(slot.path for slot in wanted if slot.path not in live):
            raise Misfit(f"the serving model has no {missing[0]}, which one that is loaded anew has")
        shared = {id(slot.value) for slot in live.values() if isinstance(slot.value, Tensor)}
        wanted = _topmost([slot for slot in wanted if id(slot.value) not in shared])
        whole = {slot.module for slot in wanted if not _alike(live[slot.path].value, slot.value)}
        moved = {_address(slot.value) for slot in wanted if slot.module in whole and isinstance(slot.value, Tensor)}
        for slot in wanted:
            ours = live[slot.path]
            by_reference = slot.module in whole or _address(slot.value) in moved
            self.pairs.append(Pair(ours, slot, not by_reference))
        if self.graphs and (rigid := [pair for pair in self.pairs if not pair.by_content]):
            raise Misfit(
                f"{rigid[0].live.path} is another object after loading, and recorded graphs know the old one: start "
                "the engine with --enforce-eager"
            )

    def exchange(self) -> None:
        """The serving model gets what the fresh one has, and the fresh one what served. Again: it goes back."""
        for pair in self.pairs:
            if not pair.by_content:
                pair.live.holder[pair.live.key], pair.fresh.holder[pair.fresh.key] = pair.fresh.value, pair.live.value
        done: set[int] = set()
        for pair in sorted(self.pairs, key=_largest_first):
            if pair.by_content and _address(pair.live.value) not in done:
                done.add(_address(pair.live.value))
                _swap(pair.live.value, pair.fresh.value)

    def release(self) -> None:
        """Let go of the fresh model. Nothing can be taken back any more."""
        self._held = [pair.live for pair in self.pairs]
        self.pairs, self._before, self.fresh = [], {}, self.live

    def held(self) -> dict[str, tuple[str, Tensor]]:
        """The tensors that the serving model now has of its weights, by path, each with the name of its module."""
        return _tensors_of(self._held or [pair.live for pair in self.pairs])

    def brought(self) -> dict[str, tuple[str, Tensor]]:
        """What the fresh model has."""
        return _tensors_of([pair.fresh for pair in self.pairs])

    def _is_of_weights(self, path: str, slot: Slot) -> bool:
        value = slot.value
        if isinstance(value, nn.Module):
            return False
        if isinstance(value, Tensor) and value.numel() and _address(value) in self._storages:
            return True
        before = self._before.get(path, _ABSENT)
        return value is not before and not _same_constant(value, before)


_ABSENT = object()


def _tensors_of(places: list[Slot]) -> dict[str, tuple[str, Tensor]]:
    found = {}
    for slot in places:
        found |= {path: (slot.module, tensor) for path, tensor in _tensors_in(slot.path, slot.value, _DEEPEST)}
    return found


def _tensors_in(path: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the attributes of an object and in what a function remembers."""
    if isinstance(value, Tensor):
        yield path, value
    elif depth and _is_plain(value):
        for key, one in vars(value).items():
            yield from _tensors_in(f"{path}.{key}", one, depth - 1)
    elif depth:
        names = getattr(getattr(value, "__code__", None), "co_freevars", ())
        for key, cell in zip(names, getattr(value, "__closure__", None) or (), strict=False):
            yield from _tensors_in(f"{path}.{key}", _content(cell), depth - 1)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _topmost(wanted: list[Slot]) -> list[Slot]:
    """Without what lies below an object that changes sides itself."""
    objects = {slot.path for slot in wanted if not isinstance(slot.value, Tensor)}
    return [slot for slot in wanted if next(_above(slot, objects), None) is None]


def _above(slot: Slot, objects: set[str]) -> Iterator[str]:
    parts = slot.path.split(".")
    for end in range(1, len(parts)):
        if (path := ".".join(parts[:end])) in objects:
            yield path


def _largest_first(pair: Pair) -> int:
    """A view of a part of a storage comes after the one of all of it."""
    return -pair.live.value.numel() if isinstance(pair.live.value, Tensor) else 0


def _same_constant(value: Any, before: Any) -> bool:
    plain = (int, float, str, bool, bytes, type(None), torch.dtype, torch.Size, tuple)
    return isinstance(value, plain) and type(value) is type(before) and value == before


def _storages_of(model: nn.Module) -> set[int]:
    own = [*model.parameters(), *model.buffers()]
    return {_address(one) for one in own if one.numel()}


def _address(value: Any) -> int:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) and not value.is_meta else 0


def _alike(one: Any, other: Any) -> bool:
    """Whether the elements of one tensor can be put in the place of the other's."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    same = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return same and one.stride() == other.stride()


def _swap(one: Tensor, other: Tensor) -> None:
    with torch.no_grad():
        kept = one.detach().clone()
        one.detach().copy_(other.detach())
        other.detach().copy_(kept)
