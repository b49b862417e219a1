"""Faults that a rehearsal plants: what breaks, on which rank, at which step. Loading this does not load torch."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Literal

from isthmus.errors import IsthmusError

FaultKind = Literal[
    "crash",
    "hang",
    "slow-rank",
    "wrong-sum",
    "flipped-bit",
    "small-error",
    "nan",
    "slow-link",
    "link-cut",
    "out-of-memory",
    "corrupted-save",
    "fallback",
    "dtype-swap",
]
FAULT_KINDS: tuple[FaultKind, ...] = typing.get_args(FaultKind)


@dataclass(frozen=True)
class Fault:
    """One planted fault. Written `kind@rank=1,step=3,peer=2,rate=0.1,size=10,operator=aten::mm,seed=7`.

    `step` None means at every step. `rate` is the probability at each opportunity (each step, collective or operator
    call, according to the kind), drawn from `seed`. `size` is a factor for slow-rank and slow-link (how many times
    slower), a relative error for small-error and wrong-sum, the number of the bit for flipped-bit, counted from the
    lowest of the mantissa. `peer` is the other end of a slow or cut link; None means all links of the rank. `operator`
    limits faults of operators to those whose name starts with it, as in `aten::mm`.
    """

    kind: FaultKind
    rank: int
    step: int | None = None
    peer: int | None = None
    rate: float = 1.0
    size: float | None = None
    operator: str | None = None
    seed: int = 0

    def __str__(self) -> str:
        set_ones = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "kind"}
        unset = {field.name: field.default for field in dataclasses.fields(self)}
        return f"{self.kind}@" + ",".join(f"{k}={v}" for k, v in set_ones.items() if v != unset[k] or k == "rank")


_TYPES: dict[str, type] = {
    "rank": int,
    "step": int,
    "peer": int,
    "rate": float,
    "size": float,
    "operator": str,
    "seed": int,
}


def parse_fault(text: str) -> Fault:
    """A fault from its notation, such as `hang@rank=2,step=5`. Raises IsthmusError with what is allowed."""
    kind, _, rest = text.partition("@")
    if kind not in FAULT_KINDS:
        raise IsthmusError(f"unknown kind of fault {kind!r} in {text!r}; the kinds are {', '.join(FAULT_KINDS)}")
    values: dict[str, typing.Any] = {}
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        if key not in _TYPES:
            raise IsthmusError(f"unknown key {key!r} in the fault {text!r}; the keys are {', '.join(_TYPES)}")
        try:
            values[key] = _TYPES[key](value)
        except ValueError:
            raise IsthmusError(f"{key} in the fault {text!r} must be {_TYPES[key].__name__}, not {value!r}") from None
    if "rank" not in values:
        raise IsthmusError(f"the fault {text!r} does not say on which rank; write {kind}@rank=0")
    if not 0.0 < values.get("rate", 1.0) <= 1.0:
        raise IsthmusError(f"rate in the fault {text!r} must be above 0 and at most 1")
    return Fault(kind=kind, **values)  # pyright: ignore[reportArgumentType]
