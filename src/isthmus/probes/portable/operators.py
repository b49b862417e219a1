"""Each operator of a trace on a device: against float64 on the host, against itself, forward and backward.

What is drawn is drawn on the host from a seed, rounded to the dtype under test, and given to both. The host's part is
done outside of any dispatch mode, so that what is injected into the device's part cannot touch it.
"""

from __future__ import annotations

import json
import math
import random
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

PERTURBATIONS, CLOSE = 4, 0.05
"""How often the reference is moved to see what rounding explains, where once leaves an error near its limit."""
SMALL = 0.125
"""Of the root mean square: the small-value rule. Relative errors are relative to no less than this."""
LIMITS = {"max": 32.0, "mean": 16.0, "rmse": 16.0}
"""How many times the error that rounding alone explains is too much, before the growth with the length of sums."""
RATIOS = {"max": 5.0, "mean": 1.5, "rmse": 1.5}
"""How many times a trusted chip's error is too much: level L1 of msprobe's precision standard."""
ROUNDED = {"max": 1.0, "mean": 0.25, "rmse": 0.3}
"""A trusted error counts as no less than so many unit roundoffs: rounding the result once costs that."""
LOOSE = 1e-2
"""Of the largest value: results of an operator that may add in any order differ by less."""
SLOWER, SLOW_S = 8.0, 2e-4
"""Slower than its peers by so much, relative to the host, and by so many seconds: an operator may run elsewhere."""
OFF_DEVICE = ("fall back", "fallback", "falls back", "fell back", "run on the cpu", "runs on the cpu", "on cpu instead")
_EXACT = (
    "alias arange argmax as_strided bitwise_and bitwise_not bitwise_or bucketize cat clamp clone constant_pad_nd copy_ "
    "detach detach_ diagonal embedding empty_like eq expand fill_ flip full full_like gather ge gt index index_copy_ "
    "index_put index_put_ index_select lift_fresh logical_and logical_not logical_or lt le masked_fill masked_fill_ "
    "max minimum maximum min ne neg new_zeros nonzero ones ones_like permute repeat roll scalar_tensor scatter "
    "scatter_ "
    "select select_backward sign slice slice_backward sort split split_with_sizes squeeze stack t topk transpose tril "
    "triu unbind unsqueeze view where zeros zeros_like zero_ _local_scalar_dense _reshape_alias _to_copy _unsafe_view "
    "bitwise_xor any all argsort narrow unfold amax amin abs relu"
)
EXACT = frozenset(_EXACT.split())
"""Operators that choose, move or compare, and never round: forward, they have one right answer."""
CHOOSING = frozenset({"topk", "argmax", "argmin", "max", "min", "sort"})
"""Operators whose indices are right if they point at the right values."""
UNDEFINED = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})
_ORDERLESS = (
    "index_add index_add_ scatter_add scatter_add_ index_put index_put_ embedding_dense_backward cumsum bincount "
    "scatter_reduce scatter_reduce_ index_reduce embedding gather index index_select"
)
ORDERLESS = frozenset(_ORDERLESS.split())
"""Operators that torch documents as non-deterministic on some devices (torch.use_deterministic_algorithms), or whose
backward pass is one of those: there, a result that changes is reported and no failure."""


def check_operators(
    rank: Any,
    calls: list[dict[str, Any]],
    dtypes: list[str],
    repeats: int = 2,
    seed: int = 0,
    trusted: dict[str, dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Make every call in every floating dtype, forward and backward, and compare.

    `calls` are specifications as `isthmus.probes.calls` makes them. Calls without floating tensors are made once, and
    must be exact. Each is made `repeats` times, and has to give the same bits; a step is the number of a call.
    `trusted` maps "operator dtype pass" to the errors of a trusted chip, in units of what rounding explains; without it
    the host in that dtype is trusted.

    Returns `failed`, `detail`, `findings` (each with the number of its call), `checked`, `unchecked` with reasons,
    `noted` (what is worth a word and no failure), `errors` and `ratios` by "operator dtype pass", `closest` (the
    largest share of its limit that an error came to), and `digests` of the results.
    """
    study = _Study(rank, dtypes, max(1, repeats), seed, trusted)
    rank.beat("operators", 0)
    with _all_warnings():
        for number, call in enumerate(calls):
            rank.beat(str(call["operator"]), number)
            study.examine(number, call)
        study.look_at_times(calls)
    return study.result()


class _Study:
    """The findings as they come in."""

    def __init__(self, rank: Any, dtypes: list[str], repeats: int, seed: int, trusted: Any):
        self.device, self.rank, self.dtypes, self.repeats, self.seed = rank.device, rank.rank, dtypes, repeats, seed
        self.trusted = trusted
        self.findings: list[dict[str, Any]] = []
        self.noted: list[dict[str, Any]] = []
        self.unchecked: list[dict[str, Any]] = []
        self.errors: dict[str, dict[str, float]] = {}
        self.ratios: dict[str, dict[str, float]] = {}
        self.digests: dict[str, str] = {}
        self.times: dict[tuple[int, str], tuple[float, float]] = {}
        self.checked = 0
        self.closest = 0.0

    def examine(self, number: int, call: dict[str, Any]) -> None:
        values = [*call["arguments"], *call["named"].values()]
        floating = any(spec["dtype"] == "float" for spec in _specs(values))
        suited = [name for name in self.dtypes if name in call.get("dtypes", self.dtypes)]
        for name in suited if floating else suited[:1]:
            _Examination(self, number, call, name).run()

    def add(self, where: list[dict[str, Any]], call: int, operator: str, dtype: str, way: str, kind: str, text: str):
        where.append({"call": call, "operator": operator, "dtype": dtype, "pass": way, "kind": kind, "detail": text})

    def look_at_times(self, calls: list[dict[str, Any]]) -> None:
        """An operator far slower than its peers, seen twice, may run somewhere else. Noise is not seen twice."""
        if len(self.times) < 8:
            return
        here = sorted(mine for mine, _ in self.times.values())[len(self.times) // 2]
        there = sorted(host for _, host in self.times.values())[len(self.times) // 2]
        for (number, name), (mine, host) in self.times.items():
            allowed = SLOWER * max(here * max(1.0, host / there), SLOW_S / SLOWER)
            if mine <= allowed:
                continue
            again = _Examination(self, number, calls[number], name).time_again()
            if again > allowed:
                text = f"takes {again * 1e3:.2g} ms where its peers take {here * 1e3:.2g} ms: it may run elsewhere"
                self.add(self.findings, number, calls[number]["operator"], name, "forward", "fallback", text)

    def result(self) -> dict[str, Any]:
        shown = "; ".join(_sentence(one) for one in self.findings[:4])
        more = len(self.findings) - 4
        detail = f"rank {self.rank}: {shown}{f'; and {more} more' if more > 0 else ''}" if self.findings else ""
        return {
            "failed": bool(self.findings),
            "detail": detail,
            "findings": self.findings,
            "noted": self.noted,
            "checked": self.checked,
            "unchecked": self.unchecked,
            "errors": self.errors,
            "ratios": self.ratios,
            "closest": self.closest,
            "digests": self.digests,
        }


def _is_of_the_host(text: str) -> bool:
    """Whether a warning, or an error where the vendor's switch forbids it, says that the host has to compute."""
    return any(word in text.lower() for word in OFF_DEVICE)


def _sentence(finding: dict[str, Any]) -> str:
    return f"{finding['operator']} in {finding['dtype']}, {finding['pass']}: {finding['detail']}"


class _Examination:
    """One call in one dtype."""

    def __init__(self, study: _Study, number: int, call: dict[str, Any], name: str):
        self.study, self.number, self.call, self.name = study, number, call, name
        self.dtype: torch.dtype = getattr(torch, name)
        self.operator = call["operator"]
        self.short = self.operator.partition("::")[2].partition(".")[0]
        self.function = _function(self.operator)
        self.writes = self.function is not None and _writes(self.function)
        self.differentiable = self.function is not None and not self.writes and not _views(self.function)
        self.moved: list[dict[str, Any]] = []
        text = json.dumps([self.operator, call["arguments"], call["named"]], sort_keys=True)
        self.seed = (zlib.crc32(text.encode()) + 1_000_003 * study.seed) % 2**62

    def run(self) -> None:
        if self.function is None:
            self._unchecked("this version of torch does not have it")
            return
        device = self.study.device
        with _disable_current_modes():
            host = self._host()
            given = self._inputs(self.dtype, device)
        if host is None:
            return
        runs = []
        for _ in range(self.study.repeats):
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                got, problem = self._attempt(given, device, self.differentiable)
            self._listen(heard)
            if got is None:
                self._fail(problem[0], "fallback" if _is_of_the_host(problem[1]) else "error", problem[1])
                return
            with _disable_current_modes():
                runs.append(_on_host(got))
        self.study.times[self.number, self.name] = (min(run["seconds"] for run in runs), host["seconds"])
        with _disable_current_modes():
            right = [self._compare(way, runs[0], host) for way in ("forward", "backward")]
            if all(right):
                self._compare_repeats(runs)
        self.study.checked += 1

    def time_again(self) -> float:
        """Seconds of the fastest of a few more calls."""
        with _disable_current_modes():
            given = self._inputs(self.dtype, self.study.device)
        tries = [self._attempt(given, self.study.device, False)[0] for _ in range(5)]
        return min((one["seconds"] for one in tries if one is not None), default=0.0)

    def _host(self) -> dict[str, Any] | None:
        """Results of the host in float64 and in this dtype. None: not a valid call."""
        cpu = torch.device("cpu")
        inputs = self._inputs(self.dtype, cpu)
        wide = _in_double(inputs)
        exact, problem = self._attempt(wide, cpu, self.differentiable, reference=True)
        if exact is None and self.differentiable:
            self.differentiable = False
            exact, problem = self._attempt(wide, cpu, False, reference=True)
        if exact is None:
            self._unchecked(f"the reference does not take this call: {problem[1]}")
            return None
        self.differentiable = exact["backward"] is not None
        plain = self._attempt(inputs, cpu, self.differentiable)[0]
        return {
            "seconds": (plain or exact)["seconds"],
            "plain": plain and _on_host(plain),
            "forward": exact["forward"],
            "backward": exact["backward"],
            "length": max((tensor.numel() for tensor in _tensors(inputs)), default=1),
        }

    def _spread(self, way: str, index: int, count: int) -> list[Tensor]:
        """One result of the reference, `count` times, with every number moved by one unit roundoff, up or down."""
        unit = torch.finfo(self.dtype).eps / 2
        while len(self.moved) < count:
            generator = torch.Generator().manual_seed(self.seed + 1 + len(self.moved))

            def move(tensor: Tensor, generator: torch.Generator = generator) -> Tensor:
                signs = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.float64)
                return tensor * (1.0 - unit + 2.0 * unit * signs)

            inputs = _in_double(self._inputs(self.dtype, torch.device("cpu")), move)
            done = self._attempt(inputs, torch.device("cpu"), self.differentiable, reference=True, move=move)[0]
            self.moved.append(done or {"forward": None, "backward": None})
        return [one[way][index] for one in self.moved[:count] if one[way] is not None]

    def _inputs(self, dtype: torch.dtype, device: torch.device) -> Any:
        generator = torch.Generator().manual_seed(self.seed)
        make = Maker(generator, dtype, device)
        arguments = make.value(self.call["arguments"])
        return arguments, {name: make.value(value) for name, value in self.call["named"].items()}

    def _attempt(
        self,
        inputs: Any,
        device: torch.device,
        differentiate: bool,
        reference: bool = False,
        move: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> Any:
        """(results, "") of one call, or (None, (pass, error)). `move` changes the gradients that go back."""
        with _disable_current_modes():
            args, named = _copies(inputs, differentiate)
            leaves = [leaf for leaf in _tensors([args, named]) if leaf.requires_grad]
        work = _REFERENCES.get(self.short, self.function) if reference else self.function
        way = "forward"
        try:
            began = time.perf_counter()
            out = work(*args, **named)  # pyright: ignore[reportOptionalCall]
            _finish(device)
            seconds = time.perf_counter() - began
            with _disable_current_modes():
                results = [*_flat(out), *(self._written(args, named) if self.writes else [])]
                ends, given = self._ends(results, move) if leaves else ([], [])
            found = None
            if ends:
                way = "backward"
                found = list(torch.autograd.grad(ends, leaves, given, allow_unused=True))
                _finish(device)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return None, (way, lines[0][:300])
        return {"forward": results, "backward": found, "seconds": seconds}, ("", "")

    def _ends(self, results: list[Any], move: Callable[[Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The results that can be differentiated, and a gradient for each: drawn on the host, in this dtype."""
        generator = torch.Generator().manual_seed(self.seed + 7)
        ends, given = [], []
        for out in results:
            if isinstance(out, Tensor) and out.is_floating_point():
                drawn = torch.randn(out.shape, generator=generator).to(self.dtype)
                if out.requires_grad:
                    ends.append(out)
                    given.append(move(drawn.to(out.dtype)).to(out.device))
        return ends, given

    def _written(self, args: Any, named: Any) -> list[Tensor]:
        """The tensors that an operator changes in place."""
        assert self.function is not None
        found: list[Tensor] = []
        for position, argument in enumerate(self.function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else named.get(argument.name)
                found += list(_tensors([value]))
        return found

    def _listen(self, heard: list[warnings.WarningMessage]) -> None:
        for one in heard:
            text = " ".join(str(one.message).split())
            if _is_of_the_host(text):
                self._fail("forward", "fallback", f"runs on the host: {text[:200]}")
                return

    def _compare_repeats(self, runs: list[dict[str, Any]]) -> None:
        """Bit by bit, with the first."""
        if self.short in UNDEFINED:
            return
        for way in ("forward", "backward"):
            first = runs[0][way] or []
            pairs = [(one, other) for run in runs[1:] for one, other in zip(first, run[way] or [], strict=True)]
            if all(_equal_bits(one, other) for one, other in pairs):
                continue
            worst = max(_distance(one, other) for one, other in pairs)
            text = f"repeats give other bits, by up to {worst:.2g} of the largest value"
            if self.short in ORDERLESS and self.study.device.type != "cpu" and worst < LOOSE:
                self._note(way, "non-deterministic", text)
            else:
                self._fail(way, "non-deterministic", text)

    def _compare(self, way: str, run: dict[str, Any], host: dict[str, Any]) -> bool:
        """One pass with what it should be. True if all is well, or if there is no such pass."""
        got, wanted = run[way], host[way]
        if wanted is None:
            return True
        if got is None:
            return self._fail(way, "error", "there is no backward pass")
        if self.short not in UNDEFINED:
            digest = zlib.crc32(json.dumps([_digest(one) for one in got]).encode())
            self.study.digests[f"{self.number} {self.name} {way}"] = f"{digest:08x}"
        if len(got) != len(wanted):
            return self._fail(way, "wrong", f"gives {len(got)} results, not {len(wanted)}")
        plain = host["plain"] and host["plain"][way]
        for index, (one, reference) in enumerate(zip(got, wanted, strict=True)):
            like = plain[index] if plain and len(plain) == len(got) else None
            if not self._judge(way, index, one, reference, like, host["length"]):
                return False
        return True

    def _judge(self, way: str, index: int, got: Any, wanted: Any, like: Any, length: int) -> bool:
        """Whether one result is right: its kind and dtype, its shape, then its values."""
        if not isinstance(wanted, Tensor):
            same = got == wanted or _close_numbers(got, wanted, torch.finfo(self.dtype).eps)
            return same or self._fail(way, "wrong", f"gives {got!r}, not {wanted!r}")
        if not isinstance(got, Tensor) or got.shape != wanted.shape:
            form = list(got.shape) if isinstance(got, Tensor) else repr(got)
            return self._fail(way, "wrong", f"gives {form} where {list(wanted.shape)} is right")
        if isinstance(like, Tensor) and got.dtype != like.dtype:
            return self._fail(way, "dtype", f"gives {_short(got)} where {_short(like)} is due")
        if self.short in UNDEFINED or wanted.numel() == 0:
            return True
        if not wanted.is_floating_point():
            return self._judge_choice(way, got, wanted)
        if way == "forward" and self.short in EXACT:
            right = wanted.to(got.dtype)
            same = torch.equal(right.nan_to_num(nan=7.0), got.nan_to_num(nan=7.0))
            return same or self._fail(way, "wrong", f"{_differing(got, right)} where one value is right")
        return self._judge_values(way, index, got, wanted, like, length)

    def _judge_choice(self, way: str, got: Tensor, wanted: Tensor) -> bool:
        if torch.equal(got.long(), wanted.long()):
            return True
        if self.short in CHOOSING:
            source = next(_tensors([self._inputs(self.dtype, torch.device("cpu"))]))
            axis = self._axis(source)
            if got.min() >= 0 and got.max() < max(1, source.shape[axis] if source.dim() else 1):
                one, other = (_taken(source, index.long(), axis) for index in (got, wanted))
                if torch.equal(one, other):
                    return True
        return self._fail(way, "wrong", f"{_differing(got, wanted)} of what is exact")

    def _axis(self, source: Tensor) -> int:
        """The dimension along which an operator chooses: its argument of that name, else the last."""
        assert self.function is not None
        names = [argument.name for argument in self.function._schema.arguments]
        place = names.index("dim") if "dim" in names else len(names)
        value = self.call["named"].get("dim")
        if value is None and place < len(self.call["arguments"]):
            value = self.call["arguments"][place]
        return value if isinstance(value, int) else -1

    def _judge_values(self, way: str, index: int, got: Tensor, wanted: Tensor, like: Any, length: int) -> bool:
        """Errors against float64, as multiples of what rounding explains and of what a trusted chip does."""
        fits = wanted.abs() <= torch.finfo(got.dtype).max / 2
        if isinstance(like, Tensor):
            fits &= like.isfinite() | ~wanted.isfinite()
        if not torch.equal(got.isfinite() | ~fits, wanted.isfinite() | ~fits):
            return self._fail(way, "not finite", f"{_differing(got.isfinite(), wanted.isfinite())} finite or not")
        keep = wanted.isfinite() & fits
        if not keep.any():
            return True
        tiny = torch.finfo(self.dtype).tiny
        reference = wanted[keep].double()
        base = reference.abs() + SMALL * reference.square().mean().sqrt() + tiny
        found = _measures((got[keep].double() - reference).abs(), base)
        growth = 1.0 + _growth(self.dtype, length, self.short)
        for count in (1, PERTURBATIONS):
            allowed = _measures(self._explained(reference, keep, self._spread(way, index, count)) + tiny, base)
            over = {name: found[name] / allowed[name] for name in found}
            shares = {name: over[name] / (limit * growth) for name, limit in LIMITS.items()}
            if max(shares.values()) < CLOSE:
                break
        key = f"{self.operator} {self.name} {way}"
        _keep_largest(self.study.errors, key, over)
        self.study.closest = max(self.study.closest, *shares.values())
        bad = next((name for name, share in shares.items() if share > 1.0), None)
        if bad is not None:
            text = f"{bad} relative error {found[bad]:.2g}, {over[bad]:.2g} times what rounding explains"
            return self._fail(way, "inaccurate", text)
        stored = self.study.trusted and self.study.trusted.get(key)
        if stored:
            return self._judge_trusted(way, key, found, {name: stored[name] * allowed[name] for name in found}, True)
        if isinstance(like, Tensor):
            trusted = _measures((like[keep].double() - reference).abs(), base)
            return self._judge_trusted(way, key, found, trusted, self.study.device.type == "cpu")
        return True

    def _explained(self, reference: Tensor, keep: Tensor, spread: list[Tensor]) -> Tensor:
        """What rounding explains of each number: by its inputs, and by itself."""
        moved = [(one[keep].double() - reference).nan_to_num().square() for one in spread]
        unit = torch.finfo(self.dtype).eps / 2
        return (sum(moved) / max(1, len(moved)) + (unit * reference).square()).sqrt()

    def _judge_trusted(
        self, way: str, key: str, found: dict[str, float], trusted: dict[str, float], strict: bool
    ) -> bool:
        """The ratio to a trusted chip's error. If not `strict`, one that is too large is noted and no failure."""
        unit = torch.finfo(self.dtype).eps / 2
        ratios = {name: found[name] / max(trusted[name], ROUNDED[name] * unit) for name in found}
        _keep_largest(self.study.ratios, key, ratios)
        bad = next((name for name, limit in RATIOS.items() if ratios[name] > limit), None)
        if bad is None:
            return True
        text = f"{bad} relative error {found[bad]:.2g}, {ratios[bad]:.2g} times a trusted chip's"
        if strict:
            return self._fail(way, "inaccurate", text)
        self._note(way, "less accurate than the host", text)
        return True

    def _fail(self, way: str, kind: str, text: str) -> bool:
        self.study.add(self.study.findings, self.number, self.operator, self.name, way, kind, text)
        return False

    def _note(self, way: str, kind: str, text: str) -> None:
        self.study.add(self.study.noted, self.number, self.operator, self.name, way, kind, text)

    def _unchecked(self, text: str) -> None:
        self.study.add(self.study.unchecked, self.number, self.operator, self.name, "forward", "unchecked", text)


class Maker:
    """Makes the arguments of a call. Tensors are drawn on the host, in the order in which they stand."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype, device: torch.device):
        self.generator, self.dtype, self.device = generator, dtype, device

    def value(self, given: Any) -> Any:
        if isinstance(given, list):
            return [self.value(one) for one in given]
        if not isinstance(given, dict):
            return given
        if "tensor" in given:
            return self._tensor(given["tensor"])
        ((kind, content),) = given.items()
        if kind == "device":
            return self.device
        if kind == "number":
            return float(content)
        return self.dtype if content == "float" else getattr(torch, content)

    def _tensor(self, spec: dict[str, Any]) -> Tensor:
        shape, strides = spec["shape"], spec.get("strides")
        dtype = self.dtype if spec["dtype"] == "float" else getattr(torch, spec["dtype"])
        if strides is None:
            return self._values(shape, spec["values"], dtype).to(dtype).to(self.device)
        distinct = [size if stride else min(size, 1) for size, stride in zip(shape, strides, strict=True)]
        drawn = self._values(distinct, spec["values"], dtype).to(dtype)
        placed = torch.empty_strided(distinct, strides, dtype=dtype, device=self.device)
        return placed.copy_(drawn).expand(shape)

    def _values(self, shape: list[int], values: dict[str, Any], dtype: torch.dtype) -> Tensor:
        kind, generator = values["kind"], self.generator
        if kind == "integers":
            return self._integers(shape, values)
        if kind == "constant":
            return torch.full(shape, values["value"], dtype=torch.float64)
        if kind == "marks":
            order = torch.randperm(math.prod(shape), generator=generator)
            return (order < values["count"]).view(shape)
        if kind == "given":
            return torch.tensor(values["numbers"]).view(shape)
        normal = torch.randn(shape, generator=generator)
        if kind == "positive":
            return values["high"] * (0.1 + 0.9 * torch.rand(shape, generator=generator))
        if kind == "probabilities":
            return normal.softmax(-1)
        if kind == "log-probabilities":
            return normal.log_softmax(-1)
        if kind == "masked":
            shut = torch.rand(shape, generator=generator) < values["share"]
            shut[..., :1] = False
            return (0.0 * normal if values.get("zeros") else normal).masked_fill(shut, -math.inf)
        return normal

    def _integers(self, shape: list[int], values: dict[str, Any]) -> Tensor:
        low, high = values["low"], values["high"]
        count = math.prod(shape)
        if values.get("distinct") and high - low + 1 >= count:
            draws = random.Random(int(torch.randint(0, 2**31, (), generator=self.generator)))
            drawn = torch.tensor(draws.sample(range(low, high + 1), count))
        else:
            drawn = torch.randint(low, high + 1, (count,), generator=self.generator)
        return (drawn.sort().values if values.get("sorted") else drawn).view(shape)


def _grouped(left: Tensor, right: Tensor, offs: Tensor | None = None, *rest: Any, **named: Any) -> Tensor:
    """What grouped_mm computes for rows [N, K] in groups that end at `offs` and matrices [G, K, M]."""
    assert offs is not None
    ends = offs.tolist()
    parts = [left[start:end] @ right[index] for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    return torch.cat(parts)


_REFERENCES: dict[str, Callable[..., Any]] = {"_grouped_mm": _grouped}
"""References in float64 of operators that have none of their own."""


def _function(name: str) -> Any:
    """The operator of a name such as `aten::add.Tensor`; None if torch does not have it."""
    space, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops, space), packet, None)
    return found and getattr(found, overload or "default", None)


def _writes(function: Any) -> bool:
    infos = [argument.alias_info for argument in function._schema.arguments]
    return any(info is not None and info.is_write for info in infos)


def _views(function: Any) -> bool:
    infos = [returned.alias_info for returned in function._schema.returns]
    return any(info is not None and not info.is_write for info in infos)


@contextmanager
def _all_warnings() -> Iterator[None]:
    """Also those that torch gives once in the life of a process."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        yield
    finally:
        torch.set_warn_always(before)


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _specs(values: Any) -> Iterator[dict[str, Any]]:
    if isinstance(values, dict) and "tensor" in values:
        yield values["tensor"]
    elif isinstance(values, list):
        for value in values:
            yield from _specs(value)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _mapped(values: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, dict):
        return {name: _mapped(value, change) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)([_mapped(value, change) for value in values])
    return torch.float64 if isinstance(values, torch.dtype) and values.is_floating_point else values


def _in_double(inputs: Any, change: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Any:
    """The inputs in float64, strides kept; dtypes that are asked for become float64 as well."""

    def widen(tensor: Tensor) -> Tensor:
        return change(tensor.double()) if tensor.is_floating_point() else tensor

    return _mapped(inputs, widen)


def _copies(inputs: Any, differentiate: bool) -> Any:
    """Fresh tensors of the same strides, leaves of a graph if they can be differentiated."""

    def fresh(tensor: Tensor) -> Tensor:
        copy = tensor.detach().clone(memory_format=torch.preserve_format)
        if copy.stride() != tensor.stride():
            distinct = [min(s, 1) if d == 0 else s for s, d in zip(tensor.shape, tensor.stride(), strict=True)]
            placed = torch.empty_strided(distinct, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            part = tensor[tuple(slice(0, size) for size in distinct)]
            copy = placed.copy_(part).expand(tensor.shape)
        return copy.requires_grad_(differentiate and copy.is_floating_point())

    def only(values: Any) -> Any:
        if isinstance(values, Tensor):
            return fresh(values)
        if isinstance(values, dict):
            return {name: only(value) for name, value in values.items()}
        return type(values)([only(value) for value in values]) if isinstance(values, list | tuple) else values

    return only(inputs)


def _flat(out: Any) -> list[Any]:
    if isinstance(out, list | tuple):
        return [one for part in out for one in _flat(part)]
    return [] if out is None else [out]


def _on_host(got: dict[str, Any]) -> dict[str, Any]:
    def here(values: Any) -> Any:
        return values and [one.detach().cpu().clone() if isinstance(one, Tensor) else one for one in values]

    return {"forward": here(got["forward"]), "backward": here(got["backward"]), "seconds": got["seconds"]}


def _growth(dtype: torch.dtype, length: int, operator: str) -> float:
    """How the error of a sum of `length` numbers may grow beyond that of its rounded inputs.

    In precision u it grows with sqrt(n) u (the probabilistic bound of Higham and Mary, SIAM J. Sci. Comput. 41, 2019),
    where the rounded inputs alone cost u; LIMITS hold the constant. Sums of bf16 and fp16 are due in fp32.
    """
    accumulates = operator in ORDERLESS
    unit = torch.finfo(dtype).eps
    wide = unit if accumulates else min(unit, torch.finfo(torch.float32).eps)
    return math.sqrt(length) * wide / unit / 4


def _keep_largest(kept: dict[str, dict[str, float]], key: str, new: dict[str, float]) -> None:
    old = kept.setdefault(key, new)
    kept[key] = {name: max(old[name], new[name]) for name in new}


def _measures(error: Tensor, base: Tensor) -> dict[str, float]:
    """Largest and mean relative error, and root mean square error relative to that of the base."""
    relative = error / base
    return {
        "max": relative.max().item(),
        "mean": relative.mean().item(),
        "rmse": (error.square().mean().sqrt() / base.square().mean().sqrt()).item(),
    }


def _equal_bits(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return repr(one) == repr(other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(-1).view(words)


def _digest(value: Any) -> Any:
    """A number that depends on every bit of a tensor and on its place."""
    if not isinstance(value, Tensor):
        return repr(value)
    bits = _bits(value).long()
    places = (torch.arange(bits.numel()) * 2 + 1) * -7046029254386353131
    return [list(value.shape), str(value.dtype), int(((bits ^ (bits << 31)) * places + bits).sum())]


def _distance(one: Any, other: Any) -> float:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.shape != other.shape or one.numel() == 0:
        return 0.0 if one is other else math.inf
    gap = (one.double() - other.double()).abs().max().item()
    return gap / max(other.double().abs().max().item(), torch.finfo(torch.float32).tiny) if gap == gap else math.inf


def _taken(source: Tensor, index: Tensor, axis: int) -> Tensor:
    if source.dim() == 0 or index.dim() == 0:
        return source.flatten()[index.flatten()]
    if index.dim() < source.dim():
        index = index.unsqueeze(axis)
    return source.gather(axis, index)


def _differing(got: Tensor, wanted: Tensor) -> str:
    return f"{int((got != wanted).sum())} of {wanted.numel()} differ"


def _close_numbers(got: Any, wanted: Any, unit: float) -> bool:
    if not isinstance(got, int | float) or not isinstance(wanted, int | float):
        return False
    return (got != got and wanted != wanted) or math.isclose(got, wanted, rel_tol=2 * unit, abs_tol=1e-30)


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
