"""Whether quantised weights are the nearest values to given ones on the grid of their format, with the right scales.

A value q with scale s stands for q * s. In int8 the grid has steps of s, in e4m3 (OCP 8-bit floating point, OFP8 1.0)
steps of 2^(max(floor(log2 |w / s|), -6) - 3) * s. Rounding to the nearest costs half a step at most.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from isthmus.parity.announced import Announced

INT8, E4M3 = torch.int8, torch.float8_e4m3fn
QUANTISED = (INT8, E4M3)
LARGEST = {INT8: 127.0, E4M3: 448.0}
ROWS = 128
"""Rows that are compared at a time, at least a block: few enough for the caches of a core."""
SLACK = 1e-4
"""Relative: the fp32 arithmetic of exporter and comparison moves a half step by less than 127 * 2^-22 of it."""
SCALE_SLACK = 2.0**-22
"""Relative, two units in the last place of fp32: a scale is one division from the amax, or a product with 1 / 127."""
COMPENSATED = 1.5
"""What compensated rounding may lose of a tensor's outputs, in the mean square, as a multiple of what rounding to the
nearest loses: it is never more than 1 on the calibration, for which a few inputs stand. One bit less costs 4."""
COMPENSATED_ROW = 32.0
"""The same of one row. It is 1 at most as well; 16 inputs show more than 32 of it once in 2 * 10^8 (F distribution,
16 and 16 degrees of freedom). A row of another matrix is at thousands."""
FP8_BLOCK, MX_BLOCK = 128, 32
_ROUNDED = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_SMALLEST_EXPONENT, _MANTISSA = -6, 3
_FP32_BIAS, _FP32_MANTISSA = 127, 23
_OCP_EXPONENT = 8
"""The exponent of the greatest e4m3 value, 448 = 1.75 * 2^8, which OCP MX 1.0 subtracts from that of the amax."""


@dataclass(frozen=True)
class Misfit:
    """Why a tensor is not what it should be."""

    why: str


class ScaleRule(NamedTuple):
    """Whether scales are E8M0 of OCP MX, whether they are powers of two, and the dtype they are rounded to, up."""

    mx: bool
    powers: bool
    dtype: torch.dtype | None


class Worst(NamedTuple):
    """The largest error so far as a share of what is allowed, how many elements are beyond, and the first of these."""

    share: float = 0.0
    beyond: int = 0
    first: tuple[int, int] | None = None


def within(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, some rows at a time."""
    if not tensors[0].dim():
        yield tensors
        return
    for start in range(0, len(tensors[0]), ROWS):
        yield tuple(tensor[start : start + ROWS] for tensor in tensors)


def compare_quantised(
    source: Tensor,
    values: Tensor,
    beside: dict[str, Tensor],
    announced: Announced,
    *,
    bias: Tensor | None = None,
    inputs: Tensor | None = None,
) -> float | Misfit:
    """source [M, K] in any float dtype against int8 or e4m3 values [M, K] and the tensors beside them.

    Returns the largest error of an element as a share of half a step, or what is wrong. Where rounding made up for
    other errors `inputs` [S, K] are those that it was meant for: then it is the error of the outputs, in the mean
    square over the tensor, as a share of what rounding to the nearest makes.
    """
    scale = weight_scale(beside)
    if isinstance(scale, Misfit):
        return scale
    exact_powers = any(
        beside[part].dtype == torch.uint8 for part in ("weight_scale", "weight_scale_inv") if part in beside
    )
    block = _block(values, scale, exact_powers, announced)
    if isinstance(block, Misfit):
        return block
    if not bool((torch.isfinite(scale) & (scale >= 0)).all()):
        return Misfit("has a scale that is negative or not finite")
    rule = ScaleRule(exact_powers, exact_powers or announced.powers_of_two, _ROUNDED.get(announced.scale_dtype or ""))
    found = _compare_grid(source, values, scale, block, rule, inputs is not None)
    if isinstance(found, Misfit):
        return found
    if inputs is not None:
        found = _compare_outputs(source, values, scale, block, inputs.float())
        if isinstance(found, Misfit):
            return found
    problem = _inputs(values, scale, beside, bias)
    return problem if problem is not None else found


def weight_scale(beside: dict[str, Tensor]) -> Tensor | Misfit:
    """The scale of a weight in fp32, from whichever tensor holds it."""
    for part in ("weight_scale", "weight_scale_inv"):
        if part in beside:
            return _as_float(beside[part])
    if "deq_scale" in beside and "input_scale" in beside:
        return (dequantising(beside["deq_scale"]) / beside["input_scale"].float()).reshape(-1, 1)
    return Misfit("is quantised, and no scale stands beside it")


def dequantising(deq_scale: Tensor) -> Tensor:
    """ModelSlim's deq_scale in fp32. In models of fp16 an int64 holds its bit pattern."""
    if deq_scale.dtype != torch.int64:
        return deq_scale.float()
    return deq_scale.to(torch.int32).view(torch.float32)


def _as_float(scale: Tensor) -> Tensor:
    """E8M0 in uint8 is 2^(e - 127), and 255 is not a number (OCP MX 1.0)."""
    if scale.dtype != torch.uint8:
        return scale.float()
    powers = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.to(torch.int32) - 127)
    return powers.masked_fill(scale == 255, float("nan"))


def _block(values: Tensor, scale: Tensor, mx: bool, announced: Announced) -> tuple[int, int] | Misfit:
    """Rows and columns that share a scale."""
    rows, columns = values.shape
    if scale.numel() == 1:
        return rows, columns
    if tuple(scale.shape) in ((rows, 1), (rows,)):
        block = (1, columns)
    elif mx:
        block = (1, MX_BLOCK)
    else:
        block = announced.weight_block or (FP8_BLOCK, FP8_BLOCK)
    wanted = [-(-rows // block[0]), -(-columns // block[1])]
    if scale.dim() == 1 or list(scale.shape) == wanted:
        return block
    if values.dtype == INT8:
        wanted = [rows, 1]
    return Misfit(f"has scales {list(scale.shape)}, and {list(values.shape)} values need {wanted}")


def _compare_grid(
    source: Tensor, values: Tensor, scale: Tensor, block: tuple[int, int], rule: ScaleRule, compensated: bool
) -> float | Misfit:
    """Elements, unless they are `compensated`, and scales: all rows, some at a time.

    A block of scales never lies across two parts unless it is as high as the tensor.
    """
    tall = scale.numel() == 1
    whole = source.abs().amax().float() if tall else None
    worst, wrong_scales, first_scale = Worst(), 0, ""
    step = ROWS if tall else block[0] * max(1, ROWS // block[0])
    for start in range(0, len(values), step):
        w, q = source[start : start + step].float(), values[start : start + step].float()
        s = scale.reshape(1, 1) if tall else scale.reshape(-(-len(values) // block[0]), -1)
        s = s if tall else s[start // block[0] : -(-(start + len(w)) // block[0])]
        wide = _spread(s, block, w.shape)
        if not compensated:
            worst = _add(worst, w, q, wide, values.dtype, rule.mx, start)
        wrong = _wrong_scales(w, q, s, wide, block, values.dtype, rule, whole)
        if not wrong_scales and bool(wrong.any()):
            first_scale = _shown_scale(wrong, s, start // block[0])
        wrong_scales += int(wrong.sum())
    if worst.beyond:
        where = f", first in row {worst.first[0]}, column {worst.first[1]}" if worst.first else ""
        beyond = f"{worst.beyond:,} of {values.numel():,} elements are beyond half a step of the source{where}"
        return Misfit(beyond + (f"; {wrong_scales:,} scales are wrong" if wrong_scales else ""))
    if wrong_scales:
        return Misfit(f"{wrong_scales:,} of {scale.numel():,} scales are not what their weights call for{first_scale}")
    return worst.share


def _compare_outputs(
    source: Tensor, values: Tensor, scale: Tensor, block: tuple[int, int], inputs: Tensor
) -> float | Misfit:
    """What int8 values lose of the outputs for these inputs, against what the nearest values would lose."""
    if inputs.shape[1] != source.shape[1] or not bool(torch.isfinite(inputs).all()) or not bool(inputs.any()):
        return Misfit(f"was rounded for inputs that are no sample of {source.shape[1]} channels: {list(inputs.shape)}")
    lost = least = 0.0
    for start in range(0, len(values), ROWS):
        w, q = source[start : start + ROWS].float(), values[start : start + ROWS].float()
        wide = _spread(scale.reshape(-1, 1)[start : start + ROWS] if scale.numel() > 1 else scale, block, w.shape)
        nearest = torch.div(w, wide).round_().clamp_(-LARGEST[INT8], LARGEST[INT8])
        found, best = (((w - some * wide) @ inputs.T).double().square().sum(1) for some in (q, nearest))
        off = ~(found <= COMPENSATED_ROW * best) & (q != nearest).any(1)
        if bool(off.any()):
            row = int(off.nonzero()[0])
            times = float(found[row] / best[row])
            return Misfit(
                f"loses {times:.3g} times as much of the output of row {start + row} as rounding to the nearest, on "
                f"what calibrated it; {COMPENSATED_ROW:g} is the limit"
            )
        lost, least = lost + float(found.sum()), least + float(best.sum())
    if not lost <= COMPENSATED * least:
        return Misfit(
            f"loses {lost / least if least else math.inf:.3g} times as much of its outputs as rounding to the nearest, "
            f"on what calibrated it; {COMPENSATED:g} is the limit"
        )
    return lost / least if least else 0.0


def _spread(scale: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    """A scale for each element, as a view where that is possible."""
    rows, columns = block
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(columns, dim=1)[:, : shape[1]]
    if scale.shape[0] > 1 and rows > 1:
        scale = scale.repeat_interleave(rows, dim=0)[: shape[0]]
    return scale.expand(shape)


def _add(
    worst: Worst,
    w: Tensor,
    q: Tensor,
    wide: Tensor,
    dtype: torch.dtype,
    mx: bool,
    start: int,
) -> Worst:
    """`worst` with the errors of some more rows."""
    error = torch.sub(w, q * wide).abs_()
    half = wide / 2 if dtype == INT8 else _half_step(w, wide).mul_(wide)
    share = torch.div(error, half)
    top = float(share.amax())
    if top <= 1 + SLACK:
        return worst._replace(share=max(worst.share, top))
    off = ~(share <= 1 + SLACK) & (error != 0)
    if mx:
        off &= ~_saturated(w, q, wide)
    share = share[torch.isfinite(share)]
    top = max(worst.share, float(share.max())) if share.numel() else worst.share
    first = worst.first
    if first is None and bool(off.any()):
        row, column = (int(index) for index in off.nonzero()[0])
        first = (start + row, column)
    return Worst(top, worst.beyond + int(off.sum()), first)


def _half_step(w: Tensor, wide: Tensor) -> Tensor:
    """Half a step of e4m3 at w / s, in units of s."""
    bits = torch.div(w, wide).abs_().view(torch.int32)
    exponent = bits.bitwise_right_shift_(_FP32_MANTISSA).clamp_min_(_FP32_BIAS + _SMALLEST_EXPONENT)
    half = exponent.sub_(_MANTISSA + 1).bitwise_left_shift_(_FP32_MANTISSA)
    return half.view(torch.float32)


def _saturated(w: Tensor, q: Tensor, wide: Tensor) -> Tensor:
    """Elements that OCP MX's rule of the shared exponent puts beyond 448, and that are stored as 448."""
    x = w / wide
    return (x.abs() > LARGEST[E4M3]) & (x.abs() < 2.0 ** (_OCP_EXPONENT + 1)) & (q == x.sign() * LARGEST[E4M3])


def _wrong_scales(
    w: Tensor,
    q: Tensor,
    s: Tensor,
    wide: Tensor,
    block: tuple[int, int],
    dtype: torch.dtype,
    rule: ScaleRule,
    whole: Tensor | None,
) -> Tensor:
    """Which scales are not what the greatest weight of their block calls for, unless the block is stored exactly."""
    amax = whole.reshape(1, 1) if whole is not None else _by_block(w, block)
    wanted = amax.double() / LARGEST[dtype]
    if rule.powers:
        mantissa, exponent = torch.frexp(wanted)
        ceiled = torch.ldexp(torch.ones_like(wanted), exponent - (mantissa == 0.5).int())
        right = s.double() == ceiled
        if rule.mx:
            right |= s.double() == torch.ldexp(torch.ones_like(wanted), torch.frexp(amax).exponent - 1 - _OCP_EXPONENT)
    else:
        right = (s.double() - wanted).abs() <= SCALE_SLACK * wanted
        if rule.dtype is not None:
            right |= _rounded_up(s, wanted, rule.dtype)
    if bool(right.all()):
        return ~right
    inexact = (q * wide != w).float()
    exact = ~inexact.any() if whole is not None else _by_block(inexact, block) == 0
    return ~(right | exact)


def _rounded_up(scale: Tensor, wanted: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether a scale is a number of `dtype`, and the next one that is not below the wanted."""
    found, limits = scale.double(), torch.finfo(dtype)
    step = (limits.eps * wanted).clamp_min(limits.smallest_normal * limits.eps)
    above = (found >= wanted * (1 - SCALE_SLACK)) & (found - wanted <= step)
    return above & (scale.to(dtype).double() == found)


def _by_block(x: Tensor, block: tuple[int, int]) -> Tensor:
    """The greatest absolute value of each block of x [M, K]; the last blocks may be partial."""
    rows, columns = block
    if block == (1, x.shape[1]):
        low, high = x.aminmax(dim=1, keepdim=True)
        return torch.maximum(-low, high)
    padded = torch.nn.functional.pad(x.abs(), (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax((1, 3))


def _shown_scale(wrong: Tensor, scale: Tensor, start: int) -> str:
    row, column = (int(index) for index in wrong.nonzero()[0])
    return f", first {[start + row, column]} = {float(scale[row, column]):.6g}"


def _inputs(values: Tensor, scale: Tensor, beside: dict[str, Tensor], bias: Tensor | None) -> Misfit | None:
    """Whether what stands beside a weight for its inputs is consistent with it."""
    for part in itertools.filterfalse(lambda part: "offset" not in part, beside):
        offset = beside[part].float()
        if part == "weight_offset" and bool((offset != 0).any()):
            return Misfit("has a weight_offset that is not zero, and its scales are symmetric")
        if not bool(((offset == offset.round()) & (offset.abs() <= 128)).all()):
            return Misfit(f"has an {part} that is no value of int8")
    inputs = beside.get("input_scale")
    if inputs is None:
        return None
    factor = inputs.float()
    if not bool((torch.isfinite(factor) & (factor > 0)).all()):
        return Misfit("has an input_scale that is not positive and finite")
    if "deq_scale" not in beside:
        return None
    found, wanted = dequantising(beside["deq_scale"]).flatten(), (scale.flatten() * factor.flatten()[0])
    if found.shape != wanted.shape or bool(((found - wanted).abs() > SCALE_SLACK * wanted).any()):
        return Misfit("has a deq_scale that is not input_scale * weight_scale")
    return _correction(values, wanted, beside, bias)


def _correction(values: Tensor, scale: Tensor, beside: dict[str, Tensor], bias: Tensor | None) -> Misfit | None:
    """quant_bias = round(bias / deq_scale - the row's sum * input_offset), which ModelSlim writes beside a weight."""
    if "quant_bias" not in beside:
        return None
    offset = beside["input_offset"].float().flatten()[0] if "input_offset" in beside else torch.zeros(())
    wanted = -values.sum(1, dtype=torch.int64).double() * float(offset)
    if bias is not None:
        wanted += bias.double() / scale.double()
    slack = 0.5 + SLACK * wanted.abs() if bias is not None else 0.5
    if bool(((beside["quant_bias"].double() - wanted).abs() > slack).any()):
        return Misfit("has a quant_bias that does not correct its input_offset")
    return None
