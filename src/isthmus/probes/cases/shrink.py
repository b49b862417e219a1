"""Makes a failing call small: fewer ranks, shorter lists, smaller numbers, while it still fails in the same manner.

Delta debugging (Zeller and Hildebrandt, IEEE Transactions on Software Engineering 28, 2002) over arguments in JSON.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from isthmus.launch.crew import Called
from isthmus.probes.cases.reproduction import manner_of, same_manner

LEAST = 1
WIDEST_ALIGNMENT = 64
RUNS = 10
SURE_AFTER = 3
KEPT = (
    "seed",
    "tolerance",
    "allowed",
    "expected",
    "reference",
    "trusted",
    "limit",
    "threshold",
    "bound",
    "factor",
    "scale",
)
"""Beginnings of names of arguments that are no sizes: to change them changes what counts as a failure."""

Path = tuple[str | int, ...]
Manner = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A call of a portable probe on a number of ranks."""

    arguments: dict[str, Any]
    ranks: int

    @property
    def key(self) -> str:
        return json.dumps([self.ranks, self.arguments], sort_keys=True, default=str)


@dataclass
class Budget:
    """What shrinking may cost: seconds, and calls. It is looked at before each call."""

    seconds: float
    calls: int
    began: float = field(default_factory=time.monotonic)
    spent: int = 0

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def is_over(self) -> bool:
        return self.elapsed >= self.seconds or self.spent >= self.calls


@dataclass(frozen=True)
class Frequency:
    """How many of a number of runs failed in the manner that is looked for, and in which other ways some ended."""

    failures: int
    runs: int
    others: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        return self.failures / self.runs if self.runs else 0.0

    def __add__(self, other: Frequency) -> Frequency:
        others = tuple(dict.fromkeys((*self.others, *other.others)))
        return Frequency(self.failures + other.failures, self.runs + other.runs, others)

    def __str__(self) -> str:
        return f"fails in {self.failures} of {self.runs} runs"


def manner_of_call(called: Called) -> Manner | None:
    """In which way a call failed; None if it did not."""
    return manner_of([vars(one) for one in called.replies])


@dataclass
class Judge:
    """Decides whether a call still fails as the first one did, and often enough.

    `run` makes the call where it failed. `reference` makes it where the first call passed, if there is such a place: a
    smaller call that fails there too has become another failure, and does not count.
    """

    run: Callable[[Call], Called]
    manner: Manner
    budget: Budget
    reference: Callable[[Call], Called] | None = None
    usual: float = 1.0
    tell: Callable[[], None] = lambda: None
    _known: dict[str, bool] = field(default_factory=dict)

    def frequency(self, call: Call, runs: int = RUNS, sure_after: int = SURE_AFTER) -> Frequency:
        """Run a call up to `runs` times. If it fails in each of the first `sure_after`, that is enough."""
        failures, done, others = 0, 0, Counter[str]()
        while done < runs and not (done >= sure_after and failures == done) and not (done and self.budget.is_over):
            manner = self._manner(self.run, call)
            done += 1
            if same_manner(manner, self.manner):
                failures += 1
            elif manner is not None:
                others[", ".join([manner["state"], *manner["errors"]])] += 1
        return Frequency(failures, done, tuple(others))

    def fails(self, call: Call) -> bool:
        """Whether a call fails in the same manner, at least half as often as the first one. False without budget."""
        if call.key not in self._known and not self.budget.is_over:
            self._known[call.key] = self._often_enough(call) and self._passes_on_the_reference(call)
        return self._known.get(call.key, False)

    def _often_enough(self, call: Call) -> bool:
        runs = 1 if self.usual == 1.0 else RUNS
        needed, failures = max(1, math.ceil(self.usual * runs / 2)), 0
        for done in range(runs):
            if failures >= needed or failures + runs - done < needed or (done and self.budget.is_over):
                break
            failures += same_manner(self._manner(self.run, call), self.manner)
        return failures >= needed

    def _passes_on_the_reference(self, call: Call) -> bool:
        return self.reference is None or self._manner(self.reference, call) is None

    def _manner(self, run: Callable[[Call], Called], call: Call) -> Manner | None:
        self.budget.spent += 1
        called = run(call)
        self.tell()
        return manner_of_call(called)


def shrink(call: Call, fails: Callable[[Call], bool], suspects: Sequence[int] = ()) -> Call:
    """A smaller call for which `fails` holds, or the call itself. `suspects` are the ranks at fault, where known.

    Every call that is returned was seen to fail. `fails` is False where nothing more may be spent, which ends this.
    """
    while True:
        before = call
        call = _fewer_ranks(call, fails, suspects)
        call = _shorter_lists(call, fails)
        call = _smaller_together(call, fails)
        call = _smaller_alone(call, fails)
        if call == before:
            return call


def _fewer_ranks(call: Call, fails: Callable[[Call], bool], suspects: Sequence[int]) -> Call:
    """The smallest number of ranks that fails: those that hold the ranks at fault go first."""
    needed = max(suspects, default=0) + 1
    halves = [call.ranks >> shift for shift in range(1, call.ranks.bit_length())]
    wanted = {1, 2, needed, needed + 1, call.ranks - 1, *halves}
    sizes = sorted((size for size in wanted if 1 <= size < call.ranks), key=lambda size: (size < needed, size))
    found = call.ranks
    for size in sizes:
        if size < found and fails(replace(call, ranks=size)):
            found = size
    return replace(call, ranks=found)


def _shorter_lists(call: Call, fails: Callable[[Call], bool]) -> Call:
    done: set[Path] = set()
    while (
        path := next((p for p, v in _walk(call.arguments) if isinstance(v, list) and p not in done), None)
    ) is not None:
        done.add(path)
        if not _is_kept(path):
            call = _with(call, [path], ddmin(_get(call.arguments, path), _fails_with(call, [path], fails)))
    return call


def _smaller_together(call: Call, fails: Callable[[Call], bool]) -> Call:
    """Numbers that are equal may have to stay equal, as the inner sizes of a product do."""
    counts = Counter(value for _, value in _numbers(call.arguments))
    for value in sorted((value for value, times in counts.items() if times > 1), reverse=True):
        paths = [path for path, one in _numbers(call.arguments) if one == value]
        if len(paths) > 1:
            call = _with(call, paths, smallest(value, _fails_with(call, paths, fails)))
    return call


def _smaller_alone(call: Call, fails: Callable[[Call], bool]) -> Call:
    for path, value in sorted(_numbers(call.arguments), key=lambda found: -found[1]):
        call = _with(call, [path], smallest(value, _fails_with(call, [path], fails)))
    return call


def _fails_with(call: Call, paths: Sequence[Path], fails: Callable[[Call], bool]) -> Callable[[Any], bool]:
    return lambda value: fails(_with(call, paths, value))


def smallest(value: int, fails: Callable[[int], bool]) -> int:
    """A small failing number: the least, else by halving, else between the last that fails and the first that passes.

    Numbers that keep the powers of two of `value` are tried before others: kernels want aligned sizes.
    """
    if value <= LEAST:
        return value
    if fails(LEAST):
        return LEAST
    alignment = math.gcd(value, WIDEST_ALIGNMENT)
    passes, failing = LEAST, value
    while (half := failing // 2 // alignment * alignment) > passes:
        if fails(half):
            failing = half
        else:
            passes = half
            break
    while failing - passes > 1:
        middle = (failing + passes) // 2 // alignment * alignment
        if not passes < middle < failing:
            if alignment == 1:
                break
            alignment //= 2
        elif fails(middle):
            failing = middle
        else:
            passes = middle
    return failing


def ddmin(items: list[Any], fails: Callable[[list[Any]], bool]) -> list[Any]:
    """A failing part of a list from which no chunk can be left out, one item at least."""
    parts = 2
    while len(items) > 1:
        size = math.ceil(len(items) / parts)
        cuts = range(0, len(items), size)
        chunks = [items[cut : cut + size] for cut in cuts]
        rests = [items[:cut] + items[cut + size :] for cut in cuts] if len(chunks) > 2 else []
        for kept in itertools.chain(chunks, rests):
            if fails(kept):
                items, parts = kept, 2 if len(kept) == size else max(parts - 1, 2)
                break
        else:
            if parts >= len(items):
                return items
            parts = min(parts * 2, len(items))
    return items


def _walk(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every node of a JSON tree with its path, parents first."""
    yield path, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _walk(value, (*path, key))


def _numbers(tree: Any) -> list[tuple[Path, int]]:
    """Integers that may become smaller."""
    return [
        (path, value)
        for path, value in _walk(tree)
        if isinstance(value, int) and not isinstance(value, bool) and value > LEAST and not _is_kept(path)
    ]


def _is_kept(path: Path) -> bool:
    return any(isinstance(key, str) and key.startswith(KEPT) for key in path)


def _get(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _with(call: Call, paths: Sequence[Path], value: Any) -> Call:
    arguments = deepcopy(call.arguments)
    for path in paths:
        _get(arguments, path[:-1])[path[-1]] = value
    return replace(call, arguments=arguments)
