"""Watching and refusing operators as torch dispatches them, below autograd."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.chips.rehearse.tables import MEANING, Profile, RehearsalRefused, Status, Tally


class OperatorWatch(TorchDispatchMode):
    """Shows every operator to `see` before it runs. Composite operators are shown as the parts that they are made of,
    attention too: the CPU's fused kernel says nothing about a chip. The marks that torch leaves for its profiler are
    not shown."""

    def __enter__(self) -> Any:
        self._unfused = [*getattr(self, "_unfused", []), sdpa_kernel(SDPBackend.MATH)]
        self._unfused[-1].__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._unfused.pop().__exit__(*exception)

    def see(self, operator: str, dtypes: set[torch.dtype]) -> None:
        """An operator, named as in `aten::add.Tensor`, with the dtypes of its tensors and any that it asks for."""
        raise NotImplementedError

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False leaves torch.compile's machinery unloaded, which takes a second and is not used here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        self.see(func.name(), set(_dtypes((*args, *kwargs.values()))))
        return func(*args, **kwargs)


class Rehearsal(OperatorWatch):
    """Refuses what a profile does not allow; `tally` counts what ran."""

    def __init__(self, profile: Profile, *, strict: bool):
        super().__init__()
        self.profile, self.strict = profile, strict
        self.tally = Tally()

    def see(self, operator: str, dtypes: set[torch.dtype]) -> None:
        status = self.tally.operators.get(operator)
        if status is None:
            status = self.tally.operators[operator] = self._admit(operator, dtypes)
        for dtype in dtypes:
            self._check_dtype(operator, short_name(dtype))
        self.tally.calls[status] += 1

    def _admit(self, operator: str, dtypes: set[torch.dtype]) -> Status:
        status = self.profile.status(operator)
        if status == "none" or (status == "fallback" and self.strict):
            row = self.profile.operators[operator]
            raise RehearsalRefused(
                f"{operator} ({_joined(dtypes)}) is refused on {self.profile.chip}: {MEANING[status]} "
                f"({row.standing}: {row.source}). Write it with other operators, or place this stage on another pool."
            )
        return status

    def _check_dtype(self, operator: str, dtype: str) -> None:
        rule = self.profile.dtypes.get(dtype)
        if rule is not None and rule.action == "refuse":
            raise RehearsalRefused(
                f"{operator} with {dtype} is refused on {self.profile.chip}: {rule.behaviour} "
                f"({rule.standing}: {rule.source}). Use another dtype for this operator."
            )


@functools.cache
def is_composite(operator: Any) -> bool:
    """Whether an operator is nothing but others: it has a decomposition, and no kernel of its own on the CPU."""
    own = torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CPU")
    return operator._can_decompose() and not own


def short_name(dtype: torch.dtype) -> str:
    """A dtype's name without its prefix."""
    return str(dtype).removeprefix("torch.")


def _dtypes(values: tuple[Any, ...]) -> Iterator[torch.dtype]:
    """dtypes among arguments. A tensor without dimensions is a number that the host keeps, and does not count."""
    for value in values:
        if isinstance(value, Tensor):
            if value.dim():
                yield value.dtype
        elif isinstance(value, torch.dtype):
            yield value
        elif isinstance(value, list | tuple):
            yield from _dtypes(tuple(value))


def _joined(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(short_name(dtype) for dtype in dtypes)) or "no tensors"
