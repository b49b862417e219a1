"""What each operator call of a piece of work costs: floating-point operations, and bytes moved.

The work may run on the meta device, which has shapes and no values: then a model of any size is traced in seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from isthmus.chips.rehearse.dispatch import OperatorWatch, is_composite, short_name
from isthmus.probes.static.sites import Site, loss, whole_attention

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, ALL_TO_ALL = "all-gather", "reduce-scatter", "all-reduce", "all-to-all"
ATTENTION = "aten::scaled_dot_product_attention"
WHOLE_ATTENTION = (ATTENTION, "aten::_scaled_dot_product_flash_attention")
"""Operators for which a chip's software may have a kernel that computes attention in one piece."""
BACKWARD = " (backward)"
"""What the gradient of an operator that stays whole is named with."""
OUTSIDE = "outside the layers"
HOST_READS_AS = 1.0
"""What a number is that the host reads off the meta device."""
_READS_WHAT_IT_TAKES = frozenset(
    ("aten::embedding", "aten::index_select", "aten::index.Tensor", "aten::gather", "aten::slice_copy.Tensor")
)
_TOUCHES_WHAT_IT_GETS = frozenset(
    (
        *("aten::index_copy_", "aten::index_add_", "aten::index_put_", "aten::_index_put_impl_"),
        *("aten::scatter_.src", "aten::scatter_add_"),
    )
)
_WRITES_ONLY = frozenset(("aten::copy_", "aten::fill_.Scalar", "aten::fill_.Tensor", "aten::zero_"))
_ALLOCATES = frozenset(
    (
        "aten::empty.memory_format",
        "aten::empty_like",
        "aten::new_empty",
        "aten::empty_strided",
        "aten::new_empty_strided",
    )
)


class Call(NamedTuple):
    """One call of an operator: dtypes and shapes of its tensors, inputs first, and what it costs."""

    operator: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    flops: int
    bytes: int


class Collective(NamedTuple):
    """A collective of a group of `ranks`. `sent`: the bytes that leave this rank.

    They are what the algorithm that sends least needs (Patarasu and Yuan, J. Parallel Distrib. Comput. 69, 2009): of
    an input of B bytes (n - 1) B for an all-gather, (n - 1)/n B for a reduce-scatter, 2 (n - 1)/n B for an all-reduce.
    A backend may send more.
    """

    kind: str
    dtype: str
    ranks: int
    sent: float


class Costs:
    """Calls of operators and collectives with how often each is made, and the `sites` that they belong to."""

    def __init__(
        self,
        calls: Counter[Call] | None = None,
        collectives: Counter[Collective] | None = None,
        sites: frozenset[Site] = frozenset(),
    ):
        self.calls: Counter[Call] = calls if calls is not None else Counter()
        self.collectives: Counter[Collective] = collectives if collectives is not None else Counter()
        self.sites = sites

    def __add__(self, other: Costs) -> Costs:
        return Costs(self.calls + other.calls, self.collectives + other.collectives, self.sites | other.sites)

    def times(self, count: int) -> Costs:
        """The same work, `count` times."""
        return Costs(
            Counter({call: calls * count for call, calls in self.calls.items()}),
            Counter({one: calls * count for one, calls in self.collectives.items()}),
            self.sites,
        )

    @property
    def flops(self) -> int:
        return sum(call.flops * count for call, count in self.calls.items())

    @property
    def bytes(self) -> int:
        return sum(call.bytes * count for call, count in self.calls.items())

    def operators(self) -> Counter[str]:
        """Calls of each operator."""
        totals: Counter[str] = Counter()
        for call, count in self.calls.items():
            totals[call.operator] += count
        return totals


class CostRecorder(OperatorWatch):
    """Within `watching`, records the calls that work on tensors of `device`, in the scope that is current.

    `whole_attention` is the operator that attention is, in one call, with its gradient in another, for chips that have
    a kernel for it. On the meta device a number that the host reads is `HOST_READS_AS`.
    """

    def __init__(self, device: str = "meta", *, whole_attention: str | None = None):
        super().__init__()
        self.device, self.scope, self.paused = device, OUTSIDE, False
        self.by_scope: dict[str, Costs] = {}
        self.sites: set[Site] = set()
        self._functions = _Functions(self, whole_attention)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record what is done here."""
        with self, self._functions:
            yield

    def total(self, times: dict[str, int] | None = None) -> Costs:
        """All scopes together, each as often as `times` says; once if it says nothing."""
        parts = [costs.times((times or {}).get(scope, 1)) for scope, costs in self.by_scope.items()]
        return sum(parts, Costs(sites=frozenset(self.sites)))

    def add(self, call: Call) -> None:
        self.by_scope.setdefault(self.scope, Costs()).calls[call] += 1

    def add_collective(self, kind: str, payload: Tensor, ranks: int, sent: float) -> None:
        collective = Collective(kind, short_name(payload.dtype), ranks, sent)
        self.by_scope.setdefault(self.scope, Costs()).collectives[collective] += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done here is not recorded."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "profiler" and is_composite(func):
            with torch._C.DisableTorchFunction(), self:
                return func.decompose(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            out: Any = HOST_READS_AS
        else:
            out = func(*args, **kwargs)
        if not self.paused and func.namespace != "profiler":
            self._record(func, args, kwargs, out)
        return out

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if not any(tensor.device.type == self.device for tensor in (*inputs, *outputs)):
            return
        name = func.name()
        tensors = [*inputs, *outputs]
        dtypes = dict.fromkeys(short_name(tensor.dtype) for tensor in tensors if tensor.dim())
        shapes = tuple(tuple(tensor.shape) for tensor in tensors)
        moved = 0 if name in _ALLOCATES or _is_view(func) else _bytes_moved(func, args, kwargs, inputs, outputs)
        self.add(Call(name, tuple(dtypes), shapes, _flops(func, args, kwargs, out), moved))


class _Functions(TorchFunctionMode):
    """Notes the sites that are one function of torch, and keeps attention in one piece if `whole` names its operator:
    then the part of it that a fused kernel would compute is only described."""

    def __init__(self, recorder: CostRecorder, whole: str | None):
        super().__init__()
        self._recorder, self._whole = recorder, whole

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.cross_entropy:
            self._recorder.sites.add(loss(args[0]))
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = args[:3]
            self._recorder.sites.add(whole_attention(query, key, value))
            if self._whole is not None:
                return _Attention.apply(query, key, value, self._recorder, self._whole)
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, recorder: CostRecorder, operator: str) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.recorder, ctx.operator = recorder, operator
        with recorder.pause():
            out = query.new_empty(*query.shape[:-1], value.shape[-1])
        tensors = (query, key, value, out)
        recorder.add(_whole_call(operator, tensors, sdpa_flop_count(query.shape, key.shape, value.shape)))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = ctx.saved_tensors
        with ctx.recorder.pause():
            found = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
        tensors = (gradients[0], query, key, value, gradients[0], *found)
        flops = sdpa_backward_flop_count(gradients[0].shape, query.shape, key.shape, value.shape)
        ctx.recorder.add(_whole_call(ctx.operator + BACKWARD, tensors, flops))
        return *found, None, None


def _whole_call(name: str, tensors: tuple[Tensor, ...], flops: int) -> Call:
    dtypes = dict.fromkeys(short_name(tensor.dtype) for tensor in tensors)
    shapes = tuple(tuple(tensor.shape) for tensor in tensors)
    return Call(name, tuple(dtypes), shapes, flops, sum(map(_size, tensors)))


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor that are there: an expanded one is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _is_view(func: Any) -> bool:
    """Whether the operator gives another look at what is there, and so moves nothing."""
    returns = func._schema.returns
    aliases = any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
    return aliases or func.name() in ("aten::_unsafe_view", "aten::_local_scalar_dense", "aten::lift_fresh")


def _bytes_moved(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[Tensor], outputs: list[Tensor]
) -> int:
    """Every input read once and every output written once; what is written in place is both, unless it is replaced.

    Of a table from which rows are taken, or into which they are put, only those rows count.
    """
    name, schema = func.name(), func._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
    changed = [one for argument in schema if _is_written(argument) for one in _tensors(given.get(argument.name))]
    mutated = {id(tensor) for tensor in changed}
    written = sum(map(_size, changed)) + sum(_size(tensor) for tensor in outputs if id(tensor) not in mutated)
    if name in _READS_WHAT_IT_TAKES:
        return 2 * written + sum(_size(tensor) for tensor in inputs[1:])
    if name in _TOUCHES_WHAT_IT_GETS:
        return sum(map(_size, inputs[1:])) + 2 * _size(inputs[-1])
    replaced = name in _WRITES_ONLY or name.endswith(".out")
    return written + sum(_size(tensor) for tensor in inputs if not (replaced and id(tensor) in mutated))


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """By torch's formulas (torch.utils.flop_counter), and of grouped products, which have none there."""
    formula = flop_registry.get(func._overloadpacket)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=out))
    if func._overloadpacket is torch.ops.aten._grouped_mm:
        left, right = args[:2]
        return 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]
    return 0
