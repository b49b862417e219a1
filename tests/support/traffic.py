"""The collectives that a process really issues, and the bytes that each makes it send at least."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.probes.static.costs import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER

KINDS = (ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, ALL_TO_ALL)
_PAYLOADS = {
    "c10d::_allgather_base_": (ALL_GATHER, "input_tensor"),
    "c10d::allgather_": (ALL_GATHER, "input_tensors"),
    "c10d::allgather_into_tensor_coalesced_": (ALL_GATHER, "inputs"),
    "c10d::_reduce_scatter_base_": (REDUCE_SCATTER, "input_tensor"),
    "c10d::reduce_scatter_": (REDUCE_SCATTER, "input_tensors"),
    "c10d::reduce_scatter_tensor_coalesced_": (REDUCE_SCATTER, "inputs"),
    "c10d::allreduce_": (ALL_REDUCE, "tensors"),
    "c10d::allreduce_coalesced_": (ALL_REDUCE, "tensors"),
    "c10d::alltoall_base_": (ALL_TO_ALL, "input"),
    "_c10d_functional::all_gather_into_tensor": (ALL_GATHER, "input"),
    "_c10d_functional::all_gather_into_tensor_coalesced": (ALL_GATHER, "inputs"),
    "_c10d_functional::reduce_scatter_tensor": (REDUCE_SCATTER, "input"),
    "_c10d_functional::reduce_scatter_tensor_coalesced": (REDUCE_SCATTER, "inputs"),
    "_c10d_functional::all_reduce": (ALL_REDUCE, "input"),
    "_c10d_functional::all_reduce_coalesced": (ALL_REDUCE, "inputs"),
    "_c10d_functional::all_to_all_single": (ALL_TO_ALL, "input"),
}
_BARRIERS = {"c10d::barrier", "c10d::monitored_barrier_"}


@dataclass(frozen=True)
class Collective:
    """One collective of a group of `ranks`. `payload`: bytes of what this rank puts in; `sent`: bytes that leave it.

    `sent` is counted as in probes/static/costs.py; for an all-to-all it is what is addressed to other ranks.
    """

    kind: str
    ranks: int
    payload: int
    sent: float


class Traffic(TorchDispatchMode):
    """Within this context, notes each collective of this thread and of the backward passes that it starts.

    Raises NotImplementedError at one that it cannot count, a broadcast for example.
    """

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def sent(self) -> dict[str, float]:
        """Bytes that left this rank, by kind."""
        totals: Counter[str] = Counter()
        for collective in self.collectives:
            totals[collective.kind] += collective.sent  # pyright: ignore[reportArgumentType]
        return dict(totals)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor goes first: its collectives come here again, on plain tensors.
        given = kwargs or {}
        if isinstance(func, OpOverload) and func.namespace in ("c10d", "_c10d_functional"):
            names = [argument.name for argument in func._schema.arguments]
            self._note(func._schema.name, {**dict(zip(names, args, strict=False)), **given})
        return func(*args, **given)

    def _note(self, name: str, arguments: dict[str, Any]) -> None:
        if name not in _BARRIERS and ("process_group" in arguments or "group_name" in arguments):
            self.collectives.append(_collective(name, arguments))


def _collective(name: str, arguments: dict[str, Any]) -> Collective:
    if name not in _PAYLOADS:
        raise NotImplementedError(f"the bytes of {name} are not known; add it to {__name__}")
    kind, argument = _PAYLOADS[name]
    group, payload = _group(arguments), _bytes(arguments[argument])
    if kind == ALL_TO_ALL:
        return Collective(kind, group.size(), payload, _addressed_to_others(arguments, payload, group))
    return Collective(kind, group.size(), payload, payload * _share_sent(kind, group.size()))


def _group(arguments: dict[str, Any]) -> dist.ProcessGroup:
    if "process_group" in arguments:
        return dist.ProcessGroup.unbox(arguments["process_group"])
    return _resolve_process_group(arguments["group_name"])


def _bytes(payload: Any) -> int:
    """Of a tensor, or of all tensors in nested lists."""
    if isinstance(payload, Tensor):
        return payload.numel() * payload.element_size()
    return sum(map(_bytes, payload))


def _share_sent(kind: str, ranks: int) -> float:
    return {ALL_GATHER: ranks - 1, REDUCE_SCATTER: (ranks - 1) / ranks, ALL_REDUCE: 2 * (ranks - 1) / ranks}[kind]


def _addressed_to_others(arguments: dict[str, Any], payload: int, group: dist.ProcessGroup) -> float:
    """Of an input that is split along dimension 0, evenly unless its sizes are given."""
    rows = arguments["input_split_sizes"]
    if not rows:
        return payload * (group.size() - 1) / group.size()
    total = sum(rows)
    return payload * (total - rows[group.rank()]) / total if total else 0.0


def loopback_bytes() -> int:
    """Bytes that all processes of this network namespace have sent over the loopback interface, headers included.

    Read from /proc/net/dev (Linux).
    """
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise OSError("/proc/net/dev lists no loopback interface")
