"""Matrix products of e4m3 values with a scale per block of inputs, defined to the bit.

An e4m3 value is a multiple of 2^-9 of at most 448, so a product of two is a multiple of 2^-18 of at most 448^2, and a
sum of 128 of them needs 43 bits: exact in float64 in whatever order it is added, and not in fp32. The products here are

    y = sum over blocks, in order, of ((P_b * input scale_b) * weight scale_b)

where P_b is the exact sum of the products of block b, rounded once to fp32, and every other operation is one of fp32,
rounded to the nearest. So the result does not depend on batch or threads. A chip that adds within a block with fewer
bits, or blocks in another order, differs from it, and the difference is the chip's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from isthmus.formats.parts.quantised import QuantisedModule

LARGEST = 448.0
E4M3 = torch.float8_e4m3fn
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
ScaleRule = Callable[[Tensor], Tensor]
"""Greatest absolute value of each block to its scale, fp32."""


def to_e4m3(x: Tensor) -> Tensor:
    """fp32 to float8_e4m3fn: round half to even, saturate at 448."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def full_range_scale(amax: Tensor) -> Tensor:
    """amax / 448, so that the greatest value of a block becomes the greatest of e4m3 (DeepSeek-V3 `act_quant`).

    A block of zeros gets the smallest normal scale, and so zeros.
    """
    return (amax / LARGEST).clamp_min_(SMALLEST_SCALE)


def quantise_blocks(x: Tensor, block: int, rule: ScaleRule) -> tuple[Tensor, Tensor]:
    """x [..., K] in blocks of `block` inputs, the last one perhaps shorter.

    Returns e4m3 values [..., K] and scales [..., ceil(K / block)] in fp32; value = e4m3(x / scale).
    """
    blocks = F.pad(x.float(), (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    scale = rule(blocks.abs().amax(-1))
    return to_e4m3(blocks / scale.unsqueeze(-1)).flatten(-2)[..., : x.shape[-1]], scale


def block_matmul(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, block: int) -> Tensor:
    """The product above: e4m3 values x [..., M, K] and weight [N, K], scales [..., M, B] and [N, B]. fp32 [..., M, N].

    The values may be held in any dtype.
    """
    total: Tensor | None = None
    for index, start in enumerate(range(0, weight.shape[1], block)):
        inputs, weights = (values[..., start : start + block].double() for values in (x, weight))
        part = (inputs @ weights.t()).float().mul_(x_scale[..., index, None]).mul_(weight_scale[:, index])
        total = part if total is None else total.add_(part)
    assert total is not None, "a matrix without inputs has no product"
    return total


class BlockLinear(QuantisedModule):
    """A linear layer of e4m3 `values` [N, K], held in fp32, with `scale` [N, B] per block of `block` inputs.

    Activations are quantised token by token in blocks of the same size, with scales by `rule`. `weight` [N, K] is the
    dequantised matrix in the dtype of the model, for what multiplies it into a neighbour.
    """

    FOLLOWING = frozenset({"model_like"})
    values: Tensor
    scale: Tensor
    model_like: Tensor
    bias: Tensor | None

    def __init__(self, values: Tensor, scale: Tensor, block: int, rule: ScaleRule, *, bias: bool = False):
        super().__init__()
        self.block, self.rule = block, rule
        self.register_buffer("values", values.float(), persistent=False)
        self.register_buffer("scale", scale.float(), persistent=False)
        self.register_buffer("model_like", torch.empty(0), persistent=False)
        self.register_buffer("bias", torch.zeros(len(values)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        values, scale = quantise_blocks(x, self.block, self.rule)
        y = block_matmul(values, scale, self.values, self.scale, self.block)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    @property
    def weight(self) -> Tensor:
        wide = self.scale.repeat_interleave(self.block, dim=1)[:, : self.values.shape[1]]
        return (self.values * wide).to(self.model_like.dtype)
