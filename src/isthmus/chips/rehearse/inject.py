"""Planted faults, made to happen on one rank: at its steps, in its operators, its collectives and its saves.

What happens is drawn from the seed of each fault, so that a run with the same faults and the same work goes wrong in
the same way.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from isthmus.chips.rehearse.damage import damage, lower, single
from isthmus.chips.rehearse.dispatch import is_composite
from isthmus.chips.rehearse.faults import COLLECTIVES, LINK_KINDS, Fault, check_fault, of_collectives
from isthmus.chips.rehearse.saves import SaveDamage

REDUCTIONS = ("c10d::allreduce", "c10d::reduce", "c10d::_reduce_scatter")
MATMULS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::addbmm",
    "aten::baddbmm",
    "aten::mv",
    "aten::addmv",
    "aten::dot",
    "aten::_int_mm",
    "aten::_scaled_mm",
    "aten::_grouped_mm",
    "aten::_scaled_grouped_mm",
)
_MESSAGES = ("c10d::send", "c10d::recv")
_VALUES = ("flipped-bit", "small-error", "nan", "wrong-sum")
_OPERATORS = (*_VALUES, "fallback", "dtype-swap")
_STOPS = ("crash", "hang", "out-of-memory")
SLOWER = 10.0
"""How many times slower a slow rank, a slow link or a fallback is whose fault does not say."""
FALLBACK_S = 5e-4
"""The least that a fallback takes longer, seconds: without it one in the smallest operators could not be told."""
NAP_S = 5e-4
"""Shorter delays of a slow rank are put together, for a sleep cannot be shorter than the scheduler's grain."""
OUT_OF_MEMORY_GIB = 2.0


class _Planted:
    """A fault and its own stream of draws."""

    def __init__(self, fault: Fault, index: int):
        self.fault = fault
        self.draws = random.Random(f"{fault.seed}/{fault.rank}/{fault.kind}/{index}")

    def strikes(self, step: int) -> bool:
        if self.fault.step is not None and self.fault.step != step:
            return False
        return self.fault.rate >= 1.0 or self.draws.random() < self.fault.rate

    def concerns(self, operator: str, default: tuple[str, ...]) -> bool:
        return operator.startswith(self.fault.operator or default)


class Injector:
    """Makes the faults of one rank happen. `fired` says what happened, in order, and `struck` of which
    faults. Nothing does until it is `armed`.

    `faults` may hold those of other ranks: they are left to them, but for links, which have two ends. Raises
    IsthmusError for a fault that says what its kind cannot honour. `on_chip` says whether an operator that runs now is
    the chip's, for a process that has work of its host too: faults of operators leave that alone. All are without it.
    """

    def __init__(
        self, faults: Sequence[Fault], rank: int, *, armed: bool = True, on_chip: Callable[[], bool] | None = None
    ):
        for fault in faults:
            check_fault(fault)
        own = [_Planted(fault, index) for index, fault in enumerate(faults) if fault.rank == rank]
        self.rank = rank
        self.fired: list[str] = []
        self.struck: list[Fault] = []
        self.last_words: Callable[[], None] | None = None
        self.links = [fault for fault in faults if fault.kind in LINK_KINDS]
        self.current_step = self.collectives = 0
        self._stops = [one for one in own if one.fault.kind in _STOPS]
        self._slow = [one for one in own if one.fault.kind == "slow-rank"]
        self._in_operators = [one for one in own if one.fault.kind in _OPERATORS and not of_collectives(one.fault)]
        self._in_collectives = [one for one in own if one.fault.kind in _VALUES and of_collectives(one.fault)]
        self._saves = [one for one in own if one.fault.kind == "corrupted-save"]
        self._lagging: list[Fault] = []
        self._worked, self._owed = time.process_time(), 0.0
        self.armed, self._on_chip = armed, on_chip
        self._noted: int | None = None
        self._warned: set[str] = set()

    @property
    def in_collectives(self) -> bool:
        """Whether a process group has anything to do for this rank."""
        return bool(self._in_collectives or self.links or self._slow or any(one.fault.operator for one in self._stops))

    def begin(self) -> None:
        """New work begins: it is at step 0 until it says otherwise, and faults strike from now on."""
        self.armed = True
        self._worked, self._owed = time.process_time(), 0.0
        self._enter(0)

    def _enter(self, step: int) -> None:
        self.current_step = step
        self._lagging = [one.fault for one in self._slow if one.strikes(step)]

    def step(self, step: int) -> None:
        """A step begins, or goes on. A rank that crashes, hangs or is out of memory does so here; a slow one lags.

        Raises torch.OutOfMemoryError.
        """
        self.drag()
        self._enter(step)
        for one in self._stops:
            if one.fault.operator is None and one.strikes(step):
                self._stop(one.fault, "")

    def operators(self) -> AbstractContextManager[Any]:
        """A context in which the results of this thread's operators, and of their backward passes, are damaged."""
        if self._in_operators or self._slow or any(one.fault.operator for one in self._stops):
            return _Operators(self)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def install_saves(self) -> Iterator[None]:
        """A context in which files of tensors that this process writes get a byte flipped once they are written."""
        if not self._saves:
            yield
            return
        with SaveDamage(self._save_draws, self.note):
            yield

    def before_collective(self, operator: str) -> None:
        """A collective begins, named as in `c10d::allreduce_`. Faults that stop the rank at it happen here."""
        self.collectives += 1
        if not self.armed:
            return
        self.drag()
        for one in self._stops:
            if of_collectives(one.fault) and one.concerns(operator, ()) and one.strikes(self.current_step):
                self._stop(one.fault, f" before {operator}")

    def striking(self, operator: str) -> list[_Planted]:
        """The faults that will damage the result of this collective."""
        able = self._in_collectives if self.armed else []
        return [one for one in able if one.concerns(operator, REDUCTIONS) and one.strikes(self.current_step)]

    def damage_result(self, struck: Sequence[_Planted], operator: str, collective: int, results: list[Tensor]) -> None:
        """Damage what a collective gave this rank."""
        with _disable_current_modes():
            for one in struck:
                done = damage(one.fault, results, one.draws)
                if done is not None:
                    self.note(one.fault, f"{operator}, {done}", collective=collective)

    def note(self, fault: Fault, what: str, collective: int | None = None) -> None:
        """Remember that a fault happened, and when."""
        number = "" if collective is None else f", collective {collective}"
        self.struck.append(fault)
        self.fired.append(f"{fault.kind} at step {self.current_step}{number}: {what}")

    def drag(self) -> None:
        """A slow rank sleeps, in proportion to what it computed since the last time."""
        if not self._lagging:
            self._worked = time.process_time() if self._slow else 0.0
            return
        worked = time.process_time() - self._worked
        self._owed += sum((_size(fault, SLOWER) - 1.0) * worked for fault in self._lagging)
        if self._owed >= NAP_S:
            time.sleep(self._owed)
            self._owed = 0.0
            if self._noted != self.current_step:
                self._noted = self.current_step
                self.note(self._lagging[0], "it lags")
        self._worked = time.process_time()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator, with the faults that strike it."""
        name = func.name()
        self.drag()
        if self._on_chip is not None and not self._on_chip():
            return func(*args, **kwargs)
        for one in self._stops:
            if one.fault.operator and one.concerns(name, ()) and one.strikes(self.current_step):
                self._stop(one.fault, f" in {name}")
        struck = [one for one in self._in_operators if one.concerns(name, MATMULS) and one.strikes(self.current_step)]
        if not struck:
            return func(*args, **kwargs)
        result = self._swapped(struck, func, args, kwargs)
        changed = [one for one in struck if one.fault.kind in _VALUES]
        if changed:
            with _disable_current_modes():
                for one in changed:
                    done = damage(one.fault, list(_own_results(func, result)), one.draws)
                    if done is not None:
                        self.note(one.fault, f"{name}, {done}")
        return result

    def _swapped(self, struck: list[_Planted], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        began = time.perf_counter()
        swap = next((one.fault for one in struck if one.fault.kind == "dtype-swap"), None)
        if swap is None:
            result = func(*args, **kwargs)
        else:
            result = _in_lower_dtype(func, args, kwargs, None if swap.size is None else int(swap.size))
            self.note(swap, func.name())
        taken = time.perf_counter() - began
        for one in struck:
            if one.fault.kind == "fallback":
                self._fall_back(one.fault, func.name(), taken)
        return result

    def _fall_back(self, fault: Fault, name: str, taken: float) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"CAUTION: The operator '{name}' is not currently supported on this backend and will fall back to run "
                "on the CPU. This may have performance implications. (planted by a rehearsal)",
                stacklevel=2,
            )
        delay = max((_size(fault, SLOWER) - 1.0) * taken, FALLBACK_S)
        time.sleep(delay)
        self.note(fault, f"{name}, {delay * 1e3:.3g} ms longer")

    def _stop(self, fault: Fault, where: str) -> None:
        self.note(fault, f"planted{where}")
        print(f"planted: {self.fired[-1]}", file=sys.stderr, flush=True)
        if self.last_words is not None:
            self.last_words()
        if fault.kind == "crash":
            _crash(fault)
        if fault.kind == "hang":
            while True:
                time.sleep(3600)
        size = _size(fault, OUT_OF_MEMORY_GIB)
        raise torch.OutOfMemoryError(
            f"out of memory. Tried to allocate {size:.2f} GiB. Of the allocated memory most is allocated by PyTorch, "
            "and some is reserved by PyTorch but unallocated. (planted by a rehearsal)"
        )

    def _save_draws(self) -> list[tuple[Fault, random.Random]]:
        return [(one.fault, one.draws) for one in self._saves if one.strikes(self.current_step)]


class _Operators(TorchDispatchMode):
    """Passes every operator of this thread to an injector. Composite ones come as their parts."""

    def __init__(self, injector: Injector):
        super().__init__()
        self._injector = injector

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False leaves torch.compile's machinery unloaded, which takes a second and is not used here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # What a DTensor does comes here again, on plain tensors.
        if func.namespace not in ("aten", "prims"):
            return func(*args, **kwargs)
        if is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        return self._injector.run(func, args, kwargs)


class CollectiveCount(TorchDispatchMode):
    """Calls `begin` before each collective of this thread and of the backward passes that it starts."""

    def __init__(self, begin: Callable[[], None]):
        super().__init__()
        self._begin = begin

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """As for operators."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented
        name = func.name()
        functional = name.startswith("_c10d_functional::") and "wait_tensor" not in name
        if functional or (name.startswith(COLLECTIVES) and not name.startswith(_MESSAGES)):
            self._begin()
        return func(*args, **(kwargs or {}))


def _size(fault: Fault, default: float) -> float:
    return default if fault.size is None else fault.size


def _crash(fault: Fault) -> NoReturn:
    if fault.size is not None:
        os._exit(int(fault.size))
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process goes on")


def _own_results(func: Any, result: Any) -> Iterator[Tensor]:
    """The tensors that an operator returns and that are not views of what it was given."""
    results = result if isinstance(result, list | tuple) else (result,)
    returned = func._schema.returns
    for index, one in enumerate(results):
        alias = returned[min(index, len(returned) - 1)].alias_info
        if isinstance(one, Tensor) and (alias is None or alias.is_write):
            yield one


def _in_lower_dtype(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], bits: int | None) -> Any:
    """An operator on arguments of a lower dtype. One that writes into an argument keeps the dtypes that it has."""
    if func._schema.is_mutable:
        bits = 23 if bits is None else bits
        written = {one.name for one in func._schema.arguments if one.alias_info is not None and one.alias_info.is_write}
        names = [one.name for one in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        lowered = {name: value if name in written else lower(value, bits) for name, value in given.items()}
        return func(*(lowered[name] for name in names[: len(args)]), **{name: lowered[name] for name in kwargs})
    result = func(*lower(args, bits), **{name: lower(value, bits) for name, value in kwargs.items()})
    return single(result) if bits is None else result
