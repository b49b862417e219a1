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
LINK_KINDS: tuple[FaultKind, ...] = ("slow-link", "link-cut")
COLLECTIVES = "c10d::"
"""Operators of torch.distributed begin so."""


@dataclass(frozen=True)
class Fault:
    """One planted fault. Written `kind@rank=1,step=3,peer=2,rate=0.1,size=10,operator=aten::mm,seed=7`.

    `step` None means at every step; a cut link stays cut from its step on. `rate` is the probability at each
    opportunity (each step, collective, operator call or save, according to the kind), drawn from `seed`. `size` is a
    factor for slow-rank, slow-link and fallback (how many times slower, 10 unless given), a relative error for
    small-error (0.01) and wrong-sum (1), the number of the bit for flipped-bit, counted from the lowest of the mantissa
    (any), the bits of mantissa for dtype-swap (float64 comes back as float32, float32 is rounded as bfloat16), an exit
    code for crash (killed by a signal) and GiB for out-of-memory. `peer` is the other end of a slow or cut link; None
    means all links of the rank. `operator` limits a fault to operators whose name starts with it, as in `aten::mm` or
    `c10d::allreduce_`; faults of values strike products of matrices unless it is given, and a wrong sum reductions.
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


_TAKES: dict[FaultKind, set[str]] = {
    "crash": {"size", "operator"},
    "hang": {"operator"},
    "slow-rank": {"size"},
    "wrong-sum": {"size", "operator"},
    "flipped-bit": {"size", "operator"},
    "small-error": {"size", "operator"},
    "nan": {"operator"},
    "slow-link": {"peer", "size"},
    "link-cut": {"peer"},
    "out-of-memory": {"size", "operator"},
    "corrupted-save": set(),
    "fallback": {"size", "operator"},
    "dtype-swap": {"size", "operator"},
}
_WHOLE: dict[FaultKind, tuple[int, int]] = {"crash": (1, 255), "flipped-bit": (0, 63), "dtype-swap": (1, 51)}
_FACTORS = ("slow-rank", "slow-link", "fallback")

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
    fault = Fault(kind=kind, **values)  # pyright: ignore[reportArgumentType]
    check_fault(fault)
    return fault


def check_fault(fault: Fault) -> None:
    """Raises IsthmusError for a fault that says what its kind cannot honour."""
    for key in ("peer", "size", "operator"):
        if getattr(fault, key) is not None and key not in _TAKES[fault.kind]:
            takes = ", ".join(["rank", "step", "rate", "seed", *sorted(_TAKES[fault.kind])])
            raise IsthmusError(f"the fault {fault} has {key}, which {fault.kind} does not use; it uses {takes}")
    if not 0.0 < fault.rate <= 1.0:
        raise IsthmusError(f"rate in the fault {fault} must be above 0 and at most 1")
    if fault.peer == fault.rank:
        raise IsthmusError(f"the fault {fault} has one rank at both ends of a link")
    if fault.kind == "wrong-sum" and not (fault.operator or COLLECTIVES).startswith(COLLECTIVES):
        raise IsthmusError(f"the fault {fault} is of a reduction; its operator must start with {COLLECTIVES}")
    if fault.kind in ("fallback", "dtype-swap") and (fault.operator or "").startswith(COLLECTIVES):
        raise IsthmusError(f"the fault {fault} is of an operator that computes, not of a collective")
    _check_size(fault)


def _check_size(fault: Fault) -> None:
    size = fault.size
    if size is None:
        return
    if fault.kind in _WHOLE:
        low, high = _WHOLE[fault.kind]
        if size != int(size) or not low <= size <= high:
            raise IsthmusError(f"size in the fault {fault} must be a whole number from {low} to {high}")
    elif fault.kind in _FACTORS and size < 1.0:
        raise IsthmusError(f"size in the fault {fault} says how many times slower, and must be at least 1")
    elif size == 0.0:
        raise IsthmusError(f"size in the fault {fault} must not be 0")


def of_collectives(fault: Fault) -> bool:
    """Whether a fault happens in collectives or on links, so that a process group must make it happen."""
    return fault.kind in ("wrong-sum", *LINK_KINDS) or (fault.operator or "").startswith(COLLECTIVES)
