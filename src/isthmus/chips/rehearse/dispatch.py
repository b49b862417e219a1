"""Watching, refusing and emulating operators as torch dispatches them, below autograd."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.chips.rehearse import profile_of
from isthmus.chips.rehearse.tables import (
    MEANING,
    DtypeRule,
    Emulation,
    Numeric,
    NumericKind,
    Profile,
    RehearsalRefused,
    Status,
    Tally,
)


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
        if is_distributed(types):
            return NotImplemented
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Show one operator, and do it."""
        self.see(func.name(), set(_dtypes((*args, *kwargs.values()))))
        return func(*args, **kwargs)


class Rehearsal(OperatorWatch):
    """Refuses what a profile does not allow, does silently what `emulate` names; `tally` counts what ran."""

    def __init__(self, profile: Profile, *, strict: bool, emulate: Emulation | None = None, tally: Tally | None = None):
        super().__init__()
        self.profile, self.emulate = profile, emulate
        self.strict = strict or fallback_is_off(profile)
        self.tally = tally or Tally()
        self._ways: dict[str, dict[NumericKind, Numeric]] = {}
        self._noise = torch.Generator().manual_seed(emulate.seed) if emulate and emulate.noise else None

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        emulate = self.emulate
        if emulate is None:
            return super().run(func, args, kwargs)
        if emulate.substitute:
            args, kwargs = self._substituted(func, args, kwargs)
        result = super().run(func, args, kwargs)
        if emulate.fill:
            self._fill(func.name(), result)
        if self._noise is not None:
            result = self._vary(func.name(), args, result)
        return result

    def see(self, operator: str, dtypes: set[torch.dtype]) -> None:
        status = self.tally.operators.get(operator)
        if status is None:
            status = self.tally.operators[operator] = self._admit(operator, dtypes)
        for dtype in dtypes:
            self._check_dtype(operator, short_name(dtype))
        self.tally.calls[status] += 1
        self.tally.by_operator[operator] += 1

    def _admit(self, operator: str, dtypes: set[torch.dtype]) -> Status:
        if is_cpus_own(operator):
            return "unknown"
        status = self.profile.status(operator)
        if status == "none" or (status == "fallback" and self.strict):
            row = self.profile.operators[operator]
            raise RehearsalRefused(
                f"{operator} ({_joined(dtypes)}) is refused on {self.profile.chip}: {MEANING[status]} "
                f"({row.standing}: {row.source}). Write it with other operators, or place this stage on another pool."
            )
        if status == "fallback" and self.emulate and (warning := self.profile.numeric("fallback_warning")):
            warnings.warn(warning.value.format(operator=operator), UserWarning, stacklevel=2)
        return status

    def _check_dtype(self, operator: str, dtype: str) -> None:
        rule = self.profile.dtypes.get(dtype)
        if rule is None:
            return
        replaced = rule.action == "substitute" and self.emulate is not None and self.emulate.substitute
        if replaced:
            self._note_untested(operator, dtype)
        if replaced or not (rule.action == "substitute" or rule.refuses(operator)):
            self.tally.cautions[f"{operator} with {dtype}: {rule.behaviour}"] += 1
            return
        raise RehearsalRefused(
            f"{operator} with {dtype} is refused on {self.profile.chip}: {rule.behaviour} "
            f"({rule.standing}: {rule.source}). Use another dtype for this operator."
        )

    def _note_untested(self, operator: str, dtype: str) -> None:
        """A tensor that was made in a dtype which conversions replace: what the vendor tested says whether it works."""
        row = self.profile.operators.get(operator)
        if row is not None and row.documented_dtypes and _DOCUMENTED_AS.get(dtype, dtype) not in row.documented_dtypes:
            self.tally.untested[f"{operator} {dtype}"] += 1

    def _substituted(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that the chip's software takes instead."""
        operator = func.name()
        if operator == "aten::_to_copy" and (rule := self._stand_in(kwargs)) is not None:
            change = f"{operator} {rule.dtype} > {rule.stands_in}"
            if rule.warning and change not in self.tally.substitutions:
                warnings.warn(rule.warning, UserWarning, stacklevel=2)
            self.tally.substitutions[change] += 1
            kwargs = {**kwargs, "dtype": getattr(torch, str(rule.stands_in))}
        if (row := self._way("argument", operator)) is not None:
            name, _, change = row.value.partition(":")
            asked, _, given = change.partition(">")
            if _argument(func, args, kwargs, name) == asked:
                self.tally.substitutions[f"{operator} {name} {asked} > {given}"] += 1
                args, kwargs = _with_argument(func, args, kwargs, name, given)
        if (row := self._way("argument_caution", operator)) is not None:
            name, _, asked = row.value.partition(":")
            if str(_argument(func, args, kwargs, name)) == asked:
                self.tally.cautions[f"{operator} {name}={asked}: {row.behaviour}"] += 1
        return args, kwargs

    def _stand_in(self, kwargs: dict[str, Any]) -> DtypeRule | None:
        """The rule that replaces the dtype of a conversion. It holds where nothing but the dtype is asked for."""
        dtype = kwargs.get("dtype")
        if dtype is None or kwargs.get("layout") is not None or kwargs.get("device") is not None:
            return None
        rule = self.profile.dtypes.get(short_name(dtype))
        return rule if rule is not None and rule.action == "substitute" else None

    def _way(self, kind: NumericKind, operator: str) -> Numeric | None:
        """In what an operator's results differ, in one way."""
        ways = self._ways.get(operator)
        if ways is None:
            rows = (self.profile.numeric(way, operator) for way in _EMULATED)
            ways = self._ways[operator] = {row.kind: row for row in rows if row is not None}
        return ways.get(kind)

    def _fill(self, operator: str, result: Any) -> None:
        if isinstance(result, Tensor) and result.numel() and self._way("uninitialised", operator):
            result.fill_(_garbage(result.dtype))
            self.tally.filled[operator] += 1

    def _vary(self, operator: str, args: tuple[Any, ...], result: Any) -> Any:
        """Another order of accumulation, at each call."""
        if torch.are_deterministic_algorithms_enabled() or not self._way("non_deterministic", operator):
            return result
        assert self._noise is not None
        first = result[0] if isinstance(result, tuple | list) else result
        if isinstance(first, Tensor) and first.is_floating_point() and first.numel():
            first.copy_(_reordered(first, _terms(args), self._noise))
            self.tally.varied[operator] += 1
        return result


def enforce(chip: str, *, strict: bool = False, emulate: Emulation | None = None) -> Rehearsal:
    """A context in which this thread's tensor work obeys a chip's tables; its `tally` counts what ran.

    Raises RehearsalRefused, naming operator and dtypes, at an operator or dtype that the chip does not have; with
    `strict`, or with the vendor's own switch set in the environment, also at an operator that the chip would silently
    run on the host's CPU. What the chip would do silently is refused too, unless `emulate` says to do it. Enter it for
    the work that the chip is to do: building a model is the host's work.
    """
    return Rehearsal(profile_of(chip), strict=strict, emulate=emulate)


_EMULATED: tuple[NumericKind, ...] = ("argument", "argument_caution", "uninitialised", "non_deterministic")
_DOCUMENTED_AS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
_CPUS_OWN = ("mkldnn", "onednn", "_for_cpu", "_nnpack", "xnnpack", "fbgemm")


def is_cpus_own(operator: str) -> bool:
    """Whether an operator is there only because this runs on a CPU: it says nothing about a chip."""
    return any(part in operator for part in _CPUS_OWN)


def fallback_is_off(profile: Profile) -> bool:
    """Whether the vendor's switch that makes a fallback an error is set in the environment."""
    switch = profile.numeric("fallback_switch")
    return switch is not None and os.environ.get(switch.value) == "1"


def _garbage(dtype: torch.dtype) -> float | int | bool:
    """What nobody can mistake for a result."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def _terms(args: tuple[Any, ...]) -> int:
    """How many terms a result sums, about: the last dimension of the first tensor that has two."""
    return next((arg.shape[-1] for arg in args if isinstance(arg, Tensor) and arg.dim() > 1), 1)


def _reordered(value: Tensor, terms: int, generator: torch.Generator) -> Tensor:
    """A result as if its terms had been added in another order, in float32 or the dtype itself if that is wider.

    The relative error of a sum of n terms in random order grows as sqrt(n) times the unit roundoff (Higham and Mary,
    SIAM J. Sci. Comput. 41(5), 2019). A narrower dtype hides it but where a value is near to the middle of two numbers.
    """
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    error = torch.finfo(wide).eps / 2 * terms**0.5
    drawn = torch.empty(value.shape, dtype=wide).uniform_(-1.0, 1.0, generator=generator)
    if value.dtype == wide:
        return value * (1.0 + error * drawn)
    step = torch.finfo(value.dtype).eps
    moves = (drawn.abs() < error / step).to(wide) * drawn.sign()
    return (value.to(wide) * (1.0 + step * moves)).to(value.dtype)


@functools.cache
def _positions(func: Any) -> dict[str, tuple[int, Any]]:
    return {one.name: (at, one.default_value) for at, one in enumerate(func._schema.arguments)}


def _argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    at, default = _positions(func)[name]
    return kwargs.get(name, args[at] if at < len(args) else default)


def _with_argument(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    at, _ = _positions(func)[name]
    if at < len(args):
        return (*args[:at], value, *args[at + 1 :]), kwargs
    return args, {**kwargs, name: value}


@functools.cache
def is_composite(operator: Any) -> bool:
    """Whether an operator is nothing but others: it has a decomposition, and no kernel of its own on the CPU."""
    own = torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CPU")
    return operator._can_decompose() and not own


def is_distributed(types: Any) -> bool:
    """Whether an operator is of tensors that are spread over ranks: what it does comes again, on the parts here."""
    return any(kind.__name__ == "DTensor" for kind in types)


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
