"""Exact int8 matrix products on any machine that multiplies fp32: the arithmetic of an int8 unit with int32 sums.

A product of an int8 activation in [-128, 127] and an int8 weight in [-127, 127] is at most 128 * 127, so a sum of 1024
of them stays below 2^24 and fp32 holds it, and every partial sum, exactly, in whatever order it is added. Longer sums
are split into blocks of 1024 and the blocks added in int32. So the result does not depend on batch, order or threads:
the same row gives the same bits.

Inputs may have any float dtype. Values and scales are computed in fp32, and results get the dtype of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
BLOCK = 1024
LONGEST = (2**31 - 1) // (LARGEST * (LARGEST + 1))
CHUNK = 2**18
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 values of each row of x [..., K], kept in fp32, and the scales [..., 1], fp32.

    scale = max |x| / 127 and value = round-half-even(x / scale): compressed-tensors' dynamic per-token scheme, with the
    range [-127, 127] of vLLM's `dynamic_scaled_int8_quant`. No clamp is needed: the scale is a normal number, so
    |x / scale| <= 127 (1 + 2^-22), which rounds to at most 127. A row of zeros, which would give 0 / 0, gets the
    smallest normal scale, and so zeros.
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).div_(LARGEST).clamp_min_(SMALLEST_SCALE)
    return torch.div(x, scale).round_(), scale


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values of a weight [N, K] of any float type, and fp32 scales [N, 1]: those of `quantise_rows`, bit by bit.

    On the CPU it works on as many rows at a time as stay in a core's cache.
    """
    if weight.device.type != "cpu":
        integers, scale = quantise_rows(weight)
        return integers.to(torch.int8), scale
    rows, columns = weight.shape
    step = max(1, CHUNK // max(1, columns))
    values, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(rows, 1)
    wide, scratch = (torch.empty(min(step, rows), columns) for _ in range(2))
    for start in range(0, rows, step):
        part = weight[start : start + step]
        x, y, factor = wide[: len(part)], scratch[: len(part)], scale[start : start + step]
        x.copy_(part)
        torch.amax(torch.abs(x, out=y), -1, keepdim=True, out=factor)
        factor.div_(LARGEST).clamp_min_(SMALLEST_SCALE)
        values[start : start + step].copy_(torch.div(x, factor, out=y).round_())
    return values, scale


def quantise_static(x: Tensor, scale: Tensor, offset: Tensor | float = 0.0) -> Tensor:
    """Integers in [-128, 127], in fp32: round-half-even(x / scale + offset), clamped. Scale and offset are scalars.

    With an offset of 0 this is compressed-tensors' static scheme, with another ModelSlim's.
    """
    return x.float().div(scale).add_(offset).round_().clamp_(-LARGEST - 1, LARGEST)


def exact_matmul(a: Tensor, b: Tensor, addend: Tensor | None = None) -> Tensor:
    """a [..., M, K] @ b [..., K, N], integers in fp32, a in [-128, 127] and b in [-127, 127], plus int32 `addend` [N].

    Returns the int32 sums, converted to fp32.
    """
    length = a.shape[-1]
    if length <= BLOCK and addend is None:
        return a @ b
    assert length <= LONGEST, f"an int32 sum of {length} products could overflow"
    total = (a[..., :BLOCK] @ b[..., :BLOCK, :]).to(torch.int32)
    for start in range(BLOCK, length, BLOCK):
        total += (a[..., start : start + BLOCK] @ b[..., start : start + BLOCK, :]).to(torch.int32)
    return (total if addend is None else total.add_(addend)).to(torch.float32)


def quantised_matmul(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., M, K] quantised by row, times weight [..., K, N] (integers in fp32) with scales [..., 1, N] or [N].

    Returns (int32 sum * weight scale) * row scale, plus the float bias [N], computed in fp32: [..., M, N].
    """
    values, scale = quantise_rows(x)
    y = exact_matmul(values, weight).mul_(weight_scale).mul_(scale)
    return (y if bias is None else y.add_(bias)).to(x.dtype)
