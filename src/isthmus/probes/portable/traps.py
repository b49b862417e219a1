"""Traps: what software for a chip is known to get silently wrong, each with an answer that is known beforehand.

A trap takes the device and returns "" or what is wrong, in words. Answers are exact or bounded by arithmetic; nothing
is compared with another device.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ODD = 2**24 + 1
"""The first whole number that fp32 does not have."""


@dataclass(frozen=True)
class _Trial:
    """Where and how large a trap is."""

    device: torch.device
    length: int
    seed: int
    dtypes: tuple[str, ...]


def check_traps(
    rank: Any, names: list[str] | None = None, dtypes: list[str] | None = None, length: int = 4096, seed: int = 0
) -> dict[str, Any]:
    """Try the traps, all of them unless `names` says which.

    `dtypes` are those in which products are tried, fp32, bf16 and fp16 if absent; `length` is that of the longest sums
    and products.

    Returns `failed` and `detail` over all, and `traps`: a list of {"name", "needed_for", "failed", "detail"}.
    `needed_for` is "training", "serving", "both", or "" where nothing that Isthmus runs depends on it.
    """
    found = []
    trial = _Trial(rank.device, max(8, length), seed, tuple(dtypes or ("float32", "bfloat16", "float16")))
    for number, name in enumerate(names if names is not None else list(TRAPS)):
        rank.beat(name, number)
        needed_for, trap = TRAPS[name]
        try:
            detail = trap(trial)
        except (RuntimeError, TypeError, ValueError, IndexError, ArithmeticError) as error:
            detail = f"raises {type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error) else ''}"
        found.append({"name": name, "needed_for": needed_for, "failed": bool(detail), "detail": detail})
    bad = [f"{one['name']}: {one['detail']}" for one in found if one["failed"] and one["needed_for"]]
    text = f"rank {rank.rank}: {'; '.join(bad)}" if bad else ""
    return {"failed": bool(bad), "detail": text, "traps": found}


def check_out_of_range(rank: Any, classes: int = 5) -> dict[str, Any]:
    """A target of nll_loss that is no class has to give an error, not a number.

    On some accelerators the error ends all work of the process on the device: ask for nothing after this.
    """
    rank.beat("out-of-range target", 0)
    scores = torch.zeros(2, classes).log_softmax(-1).to(rank.device)
    targets = torch.tensor([0, classes + 3]).to(rank.device)
    try:
        loss = F.nll_loss(scores, targets).item()
    except (RuntimeError, IndexError) as error:
        lines = str(error).strip().splitlines()
        return {"failed": False, "detail": "", "error": lines[0][:200] if lines else type(error).__name__}
    detail = f"rank {rank.rank}: the loss of class {classes + 3} among {classes} is {loss:.4g}, and no error"
    return {"failed": True, "detail": detail, "error": ""}


def _float64_stays(trial: _Trial) -> str:
    wide = torch.ones(2).to(trial.device).to(torch.float64)
    if wide.dtype != torch.float64:
        return f"a tensor converted to float64 is {_short(wide)}"
    step = 2.0**-40
    kept = ((wide + step) - 1.0).cpu().tolist()
    return "" if kept == [step, step] else f"1 + 2^-40 - 1 in float64 is {kept[0]:.3g}"


def _products_keep_24_bits(trial: _Trial) -> str:
    """(1 + 2^-12) x 1 is exact in fp32, and 1 in any dtype with a shorter mantissa such as TF32."""
    value = 1.0 + 2.0**-12
    left, right = torch.full((16, 16), value, device=trial.device), torch.eye(16, device=trial.device)
    kinds: list[tuple[str, Callable[[], Tensor]]] = [
        ("mm", lambda: left @ right),
        ("bmm", lambda: torch.bmm(left[None], right[None])[0]),
        ("linear", lambda: F.linear(left, right)),
    ]
    for name, work in kinds:
        got = work().cpu()
        if not torch.equal(got, torch.full((16, 16), value)):
            return f"{name} of fp32 gives {got.flatten()[0].item()!r} for {value!r}: fewer than 24 bits"
    return ""


def _long_products(trial: _Trial) -> str:
    """Ones add up to `length`; an accumulator of 11 bits stops at 2048, one of 8 bits at 256."""
    for dtype in (getattr(torch, name) for name in trial.dtypes):
        size = 1 << min(15, trial.length.bit_length() - 1)
        ones = torch.ones(4, size, dtype=dtype, device=trial.device)
        got = (ones @ ones.T).cpu()
        if not torch.equal(got, torch.full((4, 4), float(size), dtype=dtype)):
            return f"{size} ones of {_short(ones)} add up to {got.flatten()[0].item():g} in a product"
        signs = ones.clone()
        signs[:, size // 2 :] = -1.0
        got = ((16 * ones) @ (16 * signs).T).cpu()
        if got.abs().max().item() != 0.0 or not bool(got.isfinite().all()):
            return f"products of {_short(ones)} that add up to 0 give {got.flatten()[0].item():g}: a narrow accumulator"
    return ""


def _sums(trial: _Trial) -> str:
    """The error of a sum in any order stays below sqrt(n) roundoffs of the sum of magnitudes.

    A random-walk bound for one sum after another (Higham and Mary, SIAM J. Sci. Comput. 41, 2019), without a constant.
    """
    generator = torch.Generator().manual_seed(trial.seed)
    size = 16 * trial.length
    values = torch.rand(size, generator=generator)
    exact = math.fsum(values.tolist())
    orders = {"as it is": torch.arange(size), "reversed": torch.arange(size).flip(0)}
    orders["shuffled"] = torch.randperm(size, generator=generator)
    for name, order in orders.items():
        for way, work in (("sum", lambda x: x.sum()), ("mean", lambda x: x.mean() * size)):
            got = work(values[order].to(trial.device)).item()
            error = abs(got - exact) / exact * 2.0**24
            if not error <= math.sqrt(size):
                return f"the {way} of {size} fp32 numbers, {name}, is off by {error:.3g} roundoffs of its value"
    if "float16" not in trial.dtypes:
        return ""
    half = torch.full((trial.length,), 60000.0, dtype=torch.float16, device=trial.device).mean().item()
    return "" if abs(half - 60000.0) <= 32.0 else f"the mean of fp16 numbers of 60000 is {half:g}"


def _integers(trial: _Trial) -> str:
    for dtype in (torch.int32, torch.int64):
        one = torch.tensor([ODD, ODD + 2, 3], dtype=dtype, device=trial.device)
        wanted = {
            "add": ((one + 1), [ODD + 1, ODD + 3, 4]),
            "mul": ((one * 3), [3 * ODD, 3 * ODD + 6, 9]),
            "sum": (one.sum(), 2 * ODD + 5),
            "cumsum": (one.cumsum(0), [ODD, 2 * ODD + 2, 2 * ODD + 5]),
            "max": (one.max(), ODD + 2),
            "cummax": (one.cummax(0).values, [ODD, ODD + 2, ODD + 2]),
            "cummin": (one.cummin(0).values, [ODD, ODD, 3]),
            "sort": (one.sort().values, [3, ODD, ODD + 2]),
            "eq": (one == ODD, [True, False, False]),
            "clamp": (one.clamp(min=ODD + 1), [ODD + 1, ODD + 2, ODD + 1]),
            "threshold": (F.threshold(one, ODD - 1, 0), [ODD, ODD + 2, 0]),
            "where": (torch.where(one > ODD, one, -one), [-ODD, ODD + 2, -3]),
        }
        for name, (got, right) in wanted.items():
            if got.cpu().tolist() != right:
                return f"{name} of {_short(one)} beyond 2^24 gives {got.cpu().tolist()}, not {right}"
    far = torch.tensor([2**40 + 1], device=trial.device) + 1
    return "" if far.item() == 2**40 + 2 else f"2^40 + 1 + 1 in int64 is {far.item()}"


def _duplicates(trial: _Trial) -> str:
    """Rows that are added to one place all count. Whole numbers, so that any order is exact."""
    draw = random.Random(trial.seed)
    index = [draw.randrange(5) for _ in range(64)]
    values = [float(draw.randrange(1, 9)) for _ in range(64)]
    right = [sum(value for place, value in zip(index, values, strict=True) if place == n) for n in range(5)]
    where, what = torch.tensor(index).to(trial.device), torch.tensor(values).to(trial.device)
    table = torch.zeros(5, 1, device=trial.device, requires_grad=True)
    (F.embedding(where, table)[:, 0] * what).sum().backward()
    assert table.grad is not None
    picked = torch.zeros(5, device=trial.device, requires_grad=True)
    (picked[where] * what).sum().backward()
    assert picked.grad is not None
    gathered = torch.zeros(5, device=trial.device, requires_grad=True)
    (gathered.gather(0, where) * what).sum().backward()
    assert gathered.grad is not None
    found = {
        "index_add": torch.zeros(5, device=trial.device).index_add(0, where, what),
        "scatter_add": torch.zeros(5, device=trial.device).scatter_add(0, where, what),
        "index_put": torch.zeros(5, device=trial.device).index_put((where,), what, accumulate=True),
        "the backward pass of embedding": table.grad[:, 0],
        "the backward pass of indexing": picked.grad,
        "the backward pass of gather": gathered.grad,
    }
    for name, got in found.items():
        if got.cpu().tolist() != right:
            return f"{name} with duplicates gives {got.cpu().tolist()}, not {right}"
    return ""


def _order(trial: _Trial) -> str:
    """Choosing with ties: what topk and sort return is in order, points at itself, and names no place twice."""
    values = torch.randint(0, 6, (3, 40), generator=torch.Generator().manual_seed(trial.seed)).float()
    here = values.to(trial.device)
    best = values.sort(-1, descending=True).values[:, :12]
    for in_order in (True, False):
        got, places = (part.cpu() for part in here.topk(12, dim=-1, sorted=in_order))
        if in_order and not torch.equal(got, best):
            return "topk is not in descending order"
        if not torch.equal(got.sort(-1, descending=True).values, best):
            return f"topk(sorted={in_order}) does not give the largest values"
        if not torch.equal(values.gather(-1, places), got) or any(len(set(row)) < 12 for row in places.tolist()):
            return f"the indices of topk(sorted={in_order}) do not point at its values, each once"
    got, places = (part.cpu() for part in here.sort(dim=-1, stable=True))
    for row, order in zip(values.tolist(), places.tolist(), strict=True):
        if order != sorted(range(len(row)), key=row.__getitem__):
            return "the stable sort does not keep equal values in their order"
    return ""


def _gelu(trial: _Trial) -> str:
    points = [-3.0, -1.5, -0.5, 0.7, 2.5]
    exact = [0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0))) for x in points]
    got = F.gelu(torch.tensor(points).to(trial.device)).cpu().tolist()
    gap = max(abs(one - other) for one, other in zip(got, exact, strict=True))
    return "" if gap < 1e-5 else f"gelu is off by {gap:.2g}: perhaps the tanh form in its place"


def _booleans(trial: _Trial) -> str:
    marks = torch.ones(300, dtype=torch.bool, device=trial.device)
    total = marks.sum()
    if total.item() != 300 or total.dtype != torch.int64:
        return f"300 true values add up to {total.item()} in {_short(total)}"
    running = marks.cumsum(0)
    return "" if running[-1].item() == 300 else f"their running sum ends at {running[-1].item()}"


def _not_finite(trial: _Trial) -> str:
    """Masks of -inf give exact zeros, a row that is masked entirely gives NaN, and NaN stays NaN."""
    inf, nan = math.inf, math.nan
    rows = torch.tensor([[-inf, 1.0, -inf, 1.0], [-inf] * 4]).to(trial.device)
    got = rows.softmax(-1).cpu().tolist()
    if got[0] != [0.0, 0.5, 0.0, 0.5]:
        return f"softmax of [-inf, 1, -inf, 1] is {got[0]}"
    if not all(one != one for one in got[1]):
        return f"softmax of a row of -inf is {got[1]}, not NaN"
    with_nan = torch.tensor([1.0, nan, 3.0]).to(trial.device)
    for name, value in {
        "max": with_nan.max(),
        "sum": with_nan.sum(),
        "amax": with_nan.amax(),
        "relu": with_nan.relu()[1],
        "clamp": with_nan.clamp(0.0, 2.0)[1],
        "maximum": torch.maximum(with_nan, torch.zeros_like(with_nan))[1],
        "0 times inf": torch.tensor(0.0, device=trial.device) * inf,
    }.items():
        if value.item() == value.item():
            return f"{name} loses a NaN: {value.item():g}"
    marks = with_nan.isfinite().cpu().tolist(), (with_nan == with_nan).cpu().tolist()
    return "" if marks == ([True, False, True], [True, False, True]) else "a NaN is taken for a number"


def _subnormals(trial: _Trial) -> str:
    got = (torch.tensor([1e-40]).to(trial.device) * 1.0).item()
    return "" if got != 0.0 else "fp32 numbers below 2^-126 become zero"


def _fresh_memory(trial: _Trial) -> str:
    """Results that are zero or whole by definition stay so on memory that held NaN before."""
    weight = torch.ones(8, 16, device=trial.device)

    def work() -> dict[str, Tensor]:
        layer = weight.clone().requires_grad_()
        F.linear(torch.zeros(0, 16, device=trial.device), layer).sum().backward()
        assert layer.grad is not None
        return {
            "a product over nothing": torch.zeros(8, 0, device=trial.device) @ torch.zeros(0, 16, device=trial.device),
            "new_zeros": weight.new_zeros(8, 16),
            "zeros_like": torch.zeros_like(weight),
            "a sum over nothing": torch.zeros(0, 16, device=trial.device).sum(0),
            "the gradient of a layer without rows": layer.grad,
            "padding": F.pad(torch.zeros(4, 16, device=trial.device), (0, 0, 2, 2)),
            "slice_backward": _slice_gradient(weight)[:, 4:],
        }

    for _ in range(3):
        dirty = [torch.full((8, 16), math.nan, device=trial.device) for _ in range(16)]
        dirty += [torch.full((16,), math.nan, device=trial.device) for _ in range(16)]
        del dirty
        for name, got in work().items():
            if got.abs().sum().item() != 0.0:
                return f"{name} is not zero on used memory"
    return ""


def _slice_gradient(weight: Tensor) -> Tensor:
    leaf = weight.clone().requires_grad_()
    leaf[:, :4].sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def _rounding(trial: _Trial) -> str:
    """To nearest, ties to even: 1 + half a step goes down to 1, 1 + one and a half steps up to 1 + two."""
    for dtype, bits in ((torch.bfloat16, 7), (torch.float16, 10)):
        step = 2.0**-bits
        given = torch.tensor([1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, -1 - step / 2]).to(trial.device)
        got = given.to(dtype).cpu().float().tolist()
        if got != [1.0, 1 + 2 * step, 1 + step, -1.0]:
            return f"fp32 to {str(dtype).removeprefix('torch.')} is not rounded to nearest even: {got}"
    whole = torch.tensor([2.7, -2.7, 0.0]).to(trial.device).long().cpu().tolist()
    return "" if whole == [2, -2, 0] else f"2.7 and -2.7 as whole numbers are {whole[:2]}"


def _strides(trial: _Trial) -> str:
    """Odd beginnings, gaps, transposes and single numbers, against the same numbers in a row of their own."""
    base = torch.arange(1.0, 1.0 + 37 * 13).view(37, 13)
    here = base.to(trial.device)
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "an odd beginning": lambda x: x.flatten()[1:],
        "every third": lambda x: x.flatten()[2::3],
        "a transpose": lambda x: x.T,
        "a narrow block": lambda x: x[5:9, 3:4],
        "repeats": lambda x: x[:1].expand(5, 13),
        "one number": lambda x: x[3, 7],
    }
    for name, view in views.items():
        right = view(base).clone(memory_format=torch.contiguous_format)
        for way, got, wanted in (
            ("a copy", view(here).contiguous(), right),
            ("a sum", view(here) + view(here), right + right),
        ):
            if not torch.equal(got.cpu(), wanted):
                return f"{way} of {name} is wrong"
    return ""


def _seeds(trial: _Trial) -> str:
    """Draws on the host and on the device come again with their seed."""
    first, again = (torch.randn(64, generator=torch.Generator().manual_seed(trial.seed)) for _ in range(2))
    if not torch.equal(first, again):
        return "the host's generator gives other numbers for the same seed"
    one, other = (
        torch.randn(64, generator=torch.Generator(trial.device).manual_seed(trial.seed), device=trial.device)
        for _ in range(2)
    )
    return "" if torch.equal(one.cpu(), other.cpu()) else "the device's generator gives other numbers for the same seed"


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


TRAPS: dict[str, tuple[str, Callable[[_Trial], str]]] = {
    "float64 stays float64": ("", _float64_stays),
    "fp32 products keep 24 bits": ("training", _products_keep_24_bits),
    "long products": ("both", _long_products),
    "long sums": ("both", _sums),
    "integers beyond 2^24": ("both", _integers),
    "duplicate indices": ("training", _duplicates),
    "order and ties": ("both", _order),
    "gelu is exact": ("", _gelu),
    "true values add up": ("both", _booleans),
    "infinities and NaN": ("both", _not_finite),
    "subnormal numbers": ("", _subnormals),
    "used memory": ("both", _fresh_memory),
    "rounding of casts": ("both", _rounding),
    "views and strides": ("both", _strides),
    "seeds": ("training", _seeds),
}
"""For what each trap matters, and the trap."""
