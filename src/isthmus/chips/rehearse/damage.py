"""What planted faults do to the values of a tensor."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from isthmus.chips.rehearse.faults import Fault

SMALL_ERROR = 1e-2
WRONG_SUM = 1.0
BFLOAT16_BITS = 7
LOOKS = 16
"""How many elements are drawn in search of one that is not zero, for an error that is relative to it."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}


def can_damage(fault: Fault, tensor: Tensor) -> bool:
    """Whether a fault of values has anything to bite on: NaN and bits are for floating point alone."""
    if not tensor.numel() or tensor.is_complex() or tensor.is_meta or tensor.layout is not torch.strided:
        return False
    return tensor.is_floating_point() or (fault.kind in ("wrong-sum", "small-error") and tensor.dtype != torch.bool)


def damage(fault: Fault, tensors: Sequence[Tensor], draws: random.Random) -> str | None:
    """Damage one element of one of the tensors, in place. Returns what was done; None if nothing could be."""
    able = [tensor for tensor in tensors if can_damage(fault, tensor)]
    if not able:
        return None
    tensor = able[draws.randrange(len(able))]
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        return _damage_one(fault, tensor, draws)


def _damage_one(fault: Fault, tensor: Tensor, draws: random.Random) -> str:
    place = _place(fault, tensor, draws)
    element = tensor[place]
    before = element.item()
    if fault.kind == "flipped-bit":
        width = 8 * tensor.element_size()
        bit = draws.randrange(width) if fault.size is None else int(fault.size)
        flip_bit(element, bit)
    elif fault.kind == "nan":
        element.fill_(math.nan)
    else:
        size = fault.size if fault.size is not None else WRONG_SUM if fault.kind == "wrong-sum" else SMALL_ERROR
        element.copy_(_off(before, size, tensor.dtype))
    return f"element {list(place)} of {list(tensor.shape)} {tensor.dtype}: {before} became {element.item()}"


def _place(fault: Fault, tensor: Tensor, draws: random.Random) -> tuple[int, ...]:
    place = tuple(draws.randrange(extent) for extent in tensor.shape)
    if fault.kind in ("small-error", "wrong-sum"):
        for _ in range(LOOKS):
            if tensor[place].item():
                break
            place = tuple(draws.randrange(extent) for extent in tensor.shape)
    return place


def _off(value: Any, size: float, dtype: torch.dtype) -> Tensor:
    """A value that is wrong by a relative `size`: by `size` itself where it is zero, by one at least where it is whole.

    A whole number that would leave its range goes the other way.
    """
    if dtype.is_floating_point:
        return torch.tensor(value * (1.0 + size) if value else size, dtype=torch.float64)
    limits, off = torch.iinfo(dtype), max(1, round(abs(value * size)))
    wrong = min(value + off, limits.max)
    return torch.tensor(wrong if wrong != value else max(value - off, limits.min), dtype=dtype)


def flip_bit(element: Tensor, bit: int) -> None:
    """Flip one bit of a tensor without dimensions, in place; bit 0 is the lowest of the mantissa.

    Raises ValueError for a bit that its dtype does not have.
    """
    width = 8 * element.element_size()
    if not 0 <= bit < width:
        raise ValueError(f"{element.dtype} has bits 0 to {width - 1}, not {bit}")
    mask = 1 << bit
    if bit == width - 1 and width > 8:
        mask = -mask
    element.view(_INTEGERS[element.element_size()]).bitwise_xor_(mask)


def round_mantissa(value: Tensor, bits: int) -> Tensor:
    """Floating-point values rounded to nearest even with `bits` bits of mantissa: 10 is TF32's, 7 bfloat16's."""
    own = _MANTISSA.get(value.dtype)
    if own is None or own <= bits:
        return value
    drop = own - bits
    raw = value.view(_INTEGERS[value.element_size()])
    odd = (raw >> drop) & 1
    rounded = ((raw + ((1 << (drop - 1)) - 1) + odd) >> drop) << drop
    return torch.where(value.isfinite(), rounded.view(value.dtype), value)


def lower(value: Any, bits: int | None) -> Any:
    """An argument in a lower dtype: with `bits` of mantissa, or if None float64 as float32, float32 as bfloat16."""
    if isinstance(value, list | tuple):
        return type(value)(lower(one, bits) for one in value) if type(value) in (list, tuple) else value
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    if bits is not None:
        return round_mantissa(value, bits)
    if value.dtype == torch.float64:
        return value.to(torch.float32)
    return round_mantissa(value, BFLOAT16_BITS) if value.dtype == torch.float32 else value


def single(value: Any) -> Any:
    """float64 results as the float32 that comes back in their place."""
    if isinstance(value, Tensor):
        return value.to(torch.float32) if value.dtype == torch.float64 else value
    if type(value) in (list, tuple):
        return type(value)(map(single, value))
    return value
