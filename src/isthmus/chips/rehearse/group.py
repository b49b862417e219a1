"""A process group under the rules of a rehearsed chip: what its collective library refuses or does in its own way, the
links of its pool, and planted faults. It computes with gloo.

It is a subclass of ProcessGroup in Python, which torch calls for collectives of every origin: torch.distributed, the
functional collectives, DDP, FSDP2 and DTensor.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch.distributed import distributed_c10d

from isthmus.chips.rehearse.dispatch import short_name
from isthmus.chips.rehearse.inject import COLLECTIVES, Injector
from isthmus.chips.rehearse.links import Links, LinkShape, Passage, route_of
from isthmus.chips.rehearse.tables import Profile, RehearsalRefused

BUILT_IN = ("gloo", "nccl", "xccl", "ucc", "mpi")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Method:
    """A method of ProcessGroup: the operator that it dispatches, and how its arguments are to be read.

    `rule` is its name in the tables of collectives, `pattern` its way over the links. `output` and `input` are the
    places of those arguments, and `depth` says how deep their tensors lie in lists. `options` is the class of its
    options, `loose` the names there of what may be given in place of options.
    """

    operator: str
    rule: str
    pattern: str
    output: int = 0
    input: int = 0
    depth: tuple[int, ...] = (1,)
    options: Any = None
    loose: tuple[str, ...] = ()
    reduces: bool = False
    numbered: bool = True


_REDUCE = {"reduces": True, "loose": ("reduceOp", "timeout")}
_GATHER_BASE = _Method("_allgather_base_", "all_gather", "all-gather", 0, 1, (0, 0), c10d.AllgatherOptions)
_GATHER_MANY = _Method(
    "allgather_into_tensor_coalesced_", "all_gather", "all-gather", 0, 1, (1, 1), c10d.AllgatherOptions
)
_SCATTER_BASE = _Method(
    "_reduce_scatter_base_", "reduce_scatter", "reduce-scatter", 0, 1, (0, 0), c10d.ReduceScatterOptions, **_REDUCE
)
_SCATTER_MANY = _Method(
    "reduce_scatter_tensor_coalesced_",
    "reduce_scatter",
    "reduce-scatter",
    0,
    1,
    (1, 1),
    c10d.ReduceScatterOptions,
    **_REDUCE,
)
_ALL_TO_ALL = _Method("alltoall_base_", "all_to_all", "all-to-all", 0, 1, (0, 0), c10d.AllToAllOptions, ("timeout",))
METHODS: dict[str, _Method] = {
    "allreduce": _Method("allreduce_", "all_reduce", "all-reduce", options=c10d.AllreduceOptions, **_REDUCE),
    "allreduce_coalesced": _Method(
        "allreduce_coalesced_", "all_reduce", "all-reduce", options=c10d.AllreduceCoalescedOptions, reduces=True
    ),
    "reduce": _Method(
        "reduce_",
        "reduce",
        "chain",
        options=c10d.ReduceOptions,
        loose=("rootRank", "reduceOp", "timeout"),
        reduces=True,
    ),
    "broadcast": _Method(
        "broadcast_", "broadcast", "chain", options=c10d.BroadcastOptions, loose=("rootRank", "timeout")
    ),
    "allgather": _Method(
        "allgather_", "all_gather", "all-gather", 0, 1, (2, 1), c10d.AllgatherOptions, loose=("timeout",)
    ),
    "_allgather_base": _GATHER_BASE,
    "all_gather_single": _GATHER_BASE,
    "allgather_coalesced": _Method(
        "allgather_coalesced_", "all_gather", "all-gather", 0, 1, (2, 1), c10d.AllgatherOptions
    ),
    "allgather_into_tensor_coalesced": _GATHER_MANY,
    "all_gather_single_coalesced": _GATHER_MANY,
    "gather": _Method("gather_", "gather", "star", 0, 1, (2, 1), c10d.GatherOptions, loose=("rootRank", "timeout")),
    "scatter": _Method("scatter_", "scatter", "star", 0, 1, (1, 2), c10d.ScatterOptions, loose=("rootRank", "timeout")),
    "reduce_scatter": _Method(
        "reduce_scatter_", "reduce_scatter", "reduce-scatter", 0, 1, (1, 2), c10d.ReduceScatterOptions, **_REDUCE
    ),
    "_reduce_scatter_base": _SCATTER_BASE,
    "reduce_scatter_single": _SCATTER_BASE,
    "reduce_scatter_tensor_coalesced": _SCATTER_MANY,
    "reduce_scatter_single_coalesced": _SCATTER_MANY,
    "alltoall_base": _ALL_TO_ALL,
    "all_to_all_single": _ALL_TO_ALL,
    "alltoall": _Method("alltoall_", "all_to_all", "all-to-all", 0, 1, (1, 1), c10d.AllToAllOptions, ("timeout",)),
    "barrier": _Method("barrier", "barrier", "barrier", depth=(), options=c10d.BarrierOptions, loose=("timeout",)),
    "send": _Method("send", "send", "pair", numbered=False),
    "recv": _Method("recv_", "recv", "pair", numbered=False),
    "recv_anysource": _Method("recv_any_source_", "recv", "pair", numbered=False),
    "monitored_barrier": _Method("monitored_barrier_", "barrier", "barrier", depth=()),
}


def rehearse_backend(
    name: str,
    profile: Profile | None,
    injector: Injector | None,
    pulse: Any | None = None,
    shape: Callable[[int, int], LinkShape | None] | None = None,
) -> None:
    """Make `name` a backend of torch.distributed in this process: gloo under the rules of a chip, with planted faults.

    The name of a backend that torch has, such as gloo, stands for the rehearsed one from now on, also in
    torch.distributed.new_group. `pulse.begin_collective()` is called at each collective, but not for messages between
    two ranks, of which healthy ranks may have begun different numbers. `shape` gives the link between two ranks.
    """

    def create(options: Any, _backend_options: Any) -> RehearsedGroup:
        return RehearsedGroup(options, profile, injector, pulse, shape)

    stands_for = name.lower()
    plugin = f"rehearsed_{stands_for}" if stands_for in BUILT_IN else stands_for
    dist.Backend.register_backend(plugin, create, extended_api=True, devices=["cpu"])
    if stands_for in BUILT_IN:
        _Routed.routes[stands_for] = plugin
        distributed_c10d.BackendConfig = _Routed  # pyright: ignore[reportAttributeAccessIssue]


class _Routed(distributed_c10d.BackendConfig):
    """Which backend serves which device, with rehearsed ones on the CPU in place of those that they stand for."""

    routes: dict[str, str] = {}

    def __init__(self, backend: Any):
        super().__init__(backend)
        served = self.device_backend_map
        rehearsed = [self.routes[name] for name in served.values() if name in self.routes]
        if rehearsed:
            self.device_backend_map = {"cpu": dist.Backend(rehearsed[0])}  # pyright: ignore


class RehearsedGroup(dist.ProcessGroup):
    """A group of ranks that computes with gloo, and obeys a profile, the shapes of links and planted faults."""

    def __init__(
        self,
        options: Any,
        profile: Profile | None,
        injector: Injector | None,
        pulse: Any | None,
        shape: Callable[[int, int], LinkShape | None] | None,
    ):
        rank, size = options.group_rank, options.group_size
        super().__init__(rank, size)  # pyright: ignore[reportCallIssue]
        self._profile, self._injector, self._pulse = profile, injector, pulse
        self._store, self._rank = options.store, rank
        self._ranks = list(options.global_ranks_in_group) or list(range(size))
        self._links = Links(injector.links if injector else (), shape)
        self._plain = profile is None and not self._links.shaped and not (injector and injector.in_collectives)
        self._admitted: dict[tuple[str, str, str | None], bool] = {}
        self._timeout = min(options.timeout, _limit(profile, "EXEC_TIMEOUT") or options.timeout)
        gloo = _connected_gloo(options, profile)
        gloo._set_default_timeout(self._timeout)
        self._inner = dist.ProcessGroup(options.store, rank, size)
        for group in (self, self._inner):
            group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
            group._register_backend(CPU, dist.ProcessGroup.BackendType.GLOO, gloo)

    def get_group_store(self) -> Any:
        return self._store

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        method = METHODS[name]
        operator = COLLECTIVES + method.operator
        if self._injector is not None and not self._plain:
            self._injector.before_collective(operator)
        if self._pulse is not None and method.numbered:
            self._pulse.begin_collective()
        if self._plain:
            return getattr(self._inner, name)(*args, **kwargs)
        call = _Call.read(method, args, kwargs)
        finish: list[Callable[[], None]] = []
        passage = self._passage(method, call)
        if self._profile is not None:
            name, call = self._obey(name, method, call, finish)
        if passage.cut is not None:
            return _NeverWork(passage.cut, method.rule, self._patience(call))
        work = getattr(self._inner, name)(*call.positional)
        self._damage(operator, method, call, finish)
        return _finished(work, passage.late_s, finish)

    def _patience(self, call: _Call) -> timedelta:
        timeout = getattr(call.options, "timeout", None)
        return timeout if timeout is not None and timeout > timedelta(0) else self._timeout

    def _passage(self, method: _Method, call: _Call) -> Passage:
        waits = self._injector is not None and not self._injector.armed
        if not self._links.shaped or waits or len(self._ranks) < 2:
            return Passage(0.0, None)
        if method.pattern == "pair" and call.peer is None:
            return Passage(0.0, None)  # From anyone: what is cut never comes, and what is slow is late at its sender.
        root = call.peer if call.peer is not None else getattr(call.options, "rootRank", 0)
        size = _part(call) if method.pattern == "star" else max(_bytes(call.outputs), _bytes(call.inputs))
        route = route_of(method.pattern, self._ranks, self._rank, root, size)
        step = self._injector.current_step if self._injector else 0
        passage = self._links.passage(route, self.group_name, step)
        if self._injector:
            for fault in passage.slowed:
                what = "never arrives" if passage.cut else f"{passage.late_s * 1e3:.3g} ms later"
                self._injector.note(fault, f"{method.operator}, {what}", self._injector.collectives)
        return passage

    def _damage(self, operator: str, method: _Method, call: _Call, finish: list[Callable[[], None]]) -> None:
        injector = self._injector
        struck = injector.striking(operator) if injector else []
        if injector and struck and method.operator != "send":
            collective, outputs = injector.collectives, call.outputs
            finish.append(lambda: injector.damage_result(struck, operator, collective, outputs))

    def _obey(self, name: str, method: _Method, call: _Call, finish: list[Callable[[], None]]) -> tuple[str, _Call]:
        """The call as the chip's collective library carries it out. Raises RehearsalRefused where it would refuse."""
        profile = self._profile
        assert profile is not None
        reduction = _reduction(call.options) if method.reduces else None
        dtypes = {tensor.dtype for tensor in (*call.inputs, *call.outputs)}
        differs = [self._admit(method.rule, short_name(dtype), reduction) for dtype in dtypes]
        if not any(differs):
            return name, call
        if reduction == "sum" and dtypes == {torch.bool}:
            return name, call.with_reduction(dist.ReduceOp.MAX)
        if reduction == "avg":
            outputs, size, is_root = call.outputs, self.size(), self._holds_result(method, call)
            finish.append(lambda: _divide(outputs, size) if is_root else None)
            return name, call.with_reduction(dist.ReduceOp.SUM)
        if reduction == "premul_sum":
            return name, call.multiplied()
        if method.rule == "gather":
            return self._gather_as_all_gather(call, finish)
        return name, call

    def _admit(self, rule: str, dtype: str, reduction: str | None) -> bool:
        """Whether the chip's library differs from the reference here."""
        key = (rule, dtype, reduction)
        if key not in self._admitted:
            assert self._profile is not None
            self._admitted[key] = bool(self._profile.check_collective(rule, dtype, reduction))
        return self._admitted[key]

    def _holds_result(self, method: _Method, call: _Call) -> bool:
        return method.rule != "reduce" or call.options.rootRank == self._rank

    def _gather_as_all_gather(self, call: _Call, finish: list[Callable[[], None]]) -> tuple[str, _Call]:
        """Every rank receives all parts, and only the root keeps them."""
        parts = [torch.empty_like(call.inputs[0]) for _ in range(self.size())]
        kept = call.outputs if call.options.rootRank == self._rank else []

        def keep() -> None:
            for target, part in zip(kept, parts, strict=False):
                target.copy_(part)

        finish.append(keep)
        return "allgather", _Call(METHODS["allgather"], [[parts], call.positional[1]], None)


def _forward(name: str) -> Callable[..., Any]:
    def method(self: RehearsedGroup, *args: Any, **kwargs: Any) -> Any:
        return self._call(name, args, kwargs)

    method.__name__ = name
    return method


for _name in METHODS:
    if hasattr(dist.ProcessGroup, _name):
        setattr(RehearsedGroup, _name, _forward(_name))


class _Call:
    """The arguments of one call of a method, as it takes them with options."""

    def __init__(self, method: _Method, positional: list[Any], options: Any, peer: int | None = None):
        self.method, self.positional, self.options, self.peer = method, positional, options, peer
        tensors = positional[: len(method.depth)]
        self.outputs = _flat(tensors[method.output]) if tensors else []
        self.inputs = _flat(tensors[method.input]) if tensors else []

    @classmethod
    def read(cls, method: _Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        """From the arguments of any of the overloads that torch has of a method."""
        values = [*args, *kwargs.values()]
        count = len(method.depth)
        tensors = [_nested(value, depth) for value, depth in zip(values, method.depth, strict=False)]
        rest = values[count:]
        if method.pattern == "pair":
            return cls(method, [*tensors, *rest], None, rest[0] if method.operator != "recv_any_source_" else None)
        if method.options is None:
            return cls(method, [*tensors, *rest], None)
        splits = []
        if method.pattern == "all-to-all" and method.depth == (0, 0):
            splits, rest = rest[:2], rest[2:]
        options = method.options()
        if rest and isinstance(rest[0], method.options):
            options = rest[0]
        else:
            for field, value in zip(method.loose, rest, strict=False):
                if value is not None:
                    setattr(options, field, value)
        return cls(method, [*tensors, *splits, options], options)

    def with_reduction(self, reduction: Any) -> _Call:
        """The same with another reduction; the caller's options stay as they are."""
        options = _copy(self.options)
        options.reduceOp = dist.ReduceOp(reduction)
        return _Call(self.method, [*self.positional[:-1], options], options)

    def multiplied(self) -> _Call:
        """A sum of inputs that were multiplied before: of copies, unless they are the outputs as well."""
        _, factor = self.options.reduceOp.__getstate__()
        in_place = self.method.input == self.method.output
        if in_place:
            for tensor in self.inputs:
                tensor.mul_(factor)
            return self.with_reduction(dist.ReduceOp.SUM)
        call = self.with_reduction(dist.ReduceOp.SUM)
        call.positional[self.method.input] = _mapped(call.positional[self.method.input], lambda one: one * factor)
        return call


class _LateWork(c10d.Work):
    """A collective whose result is there some seconds after its data, and once something more was done with it.

    That is done in the first thread that waits for it or finds it complete.
    """

    def __init__(self, work: Any, late_s: float, finish: Sequence[Callable[[], None]]):
        super().__init__()
        self._work, self._late_s, self._finish = work, late_s, list(finish)
        self._due: float | None = None
        self._lock = threading.RLock()  # A future that is done calls back at once, in the thread that asks for it.
        self._future: Any = None

    def _arrived(self) -> float:
        """Data has come; returns when it may be seen, in time.monotonic()."""
        with self._lock:
            if self._due is None:
                self._due = time.monotonic() + self._late_s
            return self._due

    def _complete(self) -> None:
        time.sleep(max(0.0, self._arrived() - time.monotonic()))
        with self._lock:
            while self._finish:
                self._finish.pop(0)()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        done = self._work.wait(timeout) if timeout > timedelta(0) else self._work.wait()
        self._complete()
        return done

    def get_future(self) -> Any:
        with self._lock:
            if self._future is None:
                self._future = self._work.get_future().then(self._completed)
        return self._future

    def _completed(self, future: Any) -> Any:
        value = future.value()
        self._complete()
        return value

    def is_completed(self) -> bool:
        if not self._work.is_completed() or time.monotonic() < self._arrived():
            return False
        self._complete()
        return True

    def is_success(self) -> bool:
        return self._work.is_success()

    def exception(self) -> Any:
        return self._work.exception()

    def result(self) -> Any:
        self._complete()
        return self._work.result()

    def source_rank(self) -> int:
        return self._work._source_rank()

    _source_rank = source_rank

    def synchronize(self) -> None:
        self._work.synchronize()
        self._complete()

    def block_current_stream(self) -> None:
        self.wait()


class _NeverWork(c10d.Work):
    """A collective over a cut link: it waits for its time-out, and raises DistBackendError then, as gloo does."""

    def __init__(self, cut: tuple[int, int], rule: str, timeout: timedelta):
        super().__init__()
        self._until, self._timeout = time.monotonic() + timeout.total_seconds(), timeout
        milliseconds = round(timeout.total_seconds() * 1e3)
        self._error = (
            f"Timed out waiting {milliseconds}ms for {rule} operation to complete: "
            f"nothing arrives over the link between ranks {cut[0]} and {cut[1]}. (planted by a rehearsal)"
        )

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        until = time.monotonic() + timeout.total_seconds() if timeout > timedelta(0) else self._until
        time.sleep(max(0.0, until - time.monotonic()))
        raise dist.DistBackendError(self._error)

    def get_future(self) -> Any:
        future: torch.futures.Future[Any] = torch.futures.Future()
        delay = max(0.0, self._until - time.monotonic())
        timer = threading.Timer(delay, lambda: future.set_exception(dist.DistBackendError(self._error)))
        timer.daemon = True
        timer.start()
        return future

    def is_completed(self) -> bool:
        return time.monotonic() >= self._until

    def is_success(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()


def _finished(work: Any, late_s: float, finish: list[Callable[[], None]]) -> Any:
    """What a call returns: the work itself if nothing is left to do after it. None says that it is done."""
    if not finish and not late_s:
        return work
    if work is None:
        time.sleep(late_s)
        for one in finish:
            one()
        return None
    return _LateWork(work, late_s, finish)


def _connected_gloo(options: Any, profile: Profile | None) -> Any:
    """A gloo backend whose ranks have found one another, within the time that the chip's library gives them."""
    connect = _limit(profile, "CONNECT_TIMEOUT") or options.timeout
    began = time.monotonic()
    try:
        gloo = dist.ProcessGroupGloo(options.store, options.group_rank, options.group_size, timeout=connect)
    except RuntimeError as error:
        if profile is None or time.monotonic() - began < connect.total_seconds():
            raise
        raise RehearsalRefused(
            f"a rank was not there {connect.total_seconds():g} s after another began to connect: the collective "
            f"library of {profile.chip} gives up then ({'; '.join(profile.timeouts())}). Start the ranks together, or "
            "set a longer connect time-out."
        ) from error
    gloo._set_sequence_number_for_group()
    return gloo


def _limit(profile: Profile | None, suffix: str) -> timedelta | None:
    """A time-out of the chip's collective library: as its environment variable sets it, else its default.

    Raises RehearsalRefused for a value outside its range. None if the tables have none.
    """
    for rule in profile.collectives if profile else ():
        names = [name for name in rule.values if name.endswith(suffix)]
        default = re.search(r"default (\d+) s", rule.behaviour)
        if rule.kind != "timeout" or not names or default is None:
            continue
        seconds = float(os.environ.get(names[0], default[1]))
        allowed = re.search(r"range (\d+) to (\d+)", rule.behaviour)
        low, high = (float(allowed[1]), float(allowed[2])) if allowed else (0.0, math.inf)
        if not low <= seconds <= high:
            raise RehearsalRefused(
                f"{names[0]}={seconds:g} is outside its range: {rule.behaviour} ({rule.standing}: {rule.source})"
            )
        return timedelta(seconds=seconds)
    return None


def _reduction(options: Any) -> str:
    return str(options.reduceOp.op).rpartition(".")[2].lower()


def _divide(tensors: Sequence[Tensor], count: int) -> None:
    for tensor in tensors:
        tensor.div_(count, rounding_mode=None if tensor.is_floating_point() else "trunc")


def _copy(options: Any) -> Any:
    copy = type(options)()
    for name in dir(options):
        if not name.startswith("_"):
            setattr(copy, name, getattr(options, name))
    return copy


def _nested(value: Any, depth: int) -> Any:
    """A value as lists within lists to this depth, where a convenient overload leaves the outer ones away."""
    found, inner = 0, value
    while isinstance(inner, list | tuple):
        found += 1
        inner = inner[0] if inner else None
        if inner is None:
            return value
    for _ in range(depth - found):
        value = [value]
    return value


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for one in value for tensor in _flat(one)]


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(value) if isinstance(value, Tensor) else [_mapped(one, change) for one in value]


def _part(call: _Call) -> int:
    """Bytes of one rank's part: only the root of a gather or a scatter holds all."""
    held = [size for size in (_bytes(call.outputs), _bytes(call.inputs)) if size]
    return min(held, default=0)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
