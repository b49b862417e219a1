"""Which operators a model needs, and which of them a chip's software has.

The trace is of this run's own work: its forward pass, its backward pass, its optimiser, its decoding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from isthmus.chips.rehearse.dispatch import OperatorWatch, short_name
from isthmus.chips.rehearse.tables import STATUSES, Profile, Status


@dataclass
class Trace:
    """Calls of each operator, and the dtypes that it was called with."""

    calls: Counter[str] = field(default_factory=Counter)
    dtypes: dict[str, set[str]] = field(default_factory=dict)

    def __or__(self, other: Trace) -> Trace:
        names = self.dtypes.keys() | other.dtypes.keys()
        dtypes = {name: self.dtypes.get(name, set()) | other.dtypes.get(name, set()) for name in names}
        return Trace(self.calls + other.calls, dtypes)


class _Recorder(OperatorWatch):
    def __init__(self, trace: Trace):
        super().__init__()
        self.trace = trace

    def see(self, operator: str, dtypes: set[torch.dtype]) -> None:
        self.trace.calls[operator] += 1
        self.trace.dtypes.setdefault(operator, set()).update(short_name(dtype) for dtype in dtypes)


def trace_operators(work: Callable[[], object]) -> Trace:
    """Run `work` and record every operator that torch dispatches, those of a backward pass included."""
    trace = Trace()
    with _Recorder(trace):
        work()
    return trace


@dataclass(frozen=True)
class Coverage:
    """A trace joined with a chip's operator table. Names are sorted; `calls` counts calls by status.

    `refused_dtypes` and `weak_dtypes` name the operators that were called with such a dtype.
    `untested` are pairs of operator and floating dtype outside the list that the vendor documents as tested.
    """

    operators: dict[Status, tuple[str, ...]]
    calls: dict[Status, int]
    cautions: dict[str, tuple[str, ...]]
    untested: tuple[tuple[str, str], ...]
    refused_dtypes: dict[str, tuple[str, ...]]
    weak_dtypes: dict[str, tuple[str, ...]]
    source: str

    @property
    def total(self) -> int:
        return sum(map(len, self.operators.values()))

    def count(self, status: Status) -> int:
        return len(self.operators[status])

    @property
    def native_share(self) -> float:
        """Share of the calls that a kernel of the chip itself serves."""
        return self.calls["native"] / sum(self.calls.values())


_DOCUMENTED_AS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}


def coverage(trace: Trace, profile: Profile) -> Coverage:
    """What the chip's software does with each operator of a trace."""
    by_status: dict[Status, list[str]] = {status: [] for status in STATUSES}
    for name in sorted(trace.calls):
        by_status[profile.status(name)].append(name)
    known = {name: profile.operators[name] for name in sorted(trace.calls) if name in profile.operators}
    untested = [
        (name, dtype)
        for name, row in known.items()
        for dtype in sorted(trace.dtypes[name])
        if dtype in _DOCUMENTED_AS and row.documented_dtypes and _DOCUMENTED_AS[dtype] not in row.documented_dtypes
    ]
    return Coverage(
        operators={status: tuple(names) for status, names in by_status.items()},
        calls={status: sum(trace.calls[name] for name in names) for status, names in by_status.items()},
        cautions={name: row.cautions for name, row in known.items() if row.cautions},
        untested=tuple(untested),
        refused_dtypes=_ruled_dtypes(trace, profile, "refuse", "substitute"),
        weak_dtypes=_ruled_dtypes(trace, profile, "caution"),
        source=f"the operator table of {profile.chip} ({profile.version})",
    )


def _ruled_dtypes(trace: Trace, profile: Profile, *actions: str) -> dict[str, tuple[str, ...]]:
    ruled = {
        dtype: tuple(sorted(name for name, seen in trace.dtypes.items() if dtype in seen))
        for dtype, rule in profile.dtypes.items()
        if rule.action in actions
    }
    return {dtype: names for dtype, names in ruled.items() if names}
